"""Measures of finished models: what is in the videos that they make."""
