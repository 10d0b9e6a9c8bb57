"""Folders of videos made by any tool: video files, .npz, and folders of numbered frames, in natural order of names."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import UInt8

from lavie_jax.data import moving_shapes, video_files
from lavie_jax.data.files import LeftOut, walk
from lavie_jax.data.records import SUFFIXES
from lavie_jax.data.sources import read_picture
from lavie_jax.disk import file_hash
from lavie_jax.errors import UserError, suggest
from lavie_jax.evaluation.protocols import MAX_RATE_DIFFERENCE, ClipKnobs

VIDEOS, IMAGES = (*SUFFIXES["video"], ".npz"), SUFFIXES["image"]
UNFINISHED = ".state.npz"  # sample.py's state of an interrupted stage
WORLD = "moving_shapes"  # `moving_shapes:SPLIT:COUNT` is a set of true clips
WORLD_SPLITS = ("val", "held_out", "image_only")
WORLD_SIZE = {"height": 64, "width": 64, "frames": 16, "fps": 8.0}


def natural(text: str) -> list:
    """Returns a sort key by which "clip10" follows "clip9"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text.lower())]


@dataclasses.dataclass(frozen=True)
class Video:
    """A video of a set.

    Attributes:
        name: path below the set's folder, without ending.
        path: the file, the folder of the frames, or None for a clip of Moving Shapes.
        index: of the clip of Moving Shapes in its split.
    """

    name: str
    path: Path | None
    index: int = 0
    split: str = ""

    def digest(self) -> str:
        """Returns a hash of the content, by which its features are stored."""
        if self.path is None:
            return hashlib.sha256(f"{WORLD} {self.split} {self.index}".encode()).hexdigest()
        if self.path.is_file():
            return file_hash(self.path)
        parts = "".join(f"{file.name} {file_hash(file)}\n" for file in _frames_of(self.path))
        return hashlib.sha256(parts.encode()).hexdigest()

    def length(self) -> tuple[int, float | None]:
        """Returns (frames, frames per second); the rate of a folder of frames is None."""
        if self.path is None:
            return WORLD_SIZE["frames"], WORLD_SIZE["fps"]
        if self.path.is_dir():
            return len(_frames_of(self.path)), None
        if not self._seekable():
            frames, rate = video_files.read_clip(self.path)
            return len(frames), rate
        info = video_files.video_info(self.path)
        return info.frames, info.fps

    def rate(self) -> float | None:
        """Returns the frames per second; None for a folder of frames, which has no rate."""
        return self.length()[1]

    def check(self, knobs: ClipKnobs) -> None:
        """Raises UserError unless the video has `knobs.clips_per_video` different clips; decodes nothing."""
        room = self._room(knobs, *self.length())
        if (different := int(room + 1e-6) + 1) < knobs.clips_per_video:
            raise UserError(
                f"{self.path or self.name} has {different} different clips of {knobs.frames} frames, and "
                f"--clips-per-video asks for {knobs.clips_per_video}: repeated clips would be counted as others"
            )

    def check_length(self, frames: int | None) -> None:
        """Raises UserError unless the video has `frames` frames."""
        if frames is not None and (count := self.length()[0]) < frames:
            raise self._too_short(frames, count)

    def read(self, frames: int | None = None) -> UInt8[np.ndarray, "t h w 3"]:
        """Returns the first `frames` frames, or all."""
        partly = frames is not None and self._seekable()
        clip = video_files.read_video(self.path, frames=frames) if partly else self._all()
        if frames is not None and len(clip) < frames:
            raise self._too_short(frames, len(clip))
        return clip[:frames]

    def clip(self, knobs: ClipKnobs, part: int) -> UInt8[np.ndarray, "t h w 3"]:
        """Returns the frames of one clip of the video; `part` counts from 0 to `clips_per_video` - 1."""
        if self._seekable():
            count, rate = self.length()
            first = self._first(knobs, part, self._room(knobs, count, rate))
            return video_files.read_video(self.path, frames=knobs.frames, fps=knobs.fps, start=first / rate)
        clip, rate = self._all(), self.rate()
        first = self._first(knobs, part, self._room(knobs, len(clip), rate))
        step = 1.0 if knobs.fps is None else rate / knobs.fps
        return clip[np.floor(first + np.arange(knobs.frames) * step + 1e-3).astype(int)]

    def _room(self, knobs: ClipKnobs, frames: int, rate: float | None) -> float:
        """Returns by how many frames a clip's start can move. Raises UserError if there is no clip."""
        if knobs.fps is not None and rate is None:
            raise UserError(f"{self.path} is a folder of frames, which has no rate: give no --fps")
        step = 1.0 if knobs.fps is None else rate / knobs.fps
        room = frames - 1 - (knobs.frames - 1) * step
        if room < -1e-6:
            raise self._too_short(knobs.frames, frames, knobs.fps and (knobs.fps, rate))
        return max(room, 0.0)

    def _first(self, knobs: ClipKnobs, part: int, room: float) -> float:
        """Returns the position of a clip's first frame, from 0 to `room`; a whole number at the video's own rate."""
        if knobs.start == "random":
            seed = int.from_bytes(hashlib.sha256(f"{knobs.seed} {part} {self.name}".encode()).digest()[:8], "big")
            place = float(np.random.default_rng(seed).random())
            return place * room if knobs.fps else np.floor(place * (round(room) + 1))  # all starts are equally likely
        place = 0.5 if knobs.start == "middle" else 0.0
        if knobs.clips_per_video > 1:
            place = part / (knobs.clips_per_video - 1)
        return place * room if knobs.fps else np.floor(place * room + 1e-6)

    def _seekable(self) -> bool:
        return self.path is not None and self.path.is_file() and self.path.suffix.lower() != ".npz"

    def _all(self) -> UInt8[np.ndarray, "t h w 3"]:
        if self.path is None:
            return moving_shapes.clip(self.split, self.index, **WORLD_SIZE).pixels
        if self.path.is_dir():
            frames = [read_picture(file) for file in _frames_of(self.path)]
            if len({frame.shape for frame in frames}) > 1:
                raise UserError(f"{self.path} has frames of different sizes")
            return np.stack(frames)
        return video_files.read_clip(self.path, warn=lambda line: None)[0]

    def _too_short(self, wanted: int, given: int, rates: tuple[float, float] | None = None) -> UserError:
        wanted_at, given_at = ("", "") if rates is None else (f" at {rate:g} fps" for rate in rates)
        needed = f"{wanted} frames{wanted_at} are needed, and it has {given}{given_at}"
        return UserError(f"{self.path or self.name} is too short: {needed}")


def _frames_of(folder: Path) -> list[Path]:
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGES and not f.name.startswith(".")]
    return sorted(files, key=lambda file: natural(file.name))


def find_videos(source: str, flag: str) -> list[Video]:
    """Returns the videos of a set, in natural order of their names.

    Args:
        source: a folder, searched recursively, or `moving_shapes:SPLIT:COUNT`. A folder of image files is one video,
            unless it also has video files; then its images are contact sheets or the like. They are left out with a
            warning, and so are single images.
        flag: the command-line flag, for messages.

    Raises:
        UserError: there are none.
    """
    if source.partition(":")[0] == WORLD:
        return _true_clips(source, flag)
    folder = Path(source)
    if folder.is_file():
        raise UserError(f"{flag} {folder} is a file: give the folder of the videos")
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} does not exist: give a folder of videos, or {WORLD}:SPLIT:COUNT")
    dropped, files, frames = LeftOut(), [], {}
    for path in walk(folder, dropped, VIDEOS):
        if path.name.endswith(UNFINISHED):
            continue
        if path.suffix.lower() in VIDEOS:
            files.append(path)
        elif path.suffix.lower() in IMAGES:
            frames.setdefault(path.parent, []).append(path)
    total = len(dropped) + len(files) + sum(map(len, frames.values()))
    with_videos = {path.parent for path in files}
    videos = [Video(path.relative_to(folder).with_suffix("").as_posix(), path) for path in files]
    for path, own in frames.items():
        if path in with_videos or len(own) == 1:
            for image in own:
                dropped.add("are images beside videos" if path in with_videos else "are single images", image)
        else:
            name = folder.resolve().name if path == folder else path.relative_to(folder).as_posix()
            videos.append(Video(name, path))
    dropped.warn(total)
    if not videos:
        raise UserError(f"{flag} {folder} has no videos: {', '.join(VIDEOS)}, or folders of {', '.join(IMAGES)}")
    videos.sort(key=lambda video: (natural(video.name), video.name))
    if twice := next((a.name for a, b in zip(videos, videos[1:]) if a.name == b.name), None):
        raise UserError(f"{flag} {folder} has {twice} in several formats: keep one of them")
    return videos


def _true_clips(source: str, flag: str) -> list[Video]:
    _, _, rest = source.partition(":")
    split, _, count = rest.partition(":")
    if split not in WORLD_SPLITS:
        raise UserError(f"{flag} {source}: unknown split {split!r}{suggest(split, WORLD_SPLITS)}")
    if not count.isdigit() or not 1 <= int(count) <= 1_000_000:
        raise UserError(f"{flag} {source}: write {WORLD}:{split}:COUNT, such as {WORLD}:{split}:256")
    return [Video(f"{split}-{i}", None, i, split) for i in range(int(count))]


def check_rates(
    sets: dict[str, Sequence[Video]], knobs: ClipKnobs, known: dict[str, list[float]] | None = None
) -> dict[str, list[float]]:
    """Returns the rates of each set, rounded, and refuses to mix them unless the knobs allow it.

    Clips of a model at 8 fps and of a film at 24 fps would be compared as if the film were three times slower.

    Args:
        sets: {flag: videos}.
        knobs: the settings.
        known: {flag: rates} of sets whose videos are not at hand.
    """
    rates = dict(known or {})
    for flag, videos in sets.items():
        own = {video.rate() for video in videos}
        rates[flag] = sorted({round(rate, 2) for rate in own if rate is not None})
    every = sorted({rate for own in rates.values() for rate in own})
    if knobs.fps is None and not knobs.mixed_rates and every and every[-1] > every[0] * (1 + MAX_RATE_DIFFERENCE):
        listed = "; ".join(f"{flag}: {', '.join(f'{r:g}' for r in own[:5])}" for flag, own in rates.items() if own)
        raise UserError(
            f"the videos have different rates ({listed} fps): give --fps for all, or --mixed-rates to compare "
            "them frame by frame"
        )
    return rates


def choose(videos: Sequence[Video], knobs: ClipKnobs, flag: str) -> list[tuple[Video, int]]:
    """Returns the (video, part) of every clip to measure."""
    every = [(video, part) for video in videos for part in range(knobs.clips_per_video)]
    if knobs.clips is None or knobs.clips == len(every):
        return every
    if knobs.clips > len(every):
        raise too_few(flag, len(every), knobs.clips)
    order = np.random.default_rng(knobs.seed).permutation(len(every))[: knobs.clips]
    return [every[i] for i in sorted(order)]


def too_few(flag: str, count: int, clips: int) -> UserError:
    """Returns the error for a set of fewer clips than `--clips`."""
    return UserError(
        f"{flag} has {count} clips, and --clips asks for {clips}. Fewer clips bias FVD upwards; "
        f"--clips {count} gives a value that compares only with others of {count} clips"
    )


def check_clips(clips: Sequence[tuple[Video, int]], knobs: ClipKnobs) -> None:
    """Raises UserError for a video that lacks one of the clips, before the first is computed."""
    for video in {video.path or video.name: video for video, _ in clips}.values():
        video.check(knobs)


def paired(samples: Sequence[Video], reference: Sequence[Video]) -> list[tuple[Video, Video]]:
    """Pairs each sample with the reference of the same name, or, where no names agree, of the same position.

    Raises:
        UserError: samples without a reference.
    """
    by_name = {video.name: video for video in reference}
    shared = [video for video in samples if video.name in by_name]
    if not shared:
        if len(samples) != len(reference):
            raise UserError(
                f"no names of --samples and --reference agree, and they have {len(samples)} and {len(reference)} "
                "videos: name each pair equally"
            )
        logging.warning(
            "no names of --samples and --reference agree: paired by position, %s with %s first",
            samples[0].name, reference[0].name,
        )  # fmt: skip
        return list(zip(samples, reference))
    if missing := [video.name for video in samples if video.name not in by_name]:
        raise UserError(f"{len(missing)} samples have no reference of the same name: {', '.join(missing[:5])}")
    if others := len(reference) - len(samples):
        logging.warning("%d of %d videos of --reference have no sample, and are left out", others, len(reference))
    return [(video, by_name[video.name]) for video in samples]


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Yields consecutive parts of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
