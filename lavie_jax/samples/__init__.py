"""Requests and files of `sample.py`: prompts, outputs, contact sheets, cached stages. No jax: errors come fast."""
