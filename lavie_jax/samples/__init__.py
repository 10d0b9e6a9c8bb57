"""Requests and files of `sample.py`: prompts, outputs, sheets, cached stages. Without jax, for early error messages."""
