"""Reads and writes video files: mp4 by PyAV, gif, png and npz, and contact sheets.

Files are written under a temporary name and renamed at the end, so that a crash leaves no partial file.
"""

import contextlib
import math
import os
import textwrap
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lavie_jax.data.decoding import (
    ClipWindow,
    VideoInfo,
    decode,
    frames_shown,
    info_of,
    label_of,
    numbered_frames,
    opened,
    too_short,
    upright,
)
from lavie_jax.errors import UserError, suggest

FORMATS = ("mp4", "gif", "png", "npz")
NPZ_FPS = 8.0  # of an .npz without a rate


@contextlib.contextmanager
def finished(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, which is renamed to `path` when the block succeeds."""
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


# The same bytes on every machine. In its AVX-512 code, x264's rate control reads uninitialized memory: the same
# frames gave ten different files in one process.
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
    """Writes frames as they arrive to an mp4 (H.264, 4:2:0), without a temporary name; returns their number.

    `options` are libx264's, e.g. {"crf": "18"}. The same frames give the same bytes on every machine.
    """
    import av  # PyAV is needed only to read or write video files

    count = 0
    with av.open(os.fspath(path), "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(65535)
        stream = container.add_stream("libx264", rate=rate, options={**SAME_EVERYWHERE, **options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1  # for the same reason as SAME_EVERYWHERE
        for frame in frames:
            count += 1
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return count


def save_video(frames: UInt8[np.ndarray, "t h w 3"], path: str | Path, *, fps: float) -> Path:
    """Writes an mp4 (H.264, crf 18, 4:2:0) of `frames`; returns its path.

    Raises:
        UserError: a side is odd, which 4:2:0 does not support, or the rate is not above 0.
    """
    frame_count, height, width = frames.shape[:3]
    if not (0 < fps < 65535):
        raise UserError(f"fps must be above 0; given {fps}")
    if frame_count < 1 or height % 2 or width % 2:
        raise UserError(f"an mp4 needs frames with even sides; given {frame_count} of {height}x{width}: use gif or npz")
    path = Path(path)
    with finished(path) as temporary:
        encode(frames, temporary, height=height, width=width, fps=fps, options={"crf": "18"})
    return path


def _save_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    # A gif counts in hundredths of a second: rounding times instead of durations keeps the total length.
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
    """Writes `frames` as `stem` plus the suffix of `format`, one of FORMATS, and returns the path.

    mp4 and gif are lossy; png (a folder of frames, or one file for one frame) and npz (arrays `video` and `fps`) are
    exact.
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
        for stale in path.glob("[0-9][0-9][0-9][0-9].png"):  # of an earlier, longer video
            if int(stale.stem) >= len(frames):
                stale.unlink()
    else:
        raise UserError(f"unknown format {format!r}{suggest(format, FORMATS)}")
    return path


# ---- reading ----


def video_info(source: str | Path | bytes, *, name: str = "") -> VideoInfo:
    """Length and rate from the container's header, without decoding; `name` is for messages about bytes."""
    with opened(source, name) as (container, stream):
        return info_of(container, stream, label_of(source, name))


def read_window(
    source: str | Path | bytes, window: ClipWindow, *, place: float, name: str = ""
) -> UInt8[np.ndarray, "t h w 3"]:
    """Returns the frames of a window that starts at `place`, from 0 for the first possible start to 1 for the last.

    Only the necessary part is decoded.

    Raises:
        UserError: the file cannot be read or is too short.
    """
    with opened(source, name) as (container, stream):
        info = info_of(container, stream, label_of(source, name))
        start = window.room(info) * place
        if start < 0:
            raise too_short(label_of(source, name), f"{window}", info)
        wanted = {"start": start, "frames": window.frames, "rate": window.rate(info)}
        return decode(container, stream, info, **wanted, what=label_of(source, name))


def read_video(
    path: str | Path, *, frames: int | None = None, fps: float | None = None, start: float = 0.0
) -> UInt8[np.ndarray, "t h w 3"]:
    """Returns `frames` frames (default: all) from `start` seconds on, at `fps` (default: the file's own).

    At another rate than the file's, each time gets the frame that is shown then. Only the necessary part is decoded.

    Raises:
        UserError: the file cannot be read or is too short.
    """
    with opened(path) as (container, stream):
        info = info_of(container, stream, label_of(path, ""))
        rate = fps or info.fps
        if frames is None:
            frames = max(1, int((info.frames - 0.5) / info.fps * rate - start * rate) + 1)
        return decode(container, stream, info, start=start, frames=frames, rate=rate, what=label_of(path, ""))


def stored_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a video file as stored, before the rotation in its metadata."""
    with opened(path) as (_, stream):
        return stream.height, stream.width


def shown_size(source: str | Path | bytes, *, name: str = "") -> tuple[int, int]:
    """(height, width) of a video as shown, from its first frame: the header does not contain the rotation."""
    with opened(source, name) as (container, stream):
        for frame in container.decode(stream):
            return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
    raise UserError(f"the video {label_of(source, name)} has no frames")


def each_frame(path: str | Path, *, first: int = 0, shorter_side: int = 0) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields the frames shown at first / fps, (first + 1) / fps, ... to the end; fps is the file's average rate.

    Frames are scaled down until the shorter side has `shorter_side` pixels; 0 keeps their size.

    Raises:
        UserError: the file cannot be read, or is truncated.
    """
    what = label_of(path, "")
    with opened(path) as (container, stream):
        info = info_of(container, stream, what)
        size: dict[str, int] = {}
        due, until, before = first, 0, None
        for number, frame in numbered_frames(container, stream, info, first=first):
            if not size:
                zoom = min(1.0, shorter_side / min(frame.height, frame.width)) if shorter_side else 1.0
                size = {"height": round(frame.height * zoom), "width": round(frame.width * zoom)}
            if number > 2 * info.frames + 100:  # damaged time stamps would repeat one frame for hours
                raise UserError(f"the video {what} has a frame at {number / info.fps:g} s, beyond its end")
            if before is not None and due < number:
                pixels = upright(before, **size)
                for _ in range(due, number):  # shown until the next frame
                    yield pixels
                due = number
            # Of several frames at one index, the last is shown.
            before, until = frame, number + max(1, round(frames_shown(stream, frame, info)))
        if before is not None and due < until:
            pixels = upright(before, **size)
            for _ in range(due, until):
                yield pixels


def read_clip(path: str | Path, *, max_bytes: float = math.inf) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """Returns (all frames, frames per second) of a video file, or of an .npz with the arrays that `save_as` writes.

    They are `video`, uint8 (T, H, W, 3), and `fps`, a number; without `fps`, the rate is NPZ_FPS.

    All frames are decoded, whatever their number in the header.

    Raises:
        UserError: it is not a video, has no frames or no rate, or needs more than `max_bytes`.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise UserError(f"the video {name!r} does not exist")
    if Path(path).suffix.lower() == ".npz":
        return _read_npz(path, max_bytes)
    frames, size = [], {}
    with opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        for frame in container.decode(stream):
            size = size or {"height": frame.height, "width": frame.width}
            frames.append(upright(frame, **size))
            if len(frames) * frames[0].nbytes > max_bytes:
                height, width = frames[0].shape[:2]
                seconds = max(1, int(len(frames) / 2 / (rate or 24)))
                raise UserError(
                    f"the video {name!r} has more frames of {height}x{width} than fit into memory, {len(frames)}. "
                    f"Split it: ffmpeg -i {name} -f segment -segment_time {seconds} -reset_timestamps 1 part-%03d.mp4"
                )
    if not frames:
        raise UserError(f"the video {name!r} has no frames")
    if not rate > 0:
        raise UserError(f"the video {name!r} does not contain its frame rate")
    return np.stack(frames), rate


def _read_npz(path: str | Path, max_bytes: float) -> tuple[np.ndarray, float]:
    name, needs = os.fspath(path), "it needs `video`, uint8 (T, H, W, 3), and may have `fps`, one number above 0"
    try:
        with Path(path).open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise UserError(f"{name!r} is one array, not an .npz of several: {needs}")
            if "video" not in arrays.files:
                raise UserError(f"{name!r} has the arrays {', '.join(arrays.files) or 'none'}; {needs}")
            shape = _npy_shape(arrays, "video")
            if shape is not None and math.prod(shape) > max_bytes:
                raise UserError(f"the video {name!r} of shape {shape} does not fit into memory: store fewer frames")
            frames = arrays["video"]
            rate = np.asarray(arrays["fps"] if "fps" in arrays.files else NPZ_FPS)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read the video {name!r}: {error}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(f"`video` in {name!r} is {frames.dtype} {frames.shape}; {needs}")
    if rate.size != 1 or rate.dtype.kind not in "iuf" or not 0 < float(rate.item()) < math.inf:
        raise UserError(f"`fps` in {name!r} is {rate.tolist()}; {needs}")
    return frames, float(rate.item())


def _npy_shape(arrays: np.lib.npyio.NpzFile, name: str) -> tuple[int, ...] | None:
    """The shape of an array in an .npz, from its header."""
    with arrays.zip.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        return None if read is None else read(file)[0]


# ---- the contact sheet ----


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "_t _h _w 3"]],
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: int = 6,
) -> Path:
    """Writes a PNG with a row for each video: its caption above up to `columns` of its frames, first to last.

    Line breaks in captions are kept, and long lines are wrapped.
    """
    if not videos or len(videos) != len(captions):
        given = f"{len(videos)} videos and {len(captions)} captions"
        raise UserError(f"a contact sheet needs one caption per video; given {given}")
    strips = []
    for video in videos:
        picks = np.unique(np.round(np.linspace(0, len(video) - 1, columns)).astype(int))
        frames = [Image.fromarray(video[i]) for i in picks]
        zoom = max(1, -(-96 // min(frames[0].size)))  # small frames are enlarged, with visible pixels
        strips.append([f.resize((f.width * zoom, f.height * zoom), Image.Resampling.NEAREST) for f in frames])
    gap, font = 4, ImageFont.load_default(size=14)
    width = max(sum(f.width + gap for f in strip) for strip in strips) + gap
    wrap_at = max(16, width // 8)
    texts = [
        [line for line_of_caption in caption.splitlines() for line in textwrap.wrap(line_of_caption, wrap_at)] or [""]
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
