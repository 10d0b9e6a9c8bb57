"""What is asked for and where it goes: prompts, settings, files. No model and no jax: a wrong request fails at once."""
