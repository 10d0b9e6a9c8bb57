"""Where clips and stills come from: Moving Shapes, or a folder of videos with captions.

A source answers two questions, `video(index, rng)` and `image(index, rng)`, with uint8 pixels and a caption; with a
`margin`, the image is that much larger than what a batch holds, both ways.
The answer depends on its arguments alone, so that any process can make any example. `len` is how many
different videos there are; the index of `video` and `image` may go beyond it.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from lavie_jax.data import moving_shapes, transforms, video_files
from lavie_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ENDLESS = 2**40
_ATTEMPTS = 8


@runtime_checkable
class Source(Protocol):
    """What the pipeline asks of a source."""

    def __len__(self) -> int: ...

    def video(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "t h w 3"], str]: ...

    def image(
        self, index: int, rng: np.random.Generator, *, margin: int = 0
    ) -> tuple[UInt8[np.ndarray, "h w 3"], str]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingShapes:
    """The small world. `drop`: how often a caption leaves out the size, and how often the background.

    Clips have rates between `slowest_fps` and `fps`. Frames are (height, width) patches of `whole` ones, which are of
    that size where nothing larger is asked for.
    """

    split: str = "train"
    frames: int = 16
    fps: float = 8.0
    slowest_fps: float = 8.0
    height: int = 64
    width: int = 64
    whole: tuple[int, int] = (0, 0)
    drop: float = 0.1
    seed: int = 0

    def __post_init__(self):
        moving_shapes.combinations(self.split)  # raises for an unknown split

    def __len__(self) -> int:
        return _ENDLESS

    def video(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "t h w 3"], str]:
        one_rate = self.slowest_fps == self.fps
        fps = self.fps if one_rate else self.slowest_fps * (self.fps / self.slowest_fps) ** rng.random()
        sample = moving_shapes.clip(
            self.split,
            index + self.seed * _ENDLESS,
            frames=self.frames,
            fps=fps,
            drop=self.drop,
            **self._whole(0),
        )
        return self._patch(sample.pixels, 0, rng), sample.caption

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
        sample = moving_shapes.image(self.split, index + self.seed * _ENDLESS, drop=self.drop, **self._whole(margin))
        return self._patch(sample.pixels[None], margin, rng)[0], sample.caption

    def _whole(self, margin: int) -> dict[str, int]:
        """The size to draw."""
        return {"height": max(self.whole[0], self.height + margin), "width": max(self.whole[1], self.width + margin)}

    def _patch(self, frames: np.ndarray, margin: int, rng: np.random.Generator) -> np.ndarray:
        height, width = self.height + margin, self.width + margin
        if frames.shape[1:3] == (height, width):
            return frames
        return transforms.resize_crop(frames, height=height, width=width, rng=rng, whole=frames.shape[1:3])


@dataclasses.dataclass(frozen=True)
class _Pair:
    path: Path
    caption: str
    room: float = 0.0  # seconds over which a video's window may start


def _pairs(folder: Path, suffixes: tuple[str, ...]) -> tuple[list[_Pair], int]:
    """(files with a caption beside them, sorted by path; how many have none)."""
    if not folder.is_dir():
        raise UserError(f"no folder {os.fspath(folder)!r}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    pairs = []
    for path in files:
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""
        if caption:
            pairs.append(_Pair(path, " ".join(caption.split())))
    return pairs, len(files) - len(pairs)


def _read_image(path: Path) -> np.ndarray:
    """One picture as uint8 (1, H, W, 3)."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))[None]
    except OSError as error:
        raise UserError(f"cannot read the image {os.fspath(path)!r}: {error}") from error


def _of_split(folder: Path, pairs: list[_Pair], split: str, val_fraction: float) -> list[_Pair]:
    """By the hash of the name: a clip stays in its split whatever is added. `val` has one at least."""

    def place(pair: _Pair) -> float:
        name = pair.path.relative_to(folder).as_posix().encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") / 2**64

    places = [place(pair) for pair in pairs]
    limit = max(val_fraction, min(places, default=0.0)) if val_fraction else -1.0
    return [pair for pair, p in zip(pairs, places) if (p <= limit) == (split == "val")]


class VideoFolder:
    """A folder, searched to its depths, of videos with captions: `clip.mp4` beside `clip.txt`.

    `video` is a random window of `frames` at `fps` (None: each file's own rate), scaled until (height, width), and
    `whole`, just fits inside, and cut to (height, width). `image` is one random frame with the clip's caption, or,
    with an `images` folder (`a.jpg` beside `a.txt`), one of its pictures. `val` holds about `val_fraction` of the
    clips, and of the pictures, one at least. Videos without caption, too short, or unreadable are left out, with a
    warning that counts them; UserError when none is left.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        split: str = "train",
        frames: int = 16,
        fps: float | None = 8.0,
        height: int = 320,
        width: int = 512,
        whole: tuple[int, int] = (0, 0),
        images: str | Path | None = None,
        val_fraction: float = 0.05,
        seed: int = 0,
    ):
        if split not in ("train", "val"):
            raise UserError(f"a video folder has the splits train and val; given {split!r}")
        self.frames, self.fps, self.height, self.width, self.whole = frames, fps, height, width, whole
        self.random_place, self.seed = split == "train", seed
        folder = Path(folder)
        pairs, silent = _pairs(folder, VIDEO_SUFFIXES)
        clips = _of_split(folder, self._usable(pairs), split, val_fraction)
        if not clips:
            raise UserError(
                f"no usable pairs for split {split!r} in {os.fspath(folder)!r}: of {len(pairs) + silent} "
                f"videos {silent} have no caption (clip.mp4 needs clip.txt beside it), the rest are in the "
                f"other split, unreadable, or shorter than {frames} frames at "
                f"{'their own rate' if fps is None else f'{fps:g} fps'}"
            )
        if silent:
            logging.warning("%d of %d videos have no caption and are left out", silent, len(pairs) + silent)
        self.clips = clips
        self.pictures: list[_Pair] = []
        if images is not None:
            found = _pairs(Path(images), IMAGE_SUFFIXES)[0]
            self.pictures = _of_split(Path(images), found, split, val_fraction)
            if not self.pictures:
                raise UserError(
                    f"no image for split {split!r} in {os.fspath(images)!r}: {len(found)} have a caption (a.jpg needs "
                    "a.txt beside it), and each split takes one at least"
                )

    def _window(self, info: video_files.VideoInfo) -> float:
        """Seconds from the first frame's time to the last one's."""
        return max(self.frames - 1, 0) / (self.fps or info.fps)

    def _usable(self, pairs: list[_Pair]) -> list[_Pair]:
        def probe(pair: _Pair) -> _Pair | None:
            try:
                info = video_files.video_info(pair.path)
            except UserError as error:
                logging.warning("left out: %s", error)
                return None
            # Where a window may start: up to the last source frame that leaves room for it.
            room = (info.frames - 1) / info.fps - self._window(info)
            return dataclasses.replace(pair, room=max(room, 0.0)) if room > -1e-6 else None

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(tqdm(pool.map(probe, pairs), "videos", len(pairs), disable=len(pairs) < 500, leave=False))
        usable = [pair for pair in found if pair is not None]
        if len(usable) < len(pairs):
            logging.warning("%d of %d videos are too short or unreadable", len(pairs) - len(usable), len(pairs))
        return usable

    def __len__(self) -> int:
        return len(self.clips)

    def _place(self, rng: np.random.Generator) -> np.random.Generator | None:
        return rng if self.random_place else None

    def video(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "t h w 3"], str]:
        def window(clip: _Pair) -> np.ndarray:
            start = clip.room * (rng.random() if self.random_place else 0.5)
            return video_files.read_video(clip.path, frames=self.frames, fps=self.fps, start=start)

        frames, caption = self._first_readable(self.clips, index, "video", window)
        return self._fit(frames, 0, rng), caption

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
        def still(pair: _Pair) -> np.ndarray:
            if self.pictures:
                return _read_image(pair.path)
            return video_files.read_video(pair.path, frames=1, start=pair.room * rng.random())

        frames, caption = self._first_readable(self.pictures or self.clips, index, "image", still)
        return self._fit(frames, margin, rng)[0], caption

    def _first_readable(
        self, pairs: list[_Pair], index: int, kind: str, read: Callable[[_Pair], np.ndarray]
    ) -> tuple[np.ndarray, str]:
        """(frames, caption) of pair `index`, or of one after it: a damaged file must not end a long run."""
        for attempt in range(_ATTEMPTS):
            pair = _shuffled(pairs, index + attempt, kind, self.seed)
            try:
                return read(pair), pair.caption
            except UserError as error:
                logging.warning("skipped: %s", error)
        raise UserError(f"{_ATTEMPTS} files in a row cannot be read, the last is {os.fspath(pair.path)!r}")

    def _fit(self, frames: np.ndarray, margin: int, rng: np.random.Generator) -> np.ndarray:
        size = {"height": self.height + margin, "width": self.width + margin}
        return transforms.resize_crop(frames, **size, rng=self._place(rng), whole=self.whole)


@functools.lru_cache(maxsize=8)
def _permutation(count: int, *key: object) -> np.ndarray:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).permutation(count)


def _shuffled(items: list, index: int, *key: object):
    """Item `index` of an endless stream that goes through all items, in another order each time."""
    epoch, place = divmod(index, len(items))
    return items[int(_permutation(len(items), *key, epoch)[place])]
