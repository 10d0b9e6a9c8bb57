"""Noise rescheduling: the noise of a long clip from that of its first frames (FreeNoise, arXiv 2310.15169).

With independent noise in every frame, distant frames of a long clip are unrelated. Here every block of `stride` frames
starts from the noise of the block `window` frames earlier, in another order: any window of frames has the noise of the
first one, locally shuffled.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int


def shuffle_count(frames: int, window: int, stride: int) -> int:
    """Returns the number of blocks after the first `window` frames; the last one may be shorter than `stride`."""
    return -(-max(frames - window, 0) // stride)


def shuffles(frames: int, window: int, scores: Float[np.ndarray, "blocks stride"]) -> list[list[int]]:
    """Returns, for each block, the frames whose noise it takes, ordered by its row of `scores` (random numbers)."""
    stride = scores.shape[1]
    starts = range(0, frames - window, stride)
    orders = (np.argsort(row[: frames - window - start]) for start, row in zip(starts, scores, strict=True))
    return [(start + order).tolist() for start, order in zip(starts, orders)]


def noise_sources(window: int, blocks: Iterable[Sequence[int]]) -> Int[np.ndarray, " frames"]:
    """Returns, for each frame, the frame of the first window whose noise it has in the end.

    Args:
        window: number of frames with noise of their own.
        blocks: for each block of later frames, the frames whose noise it takes, which may themselves be later ones.
    """
    sources = list(range(window))
    for block in blocks:
        sources += [sources[frame] for frame in block]
    return np.array(sources)
