"""Clips between the stages: their size and rate, padding to sizes that a model supports, and memory requirements."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8
from PIL import Image, ImageOps

from lavie_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """Size and rate of a stage's input clip: the output of the previous stage or, with `own`, the user's clip."""

    frames: int
    height: int
    width: int
    fps: float
    own: bool = False


def padded(frames: UInt8[np.ndarray, "t h w 3"], multiple: int) -> UInt8[np.ndarray, "t H W 3"]:
    """Pads frames to multiples of `multiple` by repeating the last row and column; `Stage.finish` crops them."""
    more = [-side % multiple for side in frames.shape[1:3]]
    return np.pad(frames, [(0, 0), (0, more[0]), (0, more[1]), (0, 0)], mode="edge") if any(more) else frames


def check_sides(height: int, width: int, factor: int) -> None:
    """Raises UserError if the VAE cannot make an output of this size."""
    for name, side in (("height", height), ("width", width)):
        if side % factor:
            nearest = max(factor, round(side / factor) * factor)
            raise UserError(
                f"{name}: {side} is not a multiple of {factor}, the factor of this model's VAE; use {nearest}"
            )


def padding_note(stage: str, clip: ClipInfo, multiple: int) -> str | None:
    """Returns a warning if the clip has to be padded, else None."""
    sides = [side + -side % multiple for side in (clip.height, clip.width)]
    if sides == [clip.height, clip.width]:
        return None
    return (
        f"{stage}: {clip.height}x{clip.width} is not a multiple of {multiple}: padded to {sides[0]}x{sides[1]} and "
        "cropped in the result"
    )


def fitted(picture: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """Crops a picture of any size around its centre to the aspect ratio, and scales it to the size."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.BICUBIC))


def fitting_note(what: str, size: tuple[int, int], height: int, width: int) -> str | None:
    """Returns a warning if `fitted` changes a picture of this size (height, width), else None."""
    if size == (height, width):
        return None
    scale = max(height / size[0], width / size[1])
    kept = tuple(min(side, max(1, round(target / scale))) for side, target in zip(size, (height, width)))
    changes = [f"cropped to its middle {kept[0]}x{kept[1]}"] if kept != size else []
    changes += [f"scaled to {height}x{width}"] if kept != (height, width) else []
    return f"{what}: {size[0]}x{size[1]} is {' and '.join(changes)}"


def check_memory(clip: ClipInfo, bytes_per_pixel: float) -> None:
    """Raises UserError when the host lacks `bytes_per_pixel` bytes of memory for each pixel of the clip."""
    free, per_frame = free_memory(), clip.height * clip.width * bytes_per_pixel
    if clip.frames * per_frame <= free:
        return
    most = max(1, int(free / per_frame))
    raise UserError(
        f"{clip.frames} frames of {clip.height}x{clip.width} need {clip.frames * per_frame / 2**30:.1f} GiB of "
        f"memory, {free / 2**30:.1f} are free: give at most {most} frames at a time. To split a clip: ffmpeg -i "
        f"clip.mp4 -f segment -segment_time {max(1, int(most / clip.fps))} -reset_timestamps 1 part-%03d.mp4"
    )


def free_memory() -> float:
    """Bytes of memory available to programs on this machine; infinite where the system does not report it."""
    with contextlib.suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(ValueError, OSError):  # elsewhere, all memory of the machine
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def pixels_to_float(pixels: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """Converts uint8 pixels on the devices to float32 in [-1, 1], bit for bit as `data.transforms.to_float` does.

    Compilers fuse x * (1 / 127.5) - 1, with results that differ between devices. Every such float is a multiple n of
    2^-24, and this function computes n in integers. Floats are returned unchanged.
    """
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        return pixels
    x = pixels.astype(jnp.int32)
    rounding = (x >= 48).astype(jnp.int32) + (x >= 96) + 2 * (x >= 192) - 2 * (x == 255)  # that of float32
    n = 131586 * x + rounding - 2**24  # 2 x / 255 = (131586 x + 2 x / 255) 2^-24
    return n.astype(jnp.float32) * jnp.float32(2**-24)


def to_float(frames: Any) -> Any:
    """Converts uint8 frames 0..255, in numpy or jax, to float32 in [-1, 1]."""
    return frames.astype(np.float32) / 127.5 - 1
