"""Decodes the frames of a video, by PyAV: frame n is the one shown at n / fps, whatever the container stores."""

import contextlib
import dataclasses
import io
import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lavie_jax.data.display import Screen, check_header
from lavie_jax.errors import UserError

MAX_FPS = 250  # higher rates in headers are ignored: browsers write 1000


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Length and rate of what a file shows.

    Attributes:
        frames: number of frames, at `fps`, that can be decoded.
        fps: frames per second.
        start: time stamp in seconds of the first of them.
    """

    frames: int
    fps: float
    start: float = dataclasses.field(default=0.0, compare=False)


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
    from av.stream import Disposition

    what = label_of(source, name)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as container:
            # Cover art is a video stream too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise UserError(f"{what} has no video stream")
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise UserError(f"{what} is an image, not a video")
            stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
            stream.thread_count = 1  # the pipeline's workers are the parallelism
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {what}: {error}") from error


def info_of(container, stream, what: str) -> VideoInfo:
    """Measures the frames that can be shown, without decoding and without trusting the header.

    Headers count frames that an edit list hides, sound longer than the video, and the missing part of truncated files.
    Instead, the packets at both ends are read, and all packets only if there is no plausible rate.

    Args:
        container: an open container.
        stream: its video stream.
        what: names the video in messages.

    Raises:
        UserError: nothing can be shown, or it would look wrong: HDR, interlaced.
    """
    check_header(stream, what)
    base, rate = float(stream.time_base), float(stream.average_rate or 0)
    first = next((packet for packet in _packets(container, stream) if packet.is_keyframe), None)
    if first is None:
        raise UserError(f"the video {what} has no frame that can be decoded")
    start = first.dts if _lacks_times(container, stream) else _time_of(first)
    if stream.start_time is not None:  # an edit list may start after a key frame
        start = max(start, stream.start_time)

    _seek_end(container, stream, start)
    times, last = _shown_times(container, stream)
    # FFmpeg guesses rates that a header lacks from the first packets. The last ones show whether that holds.
    exact = container.format.name.startswith("mov")  # the mean of all frames
    counted = not 0 < rate <= MAX_FPS or not (exact or _fits(times, base, rate))
    if counted or not times:
        _rewind(container, stream)
        times, last = _shown_times(container, stream)
        times = [time for time in times if time >= start]
    if counted and len(times) > 1:
        rate = _rate_of(times, base)
        if 0.5 < last * base * rate < 1.5:
            rate = len(times) / ((times[-1] - times[0] + last) * base)
    if not times or not 0 < rate < math.inf:
        raise UserError(f"the video {what} does not contain its length")
    length = (times[-1] - start + last) * base if last and not counted else (times[-1] - start) * base + 1 / rate
    return VideoInfo(max(1, round(length * rate)), rate, start * base)


def _fits(times: list[int], base: float, rate: float) -> bool:
    """Whether that many packets take that time at `rate`, up to the rounding of time stamps."""
    if len(times) < 5:
        return True
    length, expected = (times[-1] - times[0]) * base, (len(times) - 1) / rate
    return abs(length - expected) <= max(_ALIKE * expected, 1.5 * base)


def _rate_of(times: list[int], base: float) -> float:
    """Mean number of packets per second."""
    length = (times[-1] - times[0]) * base
    return (len(times) - 1) / length if length else math.inf


def _shown_times(container, stream) -> tuple[list[int], int]:
    """(sorted times of the packets from here on that are shown and complete, duration of the last one)."""
    decoding_order = _lacks_times(container, stream)
    shown = sorted(
        (packet.dts if decoding_order else _time_of(packet), packet.duration or 0)
        for packet in _packets(container, stream)
        if not (packet.is_discard or packet.is_corrupt)
    )
    return [time for time, _ in shown], shown[-1][1] if shown else 0


_SEEKLESS = ("mpeg",)  # after a seek, MPEG program streams have wrong time stamps
_UNINDEXED = ("mpeg", "mpegts")  # a seek to the end may miss the last frame
_ALIKE = 0.02  # rates that differ by less are the same: time stamps are rounded
_FAR = 1_000_000  # seconds: beyond the end of every file


def _packets(container, stream) -> Iterator[Any]:
    """Yields the packets of a stream from the current position on, except the empty one at the end."""
    for packet in container.demux(stream):
        if packet.size and _time_of(packet) is not None:
            yield packet


def _lacks_times(container, stream) -> bool:
    """Whether only the order of decoding is known: AVI has no time stamps, and with B-frames FFmpeg's are wrong."""
    return container.format.name == "avi" and bool(stream.codec_context.has_b_frames)


def _time_of(packet) -> int | None:
    return packet.dts if packet.pts is None else packet.pts


def _seek(container, stream, time: int) -> None:
    container.seek(time, stream=stream, backward=True)


def _seek_end(container, stream, start: int) -> None:
    """Seeks to the last key frame, or to the first packet if that is not possible."""
    if container.format.name in _UNINDEXED:
        _rewind(container, stream)
    else:
        _seek(container, stream, start + int(_FAR / float(stream.time_base)))


def _rewind(container, stream) -> None:
    """Seeks to the first packet, which may be before the first time that is shown."""
    import av

    start = stream.start_time or 0
    try:
        _seek(container, stream, start - int(_FAR / float(stream.time_base)))
    except av.error.FFmpegError:
        _seek(container, stream, start)


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


def too_short(what: str, wanted: str, info: VideoInfo) -> UserError:
    """The error for a video with fewer frames than requested."""
    return UserError(f"the video {what} is too short for {wanted}: it has {info.frames} at {info.fps:g} fps")


def numbered_frames(container, stream, info: VideoInfo, *, first: int, what: str) -> Iterator[tuple[int, Any]]:
    """Yields (index, frame) from an index at or before `first` on; index n is shown at n / fps.

    Raises:
        UserError: the frame at `first` cannot be decoded.
    """
    if _lacks_times(container, stream):
        yield from _numbered_by_order(container, stream, info)
        return
    # The key frame before a frame is not enough if frames refer to frames before it (open GOPs), and some containers
    # seek to a later one. Then the seek goes further back, finally to the start.
    seconds, back = first / info.fps, 0.0
    while True:
        time = 0.0 if container.format.name in _SEEKLESS else max(0.0, seconds - back)
        frames = _frames_from(container, stream, info, time=time, wanted=first)
        head = next(frames, None)
        if head is not None and head[0] <= first:
            break
        if not time:
            if head is not None and head[0] > first + 1:
                raise UserError(f"the video {what} has no frame that can be decoded at {seconds:g} s")
            break
        back = max(1.0, 2 * back)
    if head is not None:
        yield head
        yield from frames


def _frames_from(container, stream, info: VideoInfo, *, time: float, wanted: int) -> Iterator[tuple[int, Any]]:
    """Yields (index, frame) from the key frame before `time` on.

    Yields nothing if that key frame is later than index `wanted`. Frames shown before the key frame are left out,
    because they refer to earlier frames.
    """
    base, number, key = float(stream.time_base), -1, None

    def index_of(time_stamp: int) -> int:
        return round((time_stamp * base - info.start) * info.fps)

    decoder = _decoder_of(stream)
    if time:
        _seek(container, stream, round((info.start + time) / base))
    else:
        _rewind(container, stream)
    for packet in container.demux(stream):
        if key is None:
            if not packet.is_keyframe:
                continue
            key = packet.pts
            if time and key is not None and index_of(key) > wanted:
                return
        for frame in decoder.decode(packet):
            if frame.pts is not None and key is not None and frame.pts < key:
                continue
            number = number + 1 if frame.pts is None else index_of(frame.pts)
            yield number, frame


def _decoder_of(stream) -> Any:
    """The decoder of a stream. WebM keeps transparency beside the frames, where only libvpx looks for it."""
    import av

    if stream.metadata.get("alpha_mode") != "1" or stream.codec_context.name not in _ALPHA_DECODERS:
        return stream.codec_context
    decoder = av.CodecContext.create(_ALPHA_DECODERS[stream.codec_context.name], "r")
    decoder.extradata, decoder.thread_count = stream.codec_context.extradata, 1
    return decoder


_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def _numbered_by_order(container, stream, info: VideoInfo) -> Iterator[tuple[int, Any]]:
    """Yields (index, frame) of an AVI with B-frames.

    AVI stores only the decoding order, and the time stamps that decoders derive are wrong. Frames arrive in display
    order, so the n-th gets the index of the n-th packet. A seek would lose some, so all are decoded.
    """
    base, number = float(stream.time_base), -1
    indices: deque[int] = deque()
    _rewind(container, stream)
    for packet in container.demux(stream):
        if packet.size and packet.dts is not None:
            indices.append(round((packet.dts * base - info.start) * info.fps))
        for frame in packet.decode():
            number = indices.popleft() if indices else number + 1
            yield number, frame


def timed_frames(container, stream, info: VideoInfo, what: str) -> Iterator[tuple[float, float, Any]]:
    """Yields (start, end, frame) of all frames in display order, in seconds from the first on."""
    base = float(stream.time_base)
    for number, frame in numbered_frames(container, stream, info, first=0, what=what):
        exact = frame.pts is not None and not _lacks_times(container, stream)
        time = frame.pts * base - info.start if exact else number / info.fps
        yield time, time + ((frame.duration or 0) * base or 1 / info.fps), frame


def frames_shown(stream, frame, info: VideoInfo) -> float:
    """Number of frame intervals that a frame is shown for, by its own duration."""
    return (frame.duration or 0) * float(stream.time_base) * info.fps


def decode(container, stream, info: VideoInfo, *, start: float, frames: int, rate: float, what: str) -> np.ndarray:
    """Returns uint8 (T, H, W, 3), the frames shown at `frames` times, 1 / `rate` apart, from `start` seconds on."""
    wanted = shown_at(info, start=start, frames=frames, rate=rate)
    shown: list[np.ndarray] = []
    pixels = Screen(stream, what)
    before, before_pixels, until = None, None, -1.0
    for number, frame in numbered_frames(container, stream, info, first=int(wanted[0]), what=what):
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
