"""Video files: mp4 by PyAV, gif, png and npz, and the contact sheet. Imports PyAV only when one is used.

Whatever is written gets a temporary name first and its own at the end: no half file survives a crash.
"""

import contextlib
import dataclasses
import io
import math
import os
import textwrap
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from lavie_jax.errors import UserError, suggest

FORMATS = ("mp4", "gif", "png", "npz")


@contextlib.contextmanager
def finished(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` when the block ends well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {os.fspath(path)!r}: a folder above it is a file") from error
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# The same bytes on every machine. With its code for AVX-512, x264's rate control reads memory that nobody has written:
# the same frames gave ten different files in one process.
SAME_EVERYWHERE = {"x264-params": "cpu-independent=1"}


def encode(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    path: str | Path,
    *,
    height: int,
    width: int,
    fps: float,
    options: Mapping[str, str],
) -> int:
    """Writes an mp4 (H.264, 4:2:0) of frames as they come, under its own name at once; returns how many there were.

    `options` are libx264's, e.g. {"crf": "18"}. The same frames give the same bytes on every machine.
    """
    import av  # PyAV is needed by those who read or write video files only

    count = 0
    with av.open(os.fspath(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(65535)
        stream = container.add_stream("libx264", rate=rate, options={**SAME_EVERYWHERE, **options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1  # as for SAME_EVERYWHERE
        for frame in frames:
            count += 1
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return count


def save_video(frames: UInt8[np.ndarray, "t h w 3"], path: str | Path, *, fps: float) -> Path:
    """Writes an mp4 (H.264, crf 18, 4:2:0) of `frames`; returns its path.

    Raises UserError for odd sides, which 4:2:0 cannot hold, and for a rate that is not above 0.
    """
    frame_count, height, width = frames.shape[:3]
    if not (0 < fps < 65535):
        raise UserError(f"fps must be above 0; given {fps}")
    if frame_count < 1 or height % 2 or width % 2:
        raise UserError(f"an mp4 has frames with even sides; given {frame_count} of {height}x{width}: use gif or npz")
    path = Path(path)
    with finished(path) as temporary:
        encode(frames, temporary, height=height, width=width, fps=fps, options={"crf": "18"})
    return path


def _save_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    # A gif counts in hundredths of a second: rounding the times, not the durations, keeps the length.
    times = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int) * 10
    with finished(path) as temporary:
        Image.fromarray(frames[0]).save(
            temporary,
            format="gif",
            save_all=True,
            append_images=(Image.fromarray(frame) for frame in frames[1:]),
            duration=np.maximum(np.diff(times), 20).tolist(),
            loop=0,
            disposal=1,
        )


def _save_png(image: np.ndarray | Image.Image, path: Path) -> None:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with finished(path) as temporary:
        image.save(temporary, format="png")


def save_as(frames: UInt8[np.ndarray, "t h w 3"], stem: str | Path, format: str, *, fps: float) -> Path:
    """Writes `frames` as `stem` plus the suffix of `format`, one of FORMATS, and returns what it wrote.

    mp4 and gif are for looking at; png (a folder of frames, or one file for one frame) and npz (arrays
    `video` and `fps`) are exact.
    """
    path = Path(f"{os.fspath(stem)}.{format}")
    if format == "mp4":
        save_video(frames, path, fps=fps)
    elif format == "gif":
        _save_gif(frames, path, fps)
    elif format == "npz":
        with finished(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, video=frames, fps=np.float64(fps))
    elif format == "png" and len(frames) == 1:
        _save_png(frames[0], path)
    elif format == "png":
        path = Path(stem)
        for i, frame in enumerate(frames):
            _save_png(frame, path / f"{i:04d}.png")
        for stale in path.glob("[0-9][0-9][0-9][0-9].png"):  # of a longer video before
            if int(stale.stem) >= len(frames):
                stale.unlink()
    else:
        raise UserError(f"unknown format {format!r}{suggest(format, FORMATS)}")
    return path


# ---- reading ----


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Frames and frames per second of a file; `frames` is the container's count, or an estimate."""

    frames: int
    fps: float


def _label(source: str | Path | bytes, name: str) -> str:
    return repr(name or ("" if isinstance(source, bytes) else os.fspath(source)))


@contextlib.contextmanager
def _opened(source: str | Path | bytes, name: str = "") -> Iterator[tuple]:
    """(container, video stream) of a file, or of its bytes. Raises UserError for what is no video."""
    import av

    what = _label(source, name)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)) as container:
            if not container.streams.video:
                raise UserError(f"{what} has no video stream")
            if container.format.name.endswith("_pipe") or container.format.name == "image2":
                raise UserError(f"{what} is a picture, not a video")
            stream = container.streams.video[0]
            stream.thread_count = 1  # the pipeline's workers are the parallelism
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {what}: {error}") from error


def _seconds(container, stream) -> float:
    if stream.duration is not None:
        return stream.duration * float(stream.time_base)
    return (container.duration or 0) / 1_000_000


def _info(container, stream, what: str) -> VideoInfo:
    rate = float(stream.average_rate or 0)
    frames = stream.frames or round(_seconds(container, stream) * rate)
    if not rate or not frames:
        raise UserError(f"the video {what} does not say how long it is")
    return VideoInfo(frames, rate)


def video_info(source: str | Path | bytes, *, name: str = "") -> VideoInfo:
    """Length and rate from the container's header, without decoding; `name` is for messages about bytes."""
    with _opened(source, name) as (container, stream):
        return _info(container, stream, _label(source, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """A run of `frames` of a clip: at `fps`, or, without, every `stride`-th frame at the clip's own rate."""

    frames: int
    fps: float | None = None
    stride: int = 1

    def __str__(self) -> str:
        if self.fps is not None:
            return f"{self.frames} frames at {self.fps:g} fps"
        return f"{self.frames} frames at their own rate" + (f", {self.stride} apart" if self.stride > 1 else "")

    def rate(self, info: VideoInfo) -> float:
        """Frames of the window in a second of the clip."""
        return self.fps or info.fps / self.stride

    def room(self, info: VideoInfo) -> float:
        """Seconds over which it may start: up to the last frame that leaves room for it. Below 0, it does not fit."""
        room = (info.frames - 1) / info.fps - max(self.frames - 1, 0) / self.rate(info)
        return max(room, 0.0) if room > -1e-6 else room

    def numbers(self, info: VideoInfo, start: float) -> Int[np.ndarray, " t"]:
        """The frames of the clip that are shown at its times, from `start` seconds on."""
        return shown_at(info, start=start, frames=self.frames, rate=self.rate(info))


def shown_at(info: VideoInfo, *, start: float, frames: int, rate: float) -> Int[np.ndarray, " t"]:
    """The numbers of the frames that are shown at `frames` times, 1 / `rate` apart, from `start` seconds on."""
    times = start + np.arange(frames) / rate
    # A little slack for rates that divide each other but for rounding.
    return np.floor(times * info.fps + 1e-3).astype(int)


def read_window(
    source: str | Path | bytes, window: Window, *, place: float, name: str = ""
) -> UInt8[np.ndarray, "t h w 3"]:
    """The frames of a window that starts at `place`, 0 to 1, of the room that the clip leaves for it.

    Only the part that is needed is decoded. Raises UserError for a file that cannot be read or is too short.
    """
    with _opened(source, name) as (container, stream):
        info = _info(container, stream, _label(source, name))
        start = window.room(info) * place
        if start < 0:
            raise _too_short(_label(source, name), f"{window}", info)
        place = {"start": start, "frames": window.frames, "rate": window.rate(info)}
        return _decode(container, stream, info, **place, what=_label(source, name))


def read_video(
    path: str | Path, *, frames: int | None = None, fps: float | None = None, start: float = 0.0
) -> UInt8[np.ndarray, "t h w 3"]:
    """Frames from `start` seconds on: `frames` of them (default: to the end) at `fps` (default: its own).

    At another rate than the file's, each time gets the frame shown then. Only the part that is needed is
    decoded. Raises UserError for a file that cannot be read or is too short.
    """
    with _opened(path) as (container, stream):
        info = _info(container, stream, _label(path, ""))
        rate = fps or info.fps
        if frames is None:
            frames = max(1, int((info.frames - 0.5) / info.fps * rate - start * rate) + 1)
        return _decode(container, stream, info, start=start, frames=frames, rate=rate, what=_label(path, ""))


def _upright(frame, *, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a frame as (height, width), then turned as its camera was held."""
    return np.rot90(frame.to_ndarray(format="rgb24", height=height, width=width), frame.rotation // 90)


def _too_short(what: str, wanted: str, info: VideoInfo) -> UserError:
    return UserError(f"the video {what} is too short for {wanted}: it has {info.frames} at {info.fps:g} fps")


def _numbered(container, stream, info: VideoInfo, *, first: int) -> Iterator[tuple[int, object]]:
    """(number, frame) from a key frame at or before number `first` on; number n is shown at n / fps."""
    base, start, number = float(stream.time_base), stream.start_time or 0, -1
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        # AVI keeps the order of decoding alone, and the times that decoders make up are off. Frames come out in the
        # order of showing: the n-th has the n-th packet's place. After a seek some are missing, so all are decoded.
        places: deque[int] = deque()
        for packet in container.demux(stream):
            if packet.size and packet.dts is not None:
                places.append(round((packet.dts - start) * base * info.fps))
            for frame in packet.decode():
                number = places.popleft() if places else number + 1
                yield number, frame
        return
    container.seek(start + int(first / info.fps / base), stream=stream, backward=True)
    for frame in container.decode(stream):
        number = number + 1 if frame.pts is None else round((frame.pts - start) * base * info.fps)
        yield number, frame


def _lasts(stream, frame, info: VideoInfo) -> float:
    """How many numbers long a frame is shown, by its own account."""
    return (frame.duration or 0) * float(stream.time_base) * info.fps


def _decode(container, stream, info: VideoInfo, *, start: float, frames: int, rate: float, what: str) -> np.ndarray:
    """The frames that are shown at `frames` times, 1 / `rate` apart, from `start` seconds after the first frame on."""
    wanted = shown_at(info, start=start, frames=frames, rate=rate)
    shown: list[np.ndarray] = []
    size: dict[str, int] = {}  # a stream whose size changes is brought to the first one
    before, before_pixels, until = None, None, -1.0

    def pixels(frame) -> np.ndarray:
        if not size:
            size.update(height=frame.height, width=frame.width)
        return _upright(frame, **size)

    for number, frame in _numbered(container, stream, info, first=int(wanted[0])):
        frame_pixels = None
        # A stream of varying rate skips numbers: the frame before is still shown.
        while len(shown) < len(wanted) and wanted[len(shown)] < number:
            if before_pixels is None:
                before_pixels = pixels(before if before is not None else frame)
            shown.append(before_pixels)
        while len(shown) < len(wanted) and wanted[len(shown)] == number:
            frame_pixels = pixels(frame) if frame_pixels is None else frame_pixels
            shown.append(frame_pixels)
        if len(shown) == len(wanted):
            break
        before, before_pixels, until = frame, frame_pixels, number + _lasts(stream, frame, info)
    while before is not None and len(shown) < len(wanted) and wanted[len(shown)] < until - 1e-3:
        before_pixels = pixels(before) if before_pixels is None else before_pixels
        shown.append(before_pixels)  # the last frame lasts as long as it says
    if len(shown) < len(wanted):
        raise _too_short(what, f"{frames} frames at {rate:g} fps from {start:g} s", info)
    return np.stack(shown)


def stored_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a video file as it is stored; a camera that was turned shows it the other way."""
    with _opened(path) as (_, stream):
        return stream.height, stream.width


def shown_size(source: str | Path | bytes, *, name: str = "") -> tuple[int, int]:
    """(height, width) of a video as it is shown, by its first frame: the header does not say how it is turned."""
    with _opened(source, name) as (container, stream):
        for frame in container.decode(stream):
            return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
    raise UserError(f"the video {_label(source, name)} has no frames")


def each_frame(path: str | Path, *, first: int = 0, shorter_side: int = 0) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The frames shown at first / fps, (first + 1) / fps, ... to the end, one at a time; fps is the file's own.

    A stream of varying rate comes at its average one. Frames are scaled down until the shorter side has `shorter_side`
    pixels; 0 leaves them as they are. Raises UserError for what cannot be read, also where the file breaks off.
    """
    what = _label(path, "")
    with _opened(path) as (container, stream):
        info = _info(container, stream, what)
        size: dict[str, int] = {}
        due, until, before = first, 0, None
        for number, frame in _numbered(container, stream, info, first=first):
            if not size:
                zoom = min(1.0, shorter_side / min(frame.height, frame.width)) if shorter_side else 1.0
                size = {"height": round(frame.height * zoom), "width": round(frame.width * zoom)}
            if number > 2 * info.frames + 100:  # or damaged time stamps would repeat one frame for hours
                raise UserError(f"the video {what} has a frame at {number / info.fps:g} s, beyond its end")
            if before is not None and due < number:
                pixels = _upright(before, **size)
                for _ in range(due, number):  # shown until the next one
                    yield pixels
                due = number
            # Of frames within one moment, the last is shown.
            before, until = frame, number + max(1, round(_lasts(stream, frame, info)))
        if before is not None and due < until:
            pixels = _upright(before, **size)
            for _ in range(due, until):
                yield pixels


def read_clip(path: str | Path, *, max_bytes: float = math.inf) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """(every frame, frames per second) of a video file, or of an .npz with `video` and `fps` as `save_as` writes.

    All frames are decoded, whatever the header says of their number. Raises UserError for what is no video, has no
    frames or no rate, and when the frames take more than `max_bytes`.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise UserError(f"the video {name!r} does not exist")
    if Path(path).suffix == ".npz":
        return _read_npz(path)
    frames, size = [], {}
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        for frame in container.decode(stream):
            size = size or {"height": frame.height, "width": frame.width}
            frames.append(_upright(frame, **size))
            if len(frames) * frames[0].nbytes > max_bytes:
                height, width = frames[0].shape[:2]
                seconds = max(1, int(len(frames) / 2 / (rate or 24)))
                raise UserError(
                    f"the video {name!r} has more frames of {height}x{width} than the {len(frames)} that memory holds. "
                    f"Split it: ffmpeg -i {name} -f segment -segment_time {seconds} -reset_timestamps 1 part-%03d.mp4"
                )
    if not frames:
        raise UserError(f"the video {name!r} has no frames")
    if not rate > 0:
        raise UserError(f"the video {name!r} does not say its frames per second")
    return np.stack(frames), rate


def _read_npz(path: str | Path) -> tuple[np.ndarray, float]:
    try:
        with Path(path).open("rb") as file, np.load(file) as arrays:
            frames, rate = arrays["video"], float(arrays["fps"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the video {os.fspath(path)!r}: {error}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size or not rate > 0:
        what = f"{frames.dtype} {frames.shape} at {rate:g} fps"
        raise UserError(f"{os.fspath(path)!r} is no video: uint8 (T, H, W, 3) is needed, given {what}")
    return frames, rate


# ---- the contact sheet ----


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "_t _h _w 3"]],
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: int = 6,
) -> Path:
    """Writes a PNG with a row for each video: its caption, below it up to `columns` frames, first to last.

    A caption's own lines stay, long ones are broken.
    """
    if not videos or len(videos) != len(captions):
        raise UserError(f"a contact sheet needs a caption a video; given {len(videos)} and {len(captions)}")
    strips = []
    for video in videos:
        picks = np.unique(np.round(np.linspace(0, len(video) - 1, columns)).astype(int))
        frames = [Image.fromarray(video[i]) for i in picks]
        zoom = max(1, -(-96 // min(frames[0].size)))  # small worlds are shown pixel by pixel
        strips.append([f.resize((f.width * zoom, f.height * zoom), Image.Resampling.NEAREST) for f in frames])
    gap, font = 4, ImageFont.load_default(size=14)
    width = max(sum(f.width + gap for f in strip) for strip in strips) + gap
    broken = max(16, width // 8)
    texts = [
        [line for given in caption.splitlines() for line in textwrap.wrap(given, broken)] or [""]
        for caption in captions
    ]
    heights = [20 * len(text) + strip[0].height + 2 * gap for text, strip in zip(texts, strips)]
    sheet = Image.new("RGB", (width, sum(heights) + gap), (250, 250, 250))
    draw, y = ImageDraw.Draw(sheet), gap
    for text, strip, height in zip(texts, strips, heights):
        for i, line in enumerate(text):
            draw.text((gap, y + 20 * i), line, fill=(20, 20, 20), font=font)
        x = gap
        for frame in strip:
            sheet.paste(frame, (x, y + 20 * len(text)))
            x += frame.width + gap
        y += height
    path = Path(path)
    _save_png(sheet, path)
    return path
