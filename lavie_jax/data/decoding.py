"""Decodes the frames of a video, by PyAV: frame n is the one shown at n / fps, whatever the container stores."""

import contextlib
import dataclasses
import io
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from lavie_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Number of frames, by the container's count or an estimate, and frames per second of a file."""

    frames: int
    fps: float


def label_of(source: str | Path | bytes, name: str) -> str:
    """The name of a video in messages."""
    return repr(name or ("" if isinstance(source, bytes) else os.fspath(source)))


@contextlib.contextmanager
def opened(source: str | Path | bytes, name: str = "") -> Iterator[tuple]:
    """Opens (container, video stream) of a file or of its bytes.

    Raises:
        UserError: it is not a video, or cannot be read.
    """
    import av  # PyAV is needed only to read or write video files

    what = label_of(source, name)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as container:
            if not container.streams.video:
                raise UserError(f"{what} has no video stream")
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise UserError(f"{what} is an image, not a video")
            stream = container.streams.video[0]
            stream.thread_count = 1  # the pipeline's workers are the parallelism
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {what}: {error}") from error


def _seconds(container, stream) -> float:
    if stream.duration is not None:
        return stream.duration * float(stream.time_base)
    return (container.duration or 0) / 1_000_000


def info_of(container, stream, what: str) -> VideoInfo:
    """Reads length and rate from the header; `what` names the video in messages."""
    rate = float(stream.average_rate or 0)
    frames = stream.frames or round(_seconds(container, stream) * rate)
    if not rate or not frames:
        raise UserError(f"the video {what} does not contain its length")
    return VideoInfo(frames, rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipWindow:
    """`frames` consecutive frames of a clip: at `fps`, or, for None, every `stride`-th frame at the clip's own rate."""

    frames: int
    fps: float | None = None
    stride: int = 1

    def __str__(self) -> str:
        if self.fps is not None:
            return f"{self.frames} frames at {self.fps:g} fps"
        return f"{self.frames} frames at their own rate" + (f", {self.stride} apart" if self.stride > 1 else "")

    def rate(self, info: VideoInfo) -> float:
        """Frames of the window per second of a clip."""
        return self.fps or info.fps / self.stride

    def room(self, info: VideoInfo) -> float:
        """The latest start in seconds at which the window still fits into a clip; negative if it does not fit."""
        room = (info.frames - 1) / info.fps - max(self.frames - 1, 0) / self.rate(info)
        return max(room, 0.0) if room > -1e-6 else room

    def indices(self, info: VideoInfo, start: float) -> Int[np.ndarray, " t"]:
        """Indices of a clip's frames that the window shows from `start` seconds on."""
        return shown_at(info, start=start, frames=self.frames, rate=self.rate(info))


def shown_at(info: VideoInfo, *, start: float, frames: int, rate: float) -> Int[np.ndarray, " t"]:
    """Indices of the frames that are shown at `frames` times, 1 / `rate` apart, from `start` seconds on."""
    times = start + np.arange(frames) / rate
    # The slack absorbs rounding where one rate divides the other.
    return np.floor(times * info.fps + 1e-3).astype(int)


def upright(frame, *, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a frame, scaled to (height, width), then rotated as its metadata asks."""
    return np.rot90(frame.to_ndarray(format="rgb24", height=height, width=width), frame.rotation // 90)


def too_short(what: str, wanted: str, info: VideoInfo) -> UserError:
    """The error for a video with fewer frames than are wanted."""
    return UserError(f"the video {what} is too short for {wanted}: it has {info.frames} at {info.fps:g} fps")


def numbered_frames(container, stream, info: VideoInfo, *, first: int) -> Iterator[tuple[int, Any]]:
    """Yields (index, frame) from a key frame at or before index `first` on; index n is shown at n / fps."""
    base, start, number = float(stream.time_base), stream.start_time or 0, -1
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        # AVI stores only the decoding order, and the time stamps that decoders derive are wrong. Frames arrive in
        # display order, so the n-th gets the index of the n-th packet. A seek would lose some, so all are decoded.
        indices: deque[int] = deque()
        for packet in container.demux(stream):
            if packet.size and packet.dts is not None:
                indices.append(round((packet.dts - start) * base * info.fps))
            for frame in packet.decode():
                number = indices.popleft() if indices else number + 1
                yield number, frame
        return
    container.seek(start + int(first / info.fps / base), stream=stream, backward=True)
    for frame in container.decode(stream):
        number = number + 1 if frame.pts is None else round((frame.pts - start) * base * info.fps)
        yield number, frame


def frames_shown(stream, frame, info: VideoInfo) -> float:
    """Number of frame intervals that a frame is shown for, by its own duration."""
    return (frame.duration or 0) * float(stream.time_base) * info.fps


def decode(container, stream, info: VideoInfo, *, start: float, frames: int, rate: float, what: str) -> np.ndarray:
    """Returns uint8 (T, H, W, 3), the frames shown at `frames` times, 1 / `rate` apart, from `start` seconds on."""
    wanted = shown_at(info, start=start, frames=frames, rate=rate)
    shown: list[np.ndarray] = []
    size: dict[str, int] = {}  # if the stream changes its size, later frames are scaled to the first
    before, before_pixels, until = None, None, -1.0

    def pixels(frame) -> np.ndarray:
        if not size:
            size.update(height=frame.height, width=frame.width)
        return upright(frame, **size)

    for number, frame in numbered_frames(container, stream, info, first=int(wanted[0])):
        frame_pixels = None
        # A variable rate skips indices: the previous frame is still shown.
        while len(shown) < len(wanted) and wanted[len(shown)] < number:
            if before_pixels is None:
                before_pixels = pixels(before if before is not None else frame)
            shown.append(before_pixels)
        while len(shown) < len(wanted) and wanted[len(shown)] == number:
            frame_pixels = pixels(frame) if frame_pixels is None else frame_pixels
            shown.append(frame_pixels)
        if len(shown) == len(wanted):
            break
        before, before_pixels, until = frame, frame_pixels, number + frames_shown(stream, frame, info)
    while before is not None and len(shown) < len(wanted) and wanted[len(shown)] < until - 1e-3:
        before_pixels = pixels(before) if before_pixels is None else before_pixels
        shown.append(before_pixels)  # the last frame is shown for its own duration
    if len(shown) < len(wanted):
        raise too_short(what, f"{frames} frames at {rate:g} fps from {start:g} s", info)
    return np.stack(shown)
