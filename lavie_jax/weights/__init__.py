"""Weights: the folder format (`folder`), PyTorch's parameter names (`names`), and checkpoints of other projects."""

from lavie_jax.weights.folder import Part, Weights, folder_hash, load_folder, load_part
from lavie_jax.weights.saving import save_folder

__all__ = ["Part", "Weights", "folder_hash", "load_folder", "load_part", "save_folder"]
