"""The arrays that a `Cascade` returns: frames with their frame rate."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.samples.outputs import save_video


class Videos(np.ndarray):
    """Frames, uint8 (B, T, H, W, 3), with their frame rate. `videos[i]` is one of them, (T, H, W, 3).

    Computations return plain arrays.

    Attributes:
        fps: frames per second; None where it is unknown, as it is after a clip without one.
    """

    fps: float | None

    @classmethod
    def of(cls, frames: np.ndarray, fps: float | None) -> "Videos":
        """Returns the same frames with a frame rate."""
        videos = np.asarray(frames).view(cls)
        videos.fps = fps
        return videos

    def __array_finalize__(self, source: Any) -> None:
        self.fps = getattr(source, "fps", None)

    def __array_wrap__(self, array: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array)[()] if return_scalar else np.asarray(array)

    def __reduce__(self) -> tuple:
        return Videos.of, (np.asarray(self), self.fps)

    def save(self, path: str | os.PathLike, *, fps: float | None = None) -> Path:
        """Writes one video in the format of the path's ending: `.mp4`, `.gif`, `.npz` or `.png`; see `save_video`.

        Raises:
            UserError: there are several videos, the frame rate is unknown, or the ending is.
        """
        if self.ndim < 4 or self.ndim > 5 or (self.ndim == 5 and len(self) != 1):
            raise UserError(f"save writes one video, not an array of shape {self.shape}: videos[0].save(...)")
        rate = self.fps if fps is None else fps
        if rate is None:
            raise UserError("the frame rate is unknown, because the clip had none: save(path, fps=8)")
        return save_video(np.asarray(self), path, fps=rate)
