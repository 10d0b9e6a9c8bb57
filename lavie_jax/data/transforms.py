"""Pixel transforms between a file and a batch."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

USUAL_FPS = 24.0
CAMERA_REACH = 1 / 8  # fraction of the shorter side over which a hand-held camera moves
CAMERA_RATES = 0.2, 1.0  # Hz, slowest and fastest


def resize_crop(
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    height: int,
    width: int,
    rng: np.random.Generator | None,
    whole: tuple[int, int] = (0, 0),
) -> UInt8[np.ndarray, "t height width 3"]:
    """Scales frames to cover both (height, width) and `whole`, and crops all of them equally to (height, width).

    The crop is chosen by `rng`; None takes the centre. Frames are never mirrored, as captions contain left and right.
    """
    rows, columns = frames.shape[1:3]
    scale = max(max(height, whole[0]) / rows, max(width, whole[1]) / columns)
    size = max(height, round(rows * scale)), max(width, round(columns * scale))
    offset = rng.random(2) if rng is not None else (0.5, 0.5)
    top = int(offset[0] * (size[0] - height + 1))
    left = int(offset[1] * (size[1] - width + 1))
    if size != (rows, columns):
        frames = np.stack(
            [np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)) for frame in frames]
        )
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def camera_reach(height: int, width: int) -> int:
    """Pixels by which an image must exceed the frames that `handheld` cuts from it, in height and width."""
    return max(1, round(CAMERA_REACH * min(height, width)))


def handheld(
    image: UInt8[np.ndarray, "h w 3"], *, frames: int, height: int, width: int, fps: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Returns a clip of an image under a hand-held camera: smooth random translations (LaVie, sec. 3.4).

    Each axis moves as the sum of two sines, by whole pixels, which keeps every frame as sharp as the image. Frames that
    are downscaled afterwards move by fractions of a pixel.
    """
    room = np.array([image.shape[0] - height, image.shape[1] - width])
    rates, phases = rng.uniform(*CAMERA_RATES, (2, 2, 1)), rng.uniform(0, 1, (2, 2, 1))
    swing = np.sin(2 * np.pi * (rates * np.arange(frames) / fps + phases)).mean(1)  # (axes, T), in [-1, 1]
    corners = np.round((swing + 1) / 2 * room[:, None]).astype(int).T
    return np.stack([image[y : y + height, x : x + width] for y, x in corners])


def to_float(pixels: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Converts 0..255 to [-1, 1]."""
    out = pixels.astype(np.float32)
    out *= 1 / 127.5
    out -= 1
    return out


def to_uint8(pixels: Float32[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Converts [-1, 1] to 0..255, clipped and rounded: the inverse of `to_float`."""
    return (np.clip((np.asarray(pixels, np.float32) + 1) * 127.5, 0, 255) + 0.5).astype(np.uint8)
