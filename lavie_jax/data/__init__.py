"""Host-side data: worlds and folders of clips in, numpy batches out. No models, no jax."""
