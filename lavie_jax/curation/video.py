"""One video: its scenes, each judged, and those that are kept encoded as clips.

All that is found lies in a folder of its own that gets its name when everything is in it, so a result is whole or not
there at all.
"""

import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lavie_jax.curation import filters, segments
from lavie_jax.curation.duplicates import Fingerprint, fingerprint
from lavie_jax.curation.filters import Bars, Thresholds
from lavie_jax.curation.inputs import Video, caption_of
from lavie_jax.curation.models import Captioner, Scorer
from lavie_jax.data import video_files
from lavie_jax.data.records import one_line
from lavie_jax.errors import UserError

RESULT = "result.json"
MAX_FPS = 250  # a header that says more says nonsense: browsers write 1000
# Fast, as encoding takes most of the time; a key frame a second or so, for training starts anywhere in a clip.
X264 = {"crf": "18", "preset": "veryfast", "g": "24"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A scene, or a whole file that is dropped unseen, from `start` to `end` seconds.

    Attributes:
      reason: why it is dropped, one of REASONS; "" = it is kept. `detail` says what was found.
      file: the clip, in the folder of its video.
      height, width: of the clip, upright, without bars.
      motion, brightness, overlay, aesthetic: as `filters` and `models` measure them; None = not measured.
    """

    start: float
    end: float
    reason: str = ""
    detail: str = ""
    file: str = ""
    caption: str = ""
    category: str = ""
    frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    motion: float | None = None
    brightness: float | None = None
    overlay: float | None = None
    aesthetic: float | None = None
    fingerprint: Fingerprint | None = None


# In the order in which they are tried; the first that applies is counted.
REASONS = (
    "unreadable",
    "low resolution",
    "no caption",
    "short caption",
    "too few frames",
    "near-black",
    "letterbox",
    "static",
    "overlaid text",
    "low aesthetic score",
    "near-duplicate",
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a video cost: seconds of it that were decoded, and seconds that a core worked for it."""

    video_seconds: float
    core_seconds: float
    kept: int
    dropped: int


def curate_video(
    video: Video, work: Path, thresholds: Thresholds, *, captioner: Captioner | None, scorer: Scorer | None
) -> Summary:
    """Writes `work/KEY`: the result and the clips that are kept. What cannot be read is one of the results."""
    began = time.process_time()
    folder, temporary = work / video.key, work / f".{os.getpid()}-{video.key}"
    judge = _Judge(video, thresholds, captioner, scorer)

    def emptied() -> Path:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    try:
        found = list(_clips(judge, emptied()))
    except UserError as error:
        emptied()
        detail = str(error).replace(os.fspath(video.path), video.name)  # the same wherever the folder lies
        found = [Segment(start=0.0, end=0.0, reason="unreadable", detail=detail)]
    rows = [dataclasses.asdict(segment) for segment in found]
    (temporary / RESULT).write_text(json.dumps(rows), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # one that cannot be read back
    temporary.rename(folder)
    kept = sum(not segment.reason for segment in found)
    seconds = sum(segment.end - segment.start for segment in found if segment.frames)  # not of files dropped unseen
    return Summary(seconds, time.process_time() - began, kept, len(found) - kept)


def read_result(folder: Path) -> list[Segment] | None:
    """The segments of a video whose result is in `folder`; None where there is none, or not a whole one."""
    try:
        rows = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        for row in rows:
            row["fingerprint"] = Fingerprint(**row["fingerprint"]) if row["fingerprint"] else None
        found = [Segment(**row) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if all((folder / s.file).is_file() for s in found if not s.reason) else None


def _clips(judge: "_Judge", folder: Path) -> Iterator[Segment]:
    """Every segment of a video, in order; the clips of those that are kept are written."""
    path = judge.video.path
    info = video_files.video_info(path)
    if info.fps > MAX_FPS:
        raise UserError(f"the video {judge.video.name!r} says that it has {info.fps:g} frames a second")
    whole = Segment(start=0.0, end=info.frames / info.fps, fps=info.fps)
    size = video_files.stored_size(path)
    if refused := judge.unseen(whole, size):
        yield refused
        return
    for number, scene in enumerate(segments.find_scenes(path, threshold=judge.thresholds.cut)):
        segment, bars = judge.scene(scene, info.fps, size)
        yield segment if segment.reason else _write(path, scene, segment, bars, folder / f"{number:05d}.mp4")


def _write(path: Path, scene: segments.Scene, segment: Segment, bars: Bars, clip: Path) -> Segment:
    """Encodes a scene at full size, without its bars."""
    frames = itertools.islice(video_files.each_frame(path, first=scene.first), segment.frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"{os.fspath(path)!r} changed while it was read")
    bars = _at_full_size(bars, scene.samples.shape[1:3], first.shape[:2])
    height, width = bars.cut(first).shape[:2]
    cut = (bars.cut(frame) for frame in itertools.chain([first], frames))
    count = video_files.encode(cut, clip, height=height, width=width, fps=segment.fps, options=X264)
    if count != segment.frames:
        raise UserError(f"{os.fspath(path)!r} changed while it was read")
    return dataclasses.replace(segment, file=clip.name, height=height, width=width)


def _at_full_size(bars: Bars, small: tuple[int, int], full: tuple[int, int]) -> Bars:
    """Bars that were found in small frames, in pixels of the full ones; what they leave has even sides.

    A bar takes one small row more: its edge may lie within it.
    """
    (top, bottom, left, right), (rows, columns) = bars, (full[0] / small[0], full[1] / small[1])
    top, bottom = (math.ceil((n + 1) * rows) if n else 0 for n in (top, bottom))
    left, right = (math.ceil((n + 1) * columns) if n else 0 for n in (left, right))
    return Bars(top, bottom + (full[0] - top - bottom) % 2, left, right + (full[1] - left - right) % 2)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Decides what of a video is kept."""

    video: Video
    thresholds: Thresholds
    captioner: Captioner | None
    scorer: Scorer | None

    def unseen(self, whole: Segment, size: tuple[int, int]) -> Segment | None:
        """The whole file as dropped, where nothing in it can be kept: no frame of it is decoded then."""
        if min(size) < self.thresholds.min_height:
            return dataclasses.replace(whole, reason="low resolution", detail=f"{size[0]}x{size[1]}")
        if self.captioner is None:
            longest = max((caption.text for caption in self.video.captions), key=_words, default="")
            return self._without_words(dataclasses.replace(whole, caption=longest))
        return None

    def _without_words(self, segment: Segment) -> Segment | None:
        if not segment.caption:
            return dataclasses.replace(segment, reason="no caption")
        if _words(segment.caption) < self.thresholds.min_words:
            return dataclasses.replace(segment, reason="short caption", detail=segment.caption)
        return None

    def scene(self, scene: segments.Scene, fps: float, size: tuple[int, int]) -> tuple[Segment, Bars]:
        """(the scene, with what was measured and the reason if it is dropped, its bars in the samples)."""
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
        height, width = _inside(bars, scene.samples.shape[1:3], size)
        if min(height, width) < want.min_height:
            return dropped("low resolution", f"{height}x{width} without black bars")
        segment = dataclasses.replace(
            segment, motion=filters.motion(frames), overlay=filters.overlay(frames), fingerprint=fingerprint(frames)
        )
        if segment.motion < want.min_motion:
            return dropped("static", f"{segment.motion:.2%} of the pixels change")
        if segment.overlay is not None and segment.overlay > want.max_overlay:
            return dropped("overlaid text", f"on {segment.overlay:.1%} of the picture")
        return self._told(segment, frames), bars

    def _told(self, segment: Segment, frames) -> Segment:
        """The scene with its caption and score."""
        given = caption_of(self.video.captions, start=segment.start, end=segment.end)
        if given is not None:
            segment = dataclasses.replace(segment, caption=given.text, category=given.category)
        if (given is not None or self.captioner is None) and (dropped := self._without_words(segment)):
            return dropped
        if self.scorer is not None:
            segment = dataclasses.replace(segment, aesthetic=self.scorer(frames))
            if self.thresholds.min_aesthetic and segment.aesthetic < self.thresholds.min_aesthetic:
                return dataclasses.replace(segment, reason="low aesthetic score", detail=f"{segment.aesthetic:.2f}")
        if given is None and self.captioner is not None:
            segment = dataclasses.replace(segment, caption=one_line(str(self.captioner(frames))))
        return self._without_words(segment) or segment


def _inside(bars: Bars, small: tuple[int, int], stored: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the upright picture between the bars."""
    upright = stored
    if (small[0] < small[1]) != (stored[0] < stored[1]) and stored[0] != stored[1]:
        upright = stored[::-1]  # the camera was turned
    full = _at_full_size(bars, small, upright)
    return upright[0] - full.top - full.bottom, upright[1] - full.left - full.right


def _words(caption: str) -> int:
    return len(caption.split())
