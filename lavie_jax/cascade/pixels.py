"""A user's clip before it enters a stage: sides that the model cannot have, and lengths that memory cannot hold."""

import contextlib
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lavie_jax.errors import UserError
from lavie_jax.samples.settings import Source


def padded(frames: UInt8[np.ndarray, "t h w 3"], multiple: int) -> UInt8[np.ndarray, "t H W 3"]:
    """Frames whose sides are multiples of `multiple`: the last rows and columns repeated. `finish` crops them off."""
    more = [-side % multiple for side in frames.shape[1:3]]
    return np.pad(frames, [(0, 0), (0, more[0]), (0, more[1]), (0, 0)], mode="edge") if any(more) else frames


def padding_note(stage: str, source: Source, multiple: int) -> str | None:
    """A line for the user when the clip's sides have to be padded."""
    sides = [side + -side % multiple for side in (source.height, source.width)]
    if sides == [source.height, source.width]:
        return None
    return (
        f"{stage}: {source.height}x{source.width} is no multiple of {multiple}: padded to {sides[0]}x{sides[1]}, and "
        "cropped back in the result"
    )


def check_memory(source: Source, bytes_of_pixel: float) -> None:
    """UserError when the host has too little memory for `bytes_of_pixel` bytes for each pixel of the source's clip."""
    free, each = free_memory(), source.height * source.width * bytes_of_pixel
    if source.frames * each <= free:
        return
    most = max(1, int(free / each))
    raise UserError(
        f"{source.frames} frames of {source.height}x{source.width} need {source.frames * each / 2**30:.1f} GiB of "
        f"memory, {free / 2**30:.1f} are free: give at most {most} frames at a time. To split a clip: ffmpeg -i "
        f"clip.mp4 -f segment -segment_time {max(1, int(most / source.fps))} -reset_timestamps 1 part-%03d.mp4"
    )


def free_memory() -> float:
    """Bytes of this machine's memory that programs can have; infinite where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(ValueError, OSError):  # elsewhere, what the machine has
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")
