"""Reads and writes video files: mp4 by PyAV, gif, png and npz.

Files are written under a temporary name and renamed at the end, so that a crash leaves no partial file.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from lavie_jax.data.decoding import (
    MAX_FPS as MAX_FPS,
)
from lavie_jax.data.decoding import (
    ClipWindow,
    VideoInfo,
    decode,
    frames_shown,
    info_of,
    label_of,
    numbered_frames,
    opened,
    timed_frames,
    too_short,
)
from lavie_jax.data.display import BT709, FULL, LIMITED, Screen, check_frame, check_header, declares_field_order
from lavie_jax.data.embedded import Metadata, add_xmp_to_gif, add_xmp_to_mp4
from lavie_jax.data.frame_times import constant_rate
from lavie_jax.data.npz_files import read_npz
from lavie_jax.disk import new_file
from lavie_jax.errors import UserError, suggest, user_path

FORMATS = ("mp4", "gif", "png", "npz")


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
    tags: Mapping[str, str] | None = None,
) -> int:
    """Writes frames as they arrive to an mp4 (H.264, 4:2:0), without a temporary name; returns their number.

    `options` are libx264's, e.g. {"crf": "18"}; `tags` are texts such as "title" and "comment".
    The same frames give the same bytes on every machine.
    """
    import av  # PyAV is needed only to read or write video files
    from av.video.reformatter import Interpolation

    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND
    count = 0
    with av.open(os.fspath(path), "w", format="mp4") as container:
        container.metadata.update(tags or {})
        rate = Fraction(fps).limit_denominator(65535)
        stream = container.add_stream("libx264", rate=rate, options={**SAME_EVERYWHERE, **options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1  # for the same reason as SAME_EVERYWHERE
        # Players guess the matrix of untagged files: BT.601 for small videos, BT.709 for large ones.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        colours = {"dst_colorspace": BT709, "dst_color_range": LIMITED, "src_color_range": FULL}
        for frame in frames:
            count += 1
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = rgb.reformat(format="yuv420p", interpolation=exact, threads=1, **colours)
            for packet in stream.encode(yuv):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return count


def save_video(
    frames: UInt8[np.ndarray, "t h w 3"], path: str | Path, *, fps: float, metadata: Metadata | None = None
) -> Path:
    """Writes an mp4 (H.264, crf 18, 4:2:0) of `frames`; returns its path.

    Raises:
        UserError: a side is odd, which 4:2:0 does not support, or the rate is not above 0.
    """
    frame_count, height, width = frames.shape[:3]
    _check_rate(fps)
    if frame_count < 1 or height % 2 or width % 2:
        raise UserError(f"an mp4 needs frames with even sides; given {frame_count} of {height}x{width}: use gif or npz")
    path = user_path(path)
    with new_file(path) as temporary:
        tags = metadata.tags if metadata else {}
        encode(frames, temporary, height=height, width=width, fps=fps, options={"crf": "18"}, tags=tags)
        if metadata:
            add_xmp_to_mp4(temporary, metadata.xmp)
    return path


def _check_rate(fps: float) -> None:
    if not (0 < fps < 65535):
        raise UserError(f"fps must be above 0; given {fps}")


def _save_gif(frames: np.ndarray, path: Path, fps: float, metadata: Metadata | None) -> None:
    # Durations in a gif are hundredths of a second: rounding times instead of durations keeps the total length.
    times = np.round(np.arange(len(frames) + 1) * 100 / fps).astype(int) * 10
    with new_file(path) as temporary:
        Image.fromarray(frames[0]).save(
            temporary,
            format="gif",
            save_all=True,
            append_images=(Image.fromarray(frame) for frame in frames[1:]),
            duration=np.maximum(np.diff(times), 20).tolist(),
            loop=0,
            disposal=1,
            **({"comment": metadata.comment.encode()} if metadata and metadata.comment else {}),
        )
        if metadata:
            add_xmp_to_gif(temporary, metadata.xmp)


def save_png(image: np.ndarray | Image.Image, path: Path, metadata: Metadata | None = None) -> None:
    """Writes a picture, uint8 (H, W, 3) or Pillow's, as a png."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with new_file(path) as temporary:
        image.save(temporary, format="png", pnginfo=metadata and metadata.png_chunks())


def save_as(
    frames: UInt8[np.ndarray, "t h w 3"],
    stem: str | Path,
    format: str,
    *,
    fps: float,
    metadata: Metadata | None = None,
) -> Path:
    """Writes `frames` as `stem` plus the suffix of `format`, one of FORMATS, and returns the path.

    mp4 and gif are lossy; png (a folder of frames, or one file for one frame) and npz (arrays `video` and `fps`) are
    exact. npz has no `metadata`. Raises UserError for odd sides of an mp4, and for a rate that is not above 0.
    """
    _check_rate(fps)
    path = Path(f"{os.fspath(stem)}.{format}")
    if format == "mp4":
        save_video(frames, path, fps=fps, metadata=metadata)
    elif format == "gif":
        _save_gif(frames, path, fps, metadata)
    elif format == "npz":
        with new_file(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, video=frames, fps=np.float64(fps))
    elif format == "png" and len(frames) == 1:
        save_png(frames[0], path, metadata)
    elif format == "png":
        path = Path(stem)
        for i, frame in enumerate(frames):
            save_png(frame, path / f"{i:04d}.png", metadata)
        for stale in path.glob("[0-9][0-9][0-9][0-9].png"):  # of an earlier, longer video
            if int(stale.stem) >= len(frames):
                stale.unlink()
    else:
        raise UserError(f"unknown format {format!r}{suggest(format, FORMATS)}")
    return path


# ---- reading ----


def video_info(source: str | Path | bytes, *, name: str = "") -> VideoInfo:
    """Returns the length and rate of what can be shown; `name` is for messages about bytes.

    Decodes nothing, or only the first frame if the header does not state whether frames are interlaced.

    Raises:
        UserError: the file cannot be read, or is HDR or interlaced.
    """
    what = label_of(source, name)
    with opened(source, name) as (container, stream):
        info = info_of(container, stream, what)
        if not declares_field_order(stream):
            for _, frame in numbered_frames(container, stream, info, first=0, what=what):
                check_frame(frame, what)
                break
        return info


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

    At another rate than the file's, the frame on screen at each time is returned. Only the necessary part is decoded.

    Raises:
        UserError: the file cannot be read or is too short.
    """
    with opened(path) as (container, stream):
        info = info_of(container, stream, label_of(path, ""))
        rate = fps or info.fps
        if frames is None:
            frames = max(1, int((info.frames - 0.5) / info.fps * rate - start * rate) + 1)
        return decode(container, stream, info, start=start, frames=frames, rate=rate, what=label_of(path, ""))


def shown_size(source: str | Path | bytes, *, name: str = "") -> tuple[int, int]:
    """(height, width) of a video as shown, from its first frame: the header does not contain the rotation."""
    what = label_of(source, name)
    with opened(source, name) as (container, stream):
        check_header(stream, what)
        for frame in container.decode(stream):
            return Screen(stream, what).shown_size(frame)
    raise UserError(f"the video {what} has no frames")


def each_frame(path: str | Path, *, first: int = 0, shorter_side: int = 0) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields the frames shown at first / fps, (first + 1) / fps, ... to the end; fps is the file's average rate.

    Frames are scaled down until the shorter side has `shorter_side` pixels; 0 keeps their size.

    Raises:
        UserError: the file cannot be read, or is truncated.
    """
    what = label_of(path, "")
    with opened(path) as (container, stream):
        info = info_of(container, stream, what)
        pixels_of = Screen(stream, what, shorter_side=shorter_side)
        due, until, before = first, 0, None
        for number, frame in numbered_frames(container, stream, info, first=first, what=what):
            if number > 2 * (stream.frames or info.frames) + 100:  # damaged time stamps could repeat a frame for hours
                raise UserError(f"the video {what} has a frame at {number / info.fps:g} s, beyond its end")
            if before is not None and due < number:
                pixels = pixels_of(before)
                for _ in range(due, number):  # shown until the next frame
                    yield pixels
                due = number
            # Of several frames at one index, the last is shown.
            before, until = frame, number + max(1, round(frames_shown(stream, frame, info)))
        if before is not None and due < until:
            pixels = pixels_of(before)
            for _ in range(due, until):
                yield pixels


def read_clip(
    path: str | Path, *, max_bytes: float = math.inf, warn: Callable[[str], None] = logging.warning
) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """Returns (all frames, frames per second) of a video file, or of an .npz with the arrays that `save_as` writes.

    They are `video`, uint8 (T, H, W, 3), and `fps`, a number; without `fps`, the rate is `npz_files.FPS`.

    A variable frame rate is resampled to a constant one, so that each frame is the one on screen at its time.

    Args:
        path: the file.
        max_bytes: memory for the frames.
        warn: is called with a line about each thing that is lost: sound, frames that are shown too briefly.

    Raises:
        UserError: it is not a video, has no frames or no rate, is HDR or interlaced, or needs more than `max_bytes`.
    """
    path = user_path(path)
    name = os.fspath(path)
    if not path.is_file():
        raise UserError(f"the video {name!r} does not exist")
    if path.suffix.lower() == ".npz":
        return read_npz(path, max_bytes)
    frames, times, ends = [], [], []
    with opened(path) as (container, stream):
        info = info_of(container, stream, repr(name))

        def check_memory(count: int, fps: float) -> None:
            """Refuses clips of more frames than fit into memory."""
            height, width = frames[0].shape[:2]
            if count * frames[0].nbytes > max_bytes:
                seconds = max(1, int(max_bytes / frames[0].nbytes / 2 / fps))
                raise UserError(
                    f"the video {name!r} has more frames of {height}x{width} than fit into memory, {count}. "
                    f"Split it: ffmpeg -i {name} -f segment -segment_time {seconds} -reset_timestamps 1 part-%03d.mp4"
                )

        pixels_of = Screen(stream, repr(name))
        for time, end, frame in timed_frames(container, stream, info, repr(name)):
            frames.append(pixels_of(frame))
            times.append(time)
            ends.append(end)
            check_memory(len(frames), info.fps)
        if not frames:
            raise UserError(f"the video {name!r} has no frames")
        if container.streams.audio:
            warn(f"the sound of {name!r} is not kept")
        shown, rate = constant_rate(np.array(times), ends[-1], info.fps)
        check_memory(len(shown), rate)
    if not np.array_equal(shown, np.arange(len(frames))):
        lost = len(frames) - len(np.unique(shown))
        note = f"; {lost} of its {len(frames)} frames are shown too briefly and are left out" if lost else ""
        warn(f"the frame times of {name!r} vary: it is shown as {len(shown)} frames at {rate:g} fps{note}")
    return np.stack([frames[i] for i in shown]), rate
