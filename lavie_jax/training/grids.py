"""Sample grids of fixed prompts during training: how a run looks, step by step."""

from collections.abc import Sequence
from pathlib import Path

from lavie_jax import cascade
from lavie_jax.data import video_files


def write(weights: Path, prompts: Sequence[str], folder: Path, step: int) -> Path:
    """Samples every prompt with seed 0 and the folder's own settings; writes `{step:08d}.png`, a row a prompt."""
    videos = cascade.load(weights)(list(prompts), seed=0)
    path = folder / f"{step:08d}.png"
    return video_files.contact_sheet(list(videos), list(prompts), path, columns=8)
