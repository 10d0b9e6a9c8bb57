"""Cuts a video into scenes with PySceneDetect, each with sample frames for the filters."""

import collections
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lavie_jax.data import video_files
from lavie_jax.errors import UserError

SIDE = 224  # pixels of the shorter side of sample frames; CLIP's input size
SAMPLES = 16  # maximum number of samples of a scene, so that memory does not grow with its length
_REACH = 2  # the detector compares a frame with this many on either side
PART_SECONDS = 60  # of a part of a video, about
# Frames before a part after which the detector decides as if it had seen the whole video: those that it compares, each
# with as many repeats as may be withheld, and as many again until the count of a long repetition is right.
_LEAD = 64
# A repeated frame is withheld from the detector, but at most this many in a row: withheld frames wait in memory.
_MAX_REPEATS = 8

WHOLE = (0, sys.maxsize)

INSTALL = 'pip install "lavie_jax[curation]", or -e ".[curation]" in a clone'


@dataclasses.dataclass(frozen=True)
class Scene:
    """Frames `first` to `last` - 1 of a video, with 8 to 16 evenly spaced `samples` (all frames if there are fewer)."""

    first: int
    last: int
    samples: UInt8[np.ndarray, "t h w 3"]


def parts_of(info: video_files.VideoInfo) -> list[tuple[int, int]]:
    """Divides a video into parts of about PART_SECONDS; returns the first frame of each and of the next.

    The end of the last part is open, because the number of frames of a video is not always known exactly.
    """
    count = max(1, round(info.frames / info.fps / PART_SECONDS))
    starts = [round(i * info.frames / count) for i in range(count)]
    return list(zip(starts, [*starts[1:], sys.maxsize]))


def find_scenes(
    path: str | Path, *, threshold: float, part: tuple[int, int] = WHOLE, max_frames: int = 0
) -> Iterator[Scene]:
    """Yields the scenes of a video file in order; a video without cuts is one scene.

    Args:
        threshold: AdaptiveDetector cuts where the change from one frame to the next exceeds the mean of those around
            it by this factor. It misses slow cross-fades and shots of one or two frames.
        part: only scenes that begin within these frames, of `parts_of`. Together, the parts have the scenes of the
            whole.
        max_frames: longer scenes are cut after so many frames. 0 = none are.

    Raises:
        UserError: the file cannot be read to its end, or PySceneDetect is not installed.
    """
    begin, end = part
    index = max(0, begin - _LEAD)
    first, samples = None, _Samples()  # of the current scene; None before the first that begins in the part
    frames = video_files.each_frame(path, first=index, shorter_side=SIDE)
    for frame, is_cut in _mark_cuts(frames, threshold):
        begins = index >= begin and (is_cut or index == 0)
        if first is not None and (begins or index - first == max_frames):
            yield Scene(first, index, samples.stack())
            first, samples = None if begins else index, _Samples()
        if index >= end and (begins or first is None):
            return
        if begins:
            first = index
        if first is not None:
            samples.add(frame)
        index += 1
    if first is not None:
        yield Scene(first, index, samples.stack())
    elif not index:
        raise UserError(f"the video {str(path)!r} has no frames")


class _Samples:
    """Keeps every n-th frame of a stream; n doubles whenever there are too many."""

    def __init__(self):
        self.frames: list[np.ndarray] = []
        self.step, self.seen = 1, 0

    def add(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        if self.seen % self.step == 0:
            if len(self.frames) == SAMPLES:
                self.frames, self.step = self.frames[::2], 2 * self.step
            self.frames.append(frame)
        self.seen += 1

    def stack(self) -> UInt8[np.ndarray, "t h w 3"]:
        return np.stack(self.frames)


def _mark_cuts(frames: Iterable[np.ndarray], threshold: float) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields each frame, and whether a scene begins with it.

    The detector looks two frames ahead, so output lags behind input. It does not see frames that repeat the previous
    one, as streams of variable frame rate contain: next to them, ordinary motion would look like a cut. The first and
    the last frame are repeated beyond the ends, so that cuts close to an end are judged like any other.
    """
    detector, timecode = _detector(threshold)
    cuts: set[int] = set()
    waiting: collections.deque[tuple[np.ndarray, int]] = collections.deque()  # (frame, its number; -1 = withheld)
    shown, repeats, before = 0, 0, None

    def show(frame: np.ndarray) -> None:
        """Gives the detector its next frame and stores the cuts that it finds."""
        nonlocal shown
        # The frame rate given to the time code is irrelevant: cuts are read back as frame numbers.
        detected = detector.process_frame(timecode(shown, 30.0), np.ascontiguousarray(frame[:, :, ::-1]))  # BGR
        cuts.update(cut.frame_num for cut in detected)
        shown += 1

    def decided() -> Iterator[tuple[np.ndarray, bool]]:
        """Yields the waiting frames that the detector has looked past."""
        while waiting and waiting[0][1] < shown - _REACH:
            frame, number = waiting.popleft()
            yield frame, number in cuts

    for frame in frames:
        repeats = repeats + 1 if before is not None and _same(frame, before) else 0
        if 0 < repeats <= _MAX_REPEATS:
            waiting.append((frame, -1))
            continue
        for _ in range(0 if shown else _REACH):
            show(frame)
        waiting.append((frame, shown))
        show(frame)
        before = frame
        yield from decided()
    for _ in range(_REACH if shown else 0):
        show(before)
    yield from decided()


def _same(frame: np.ndarray, before: np.ndarray) -> bool:
    return frame is before or bool(np.abs(frame.astype(np.int16) - before).mean() < 0.5)


def _detector(threshold: float):
    """Returns a new AdaptiveDetector and the class of its time codes."""
    try:
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise UserError(f"scene cuts need PySceneDetect 0.7 or newer: {INSTALL} ({error})") from error
    # No minimum length: short scenes are dropped by a filter, not merged into the next one.
    return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1, window_width=_REACH), FrameTimecode
