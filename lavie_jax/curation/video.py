"""Curates one part of a video: finds the scenes that begin in it, judges each, and encodes the kept ones as clips.

The result of a part is a folder, written under a temporary name and renamed: it is either complete or absent.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lavie_jax.curation import filters, scenes
from lavie_jax.curation.duplicates import PerceptualHash, perceptual_hash
from lavie_jax.curation.filters import Bars, Thresholds
from lavie_jax.curation.inputs import Video, caption_of
from lavie_jax.curation.models import Captioner, Scorer
from lavie_jax.curation.text_lines import text_share
from lavie_jax.data import video_files
from lavie_jax.data.display import UnusableVideo
from lavie_jax.data.records import one_line
from lavie_jax.errors import UserError

RESULT = "result.json"
LATER = "later"  # in place of a captioner: scenes without a given caption are captioned by a later stage
# A fast preset, because encoding dominates the run time. A key frame about every second, because training windows
# start anywhere in a clip.
X264 = {"crf": "18", "preset": "veryfast", "g": "24"}

# In the order in which they are tested. A segment is counted under the first that applies.
REASONS = (
    "unreadable",
    *UnusableVideo.REASONS,
    "low resolution",
    "no caption",
    "short caption",
    "too few frames",
    "near-black",
    "letterbox",
    "static",
    "overlaid text",  # also text of the scene itself, and titles
    "low aesthetic score",
    "near-duplicate",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """The result for one scene from `start` to `end` seconds, or for a whole file dropped without decoding it.

    Attributes:
        reason: why it is dropped, one of REASONS, or "" if it is kept.
        detail: the measured value behind the reason.
        file: the clip, relative to the work folder.
        picture: a small JPEG of the middle of a dropped scene, relative to the work folder.
        samples: sample frames for a captioner that runs later, relative to the work folder.
        height, width: size of the clip, upright and without black bars.
        split: "train" or "val" if clips are held out by name or time; "" if training decides.
        motion, brightness, overlay, text_share, aesthetic: measurements of `filters`, `text_lines` and `models`; None =
            not measured.
    """

    start: float
    end: float
    reason: str = ""
    detail: str = ""
    file: str = ""
    picture: str = ""
    caption: str = ""
    category: str = ""
    frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    motion: float | None = None
    brightness: float | None = None
    overlay: float | None = None
    text_share: float | None = None
    aesthetic: float | None = None
    split: str = ""
    perceptual_hash: PerceptualHash | None = None
    samples: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Cost and yield of a part: decoded seconds, CPU seconds, and numbers of kept and dropped segments."""

    video_seconds: float
    core_seconds: float
    kept: int
    dropped: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a video, the unit of work.

    Attributes:
        index, count: this is part `index` of `count`.
        frames: first frame of the part and of the next, see `scenes.parts_of`.
        seconds: its length, for progress; 0 if the file is unreadable.
    """

    video: Video
    index: int = 0
    count: int = 1
    frames: tuple[int, int] = scenes.WHOLE
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The name of the folder of its result."""
        return result_name(self.video, self.index)


def result_name(video: Video, part: int) -> str:
    """Returns the name of the folder with the result of a part."""
    return f"{video.key}-{part:05d}"


def parts_of(video: Video) -> list[Part]:
    """Divides a video into parts. An unreadable one has one part, whose result says why."""
    try:
        info = video_files.video_info(video.path)
    except UserError:
        return [Part(video)]
    frames = scenes.parts_of(info)
    ends = [first for first, _ in frames[1:]] + [info.frames]
    seconds = [(end - first) / info.fps for (first, _), end in zip(frames, ends)]
    return [Part(video, i, len(frames), *each) for i, each in enumerate(zip(frames, seconds))]


def curate_part(
    part: Part, work: Path, thresholds: Thresholds, *, captioner: Captioner | str | None, scorer: Scorer | None
) -> Summary:
    """Writes the result and the kept clips of a part to its folder in `work`. An unreadable file has a result too.

    With `captioner` = LATER, clips without a given caption are kept with their sample frames.
    """
    began = time.process_time()
    temporary = _temporary(part, work)
    judge = _Judge(part.video, thresholds, captioner, scorer)

    def new_folder() -> Path:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    try:
        segments = list(_write_segments(judge, part, new_folder()))
    except UserError as error:
        reason = error.reason if isinstance(error, UnusableVideo) else "unreadable"
        new_folder()
        # The message must not depend on where the input folder is.
        detail = str(error).replace(os.fspath(part.video.path), part.video.name)
        segments = [Segment(start=0.0, end=0.0, reason=reason, detail=detail)]
    _store(part, segments, temporary, work)
    kept = sum(not segment.reason for segment in segments)
    seconds = sum(segment.end - segment.start for segment in segments if segment.frames)  # decoded files only
    return Summary(seconds, time.process_time() - began, kept, len(segments) - kept)


def drop_part(part: Part, work: Path, detail: str) -> Summary:
    """Stores an unreadable file as the result of a part, whose process crashed or ran out of time."""
    temporary = _temporary(part, work)
    temporary.mkdir(parents=True)
    _store(part, [Segment(start=0.0, end=0.0, reason="unreadable", detail=detail)], temporary, work)
    return Summary(0.0, 0.0, 0, 1)


def _temporary(part: Part, work: Path) -> Path:
    """Returns a name for the folder of an unfinished result, unlike those of other machines."""
    return work / f".{uuid.uuid4().hex[:12]}-{part.name}"


def _store(part: Part, segments: list[Segment], temporary: Path, work: Path) -> None:
    """Completes a result and gives it its name."""
    rows = {"parts": part.count, "segments": [dataclasses.asdict(segment) for segment in segments]}
    (temporary / RESULT).write_text(json.dumps(rows), encoding="utf-8")
    folder = work / part.name
    if read_part(work, part.name) is not None:  # of another machine that was given the same part
        shutil.rmtree(temporary)
        return
    shutil.rmtree(folder, ignore_errors=True)  # a damaged earlier result
    temporary.rename(folder)


def read_result(video: Video, work: Path) -> list[Segment] | None:
    """Returns the segments of a video from the results of its parts, or None if one is missing or incomplete.

    A video with an unreadable part is dropped as a whole: its clips would be those of a damaged file.
    """
    results, parts = [], 1
    while len(results) < parts:
        result = read_part(work, result_name(video, len(results)))
        if result is None:
            return None
        parts, own = result
        results.append(own)
    return join_parts(results)


def join_parts(results: Sequence[list[Segment]]) -> list[Segment]:
    """Returns the segments of a video from those of its parts, in order; only the failure if a part is unreadable."""
    for own in results:
        if failed := [s for s in own if s.reason and not s.end]:
            return failed
    return [segment for own in results for segment in own]


def read_part(work: Path, name: str) -> tuple[int, list[Segment]] | None:
    """Returns the number of parts of a video and the segments of one, or None if they are missing or incomplete."""
    try:
        rows = json.loads((work / name / RESULT).read_text(encoding="utf-8"))
        for row in rows["segments"]:
            row["perceptual_hash"] = PerceptualHash(**row["perceptual_hash"]) if row["perceptual_hash"] else None
        segments = [Segment(**row) for row in rows["segments"]]
        parts = int(rows["parts"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (parts, segments) if all((work / s.file).is_file() for s in segments if not s.reason) else None


def _write_segments(judge: "_Judge", part: Part, folder: Path) -> Iterator[Segment]:
    """Yields every segment of a part in order, and writes the clips of kept ones and pictures of dropped ones."""
    path, want = judge.video.path, judge.thresholds
    info = video_files.video_info(path)
    if info.fps > video_files.MAX_FPS:
        raise UserError(f"the video {judge.video.name!r} claims a rate of {info.fps:g} frames per second")
    whole = Segment(start=0.0, end=info.frames / info.fps, fps=info.fps)
    size = video_files.shown_size(path)
    if dropped := judge.file(whole, size):
        yield from [dropped] * (part.index == 0)
        return
    longest = max(want.min_frames, round(want.max_seconds * info.fps)) if want.max_seconds else 0
    found = scenes.find_scenes(path, threshold=want.cut, part=part.frames, max_frames=longest)
    for number, scene in enumerate(found):
        segment, bars = judge.scene(scene, info.fps, size)
        later = not segment.reason and not segment.caption and judge.captioner == LATER
        if later:
            np.save(folder / f"{number:05d}.npy", bars.cut(scene.samples))
            segment = dataclasses.replace(segment, samples=f"{part.name}/{number:05d}.npy")
        if segment.reason or later:
            picture = folder / f"{number:05d}.jpg"
            Image.fromarray(scene.samples[len(scene.samples) // 2]).save(picture, quality=80)
            segment = dataclasses.replace(segment, picture=f"{part.name}/{picture.name}")
        if segment.reason:
            yield segment
        else:
            clip = folder / f"{number:05d}.mp4"
            written = _write_clip(path, scene, segment, bars, clip, max_height=want.max_height)
            yield dataclasses.replace(written, file=f"{part.name}/{clip.name}")


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Decides which scenes of a video are kept."""

    video: Video
    thresholds: Thresholds
    captioner: Captioner | str | None
    scorer: Scorer | None

    def file(self, whole: Segment, size: tuple[int, int]) -> Segment | None:
        """Returns the file as one dropped segment if none of its scenes can be kept; then it is not decoded."""
        if min(size) < self.thresholds.min_height:
            return dataclasses.replace(whole, reason="low resolution", detail=f"{size[0]}x{size[1]}")
        if self.captioner is None:
            longest = max((caption.text for caption in self.video.captions), key=_word_count, default="")
            return _check_caption(dataclasses.replace(whole, caption=longest), self.thresholds.min_words)
        return None

    def scene(self, scene: scenes.Scene, fps: float, size: tuple[int, int]) -> tuple[Segment, Bars]:
        """Judges a scene.

        Returns:
            The scene with measurements, caption and the reason if it is dropped; and the black bars of its samples.
        """
        want, count = self.thresholds, scene.last - scene.first
        segment = Segment(start=scene.first / fps, end=scene.last / fps, frames=count, fps=fps)

        def dropped(reason: str, detail: str) -> tuple[Segment, Bars]:
            return dataclasses.replace(segment, reason=reason, detail=detail), bars

        bars, frames = Bars(), scene.samples
        if count < want.min_frames:
            return dropped("too few frames", f"{count} frames")
        segment = dataclasses.replace(segment, brightness=filters.brightness(frames))
        if segment.brightness < want.min_brightness:
            return dropped("near-black", f"brightness {segment.brightness:.0f}")
        if want.letterbox != "keep":
            bars = filters.bars(frames)
        if any(bars) and want.letterbox == "drop":
            return dropped("letterbox", "bars of {} + {} rows, {} + {} columns in small frames".format(*bars))
        frames = bars.cut(frames)
        height, width = _size_within(bars, scene.samples.shape[1:3], size)
        if min(height, width) < want.min_height:
            return dropped("low resolution", f"{height}x{width} without black bars")
        segment = dataclasses.replace(
            segment,
            motion=filters.motion(frames),
            overlay=filters.overlay(frames),
            text_share=text_share(filters.gray(frames)),
            perceptual_hash=perceptual_hash(frames),
        )
        if segment.motion < want.min_motion:
            return dropped("static", f"{segment.motion:.2%} of the pixels change")
        if segment.overlay is not None and segment.overlay > want.max_overlay:
            return dropped("overlaid text", f"static marks on {segment.overlay:.1%} of the picture")
        if segment.text_share is not None and segment.text_share > want.max_text:
            return dropped("overlaid text", f"lines of text in {segment.text_share:.0%} of the sample frames")
        return self._caption_and_score(segment, frames), bars

    def _caption_and_score(self, segment: Segment, frames: UInt8[np.ndarray, "t h w 3"]) -> Segment:
        """Adds caption and aesthetic score, and drops the scene for either. The captioner, the slowest, runs last."""
        words = self.thresholds.min_words
        given = caption_of(self.video.captions, start=segment.start, end=segment.end)
        if given is not None:
            segment = dataclasses.replace(segment, caption=given.text, category=given.category)
        if (given is not None or self.captioner is None) and (dropped := _check_caption(segment, words)):
            return dropped
        if self.scorer is not None:
            segment = dataclasses.replace(segment, aesthetic=self.scorer(frames))
            if self.thresholds.min_aesthetic and segment.aesthetic < self.thresholds.min_aesthetic:
                return dataclasses.replace(segment, reason="low aesthetic score", detail=f"{segment.aesthetic:.2f}")
        if given is None and self.captioner == LATER:
            return segment
        if given is None and self.captioner is not None:
            segment = dataclasses.replace(segment, caption=one_line(str(self.captioner(frames))))
        return _check_caption(segment, words) or segment


def _check_caption(segment: Segment, min_words: int) -> Segment | None:
    """Returns the segment as dropped if its caption is missing or too short; else None."""
    if not segment.caption:
        return dataclasses.replace(segment, reason="no caption")
    if _word_count(segment.caption) < min_words:
        return dataclasses.replace(segment, reason="short caption", detail=segment.caption)
    return None


def with_caption(segment: Segment, text: str, thresholds: Thresholds) -> Segment:
    """Returns a segment that was kept for a later captioner with its caption, as kept or dropped."""
    captioned = dataclasses.replace(segment, caption=one_line(text), samples="")
    dropped = _check_caption(captioned, thresholds.min_words)
    if dropped is not None:
        return dataclasses.replace(dropped, file="", height=0, width=0)
    return dataclasses.replace(captioned, picture="")


def _word_count(caption: str) -> int:
    return len(caption.split())


def _write_clip(
    path: Path, scene: scenes.Scene, segment: Segment, bars: Bars, clip: Path, *, max_height: int
) -> Segment:
    """Encodes a scene without its black bars, at full size or at most `max_height` on the shorter side; 0 = full."""
    shorter = 0
    if max_height:  # of the frame with its bars
        rows, columns = scene.samples.shape[1:3]
        inside = min(rows - bars.top - bars.bottom, columns - bars.left - bars.right)
        shorter = max(2, int(max_height * min(rows, columns) / inside))
    frames = itertools.islice(video_files.each_frame(path, first=scene.first, shorter_side=shorter), segment.frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"{os.fspath(path)!r} changed while it was read")
    bars = _at_full_size(bars, scene.samples.shape[1:3], first.shape[:2])
    height, width = bars.cut(first).shape[:2]
    cropped = (bars.cut(frame) for frame in itertools.chain([first], frames))
    count = video_files.encode(cropped, clip, height=height, width=width, fps=segment.fps, options=X264)
    if count != segment.frames:
        raise UserError(f"{os.fspath(path)!r} changed while it was read")
    return dataclasses.replace(segment, height=height, width=width)


def _size_within(bars: Bars, small: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Returns (height, width) of the picture between the bars, at full size."""
    full = _at_full_size(bars, small, size)
    return size[0] - full.top - full.bottom, size[1] - full.left - full.right


def _at_full_size(bars: Bars, small: tuple[int, int], full: tuple[int, int]) -> Bars:
    """Converts bars measured in small frames to pixels of the full frames, leaving a picture with even sides.

    Each bar grows by one small row or column, because its edge may lie within that row.
    """
    (top, bottom, left, right), (rows, columns) = bars, (full[0] / small[0], full[1] / small[1])
    top, bottom = (math.ceil((n + 1) * rows) if n else 0 for n in (top, bottom))
    left, right = (math.ceil((n + 1) * columns) if n else 0 for n in (left, right))
    return Bars(top, bottom + (full[0] - top - bottom) % 2, left, right + (full[1] - left - right) % 2)
