"""Scenes of a video, by PySceneDetect, each with sample frames to judge it by."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lavie_jax.data import video_files
from lavie_jax.errors import UserError

SIDE = 224  # pixels of the shorter side of sample frames; what CLIP sees
SAMPLES = 16  # at most so many of a scene are kept at a time, so that its length costs no memory
_REACH = 2  # frames on either side that the detector compares a cut with
_REPEATS = 8  # in a row are not shown to it; the next one is, as frames wait in memory until they are judged

INSTALL = 'pip install "lavie_jax[curation]", or -e ".[curation]" in a clone'


@dataclasses.dataclass(frozen=True)
class Scene:
    """Frames `first` to `last` - 1 of a video, and 8 or more `samples` of them (all, of fewer), evenly spread."""

    first: int
    last: int
    samples: UInt8[np.ndarray, "t h w 3"]


def find_scenes(path: str | Path, *, threshold: float) -> Iterator[Scene]:
    """The scenes of a video file, first to last; without a cut there is one.

    `threshold` is the ratio that makes a cut of AdaptiveDetector: the change from one frame to the next against the
    mean of those around it. It sees neither slow cross-fades nor shots of one or two frames. Raises UserError for what
    cannot be read to its end, and without PySceneDetect.
    """
    first, index, samples = 0, 0, _Samples()
    for frame, is_cut in _marked(video_files.each_frame(path, shorter_side=SIDE), threshold):
        if is_cut and index:
            yield Scene(first, index, samples.stack())
            first, samples = index, _Samples()
        samples.add(frame)
        index += 1
    if not index:
        raise UserError(f"the video {str(path)!r} has no frames")
    yield Scene(first, index, samples.stack())


class _Samples:
    """Of frames that come one at a time, every n-th; n doubles when there are too many."""

    def __init__(self):
        self.frames: list[np.ndarray] = []
        self.step, self.seen = 1, 0

    def add(self, frame: np.ndarray) -> None:
        if self.seen % self.step == 0:
            if len(self.frames) == SAMPLES:
                self.frames, self.step = self.frames[::2], 2 * self.step
            self.frames.append(frame)
        self.seen += 1

    def stack(self) -> UInt8[np.ndarray, "t h w 3"]:
        return np.stack(self.frames)


def _marked(frames: Iterable[np.ndarray], threshold: float) -> Iterator[tuple[np.ndarray, bool]]:
    """Each frame, and whether a scene begins with it.

    The detector looks two frames ahead, so frames come out later than they go in. Frames that repeat the one before,
    as streams of varying rate have, are not shown to it: among them, plain motion would look like a cut. The first and
    the last frame are shown once more on their outer side, so that a cut close to an end is judged like any other.
    """
    detector, timecode = _detector(threshold)
    cuts: set[int] = set()
    waiting: collections.deque[tuple[np.ndarray, int]] = collections.deque()  # with numbers; -1 = not shown
    shown, repeats, before = 0, 0, None

    def show(frame: np.ndarray) -> None:
        nonlocal shown
        found = detector.process_frame(timecode(shown, 30.0), np.ascontiguousarray(frame[:, :, ::-1]))  # BGR
        cuts.update(cut.frame_num for cut in found)  # the rate is no matter: frames are counted
        shown += 1

    def decided() -> Iterator[tuple[np.ndarray, bool]]:
        while waiting and waiting[0][1] < shown - _REACH:
            frame, number = waiting.popleft()
            yield frame, number in cuts

    for frame in frames:
        repeats = repeats + 1 if before is not None and _same(frame, before) else 0
        if 0 < repeats <= _REPEATS:
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
    """(a fresh AdaptiveDetector, the class of its time codes)."""
    try:
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise UserError(f"scene cuts need PySceneDetect 0.7 or newer: {INSTALL} ({error})") from error
    # Scenes may be short: those of fewer frames than are wanted are dropped, not glued to the next.
    return AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1, window_width=_REACH), FrameTimecode
