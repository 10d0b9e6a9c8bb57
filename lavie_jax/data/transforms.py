"""What happens to pixels between a file and a batch."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image


def resize_crop(
    frames: UInt8[np.ndarray, "t h w 3"], *, height: int, width: int, rng: np.random.Generator | None
) -> UInt8[np.ndarray, "t height width 3"]:
    """Scales until (height, width) just fits inside, then cuts it out: the same place in every frame.

    The place is drawn from `rng`, or the centre without one. Never mirrored: captions say left and right.
    """
    rows, columns = frames.shape[1:3]
    scale = max(height / rows, width / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    place = rng.random(2) if rng is not None else (0.5, 0.5)
    top = int(place[0] * (size[0] - height + 1))
    left = int(place[1] * (size[1] - width + 1))
    if size != (rows, columns):
        frames = np.stack(
            [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in frames]
        )
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def to_float(pixels: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """0..255 to [-1, 1]."""
    out = pixels.astype(np.float32)
    out *= 1 / 127.5
    out -= 1
    return out


def to_uint8(pixels: Float32[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """[-1, 1] to 0..255, clipped and rounded: the inverse of `to_float`."""
    return (np.clip((np.asarray(pixels, np.float32) + 1) * 127.5, 0, 255) + 0.5).astype(np.uint8)
