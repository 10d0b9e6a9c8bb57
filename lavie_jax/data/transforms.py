"""What happens to pixels between a file and a batch."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

USUAL_FPS = 24.0
CAMERA_REACH = 1 / 8  # of the shorter side: how far a hand-held camera moves
CAMERA_RATES = 0.2, 1.0  # Hz, slowest and fastest


def resize_crop(
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    height: int,
    width: int,
    rng: np.random.Generator | None,
    whole: tuple[int, int] = (0, 0),
) -> UInt8[np.ndarray, "t height width 3"]:
    """Scales until (height, width), and `whole`, just fits inside, then cuts out the former: in every frame the same
    place.

    The place is drawn from `rng`, or the centre without one. Never mirrored: captions say left and right.
    """
    rows, columns = frames.shape[1:3]
    scale = max(max(height, whole[0]) / rows, max(width, whole[1]) / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    place = rng.random(2) if rng is not None else (0.5, 0.5)
    top = int(place[0] * (size[0] - height + 1))
    left = int(place[1] * (size[1] - width + 1))
    if size != (rows, columns):
        frames = np.stack(
            [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in frames]
        )
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def camera_reach(height: int, width: int) -> int:
    """Pixels by which a still must be larger than the frames that `handheld` makes of it, both ways."""
    return max(1, round(CAMERA_REACH * min(height, width)))


def handheld(
    still: UInt8[np.ndarray, "h w 3"], *, frames: int, height: int, width: int, fps: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "frames height width 3"]:
    """A clip of a still under a camera that is held by hand: smooth random translations (LaVie sec. 3.4).

    Each axis swings as the sum of two sines. Whole pixels, which leave every frame as sharp as the still; frames that
    are then made smaller move by parts of a pixel.
    """
    room = np.array([still.shape[0] - height, still.shape[1] - width])
    rates, phases = rng.uniform(*CAMERA_RATES, (2, 2, 1)), rng.uniform(0, 1, (2, 2, 1))
    swing = np.sin(2 * np.pi * (rates * np.arange(frames) / fps + phases)).mean(1)  # (axes, T), in [-1, 1]
    corners = np.round((swing + 1) / 2 * room[:, None]).astype(int).T
    return np.stack([still[y : y + height, x : x + width] for y, x in corners])


def to_float(pixels: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """0..255 to [-1, 1]."""
    out = pixels.astype(np.float32)
    out *= 1 / 127.5
    out -= 1
    return out


def to_uint8(pixels: Float32[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """[-1, 1] to 0..255, clipped and rounded: the inverse of `to_float`."""
    return (np.clip((np.asarray(pixels, np.float32) + 1) * 127.5, 0, 255) + 0.5).astype(np.uint8)
