"""Where clips and stills come from: Moving Shapes, or records on disk.

A source answers two questions, `video(index, rng)` and `image(index, rng)`, with uint8 pixels and a caption; with a
`margin`, the image is that much larger than what a batch holds, both ways.
The answer depends on its arguments alone, so that any process can make any example. `len` is how many
different videos there are; the index of `video` and `image` may go beyond it.
"""

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16, Int, UInt8
from PIL import Image, ImageOps

from lavie_jax.data import moving_shapes, transforms, video_files
from lavie_jax.data.folders import open_folder
from lavie_jax.data.records import VAL_FRACTION, Medium, Record, Records
from lavie_jax.data.shards import ShardRecords, TFDSRecords
from lavie_jax.data.tars import TarRecords
from lavie_jax.errors import UserError, suggest

KINDS = ("video_folder", "array_record", "tfds", "webdataset")  # of records
ATTEMPTS = 8  # records in a row that may be unreadable
_ENDLESS = 2**40


class Item(NamedTuple):
    """A clip's `pixels` uint8 (T, H, W, 3), or a still's (H, W, 3), with its caption, and what was skipped for it.

    Sets of latents have in their place float16 (T, h, w, 2 C), and encoded captions (L, D): see `latents.py`.
    """

    pixels: UInt8[np.ndarray, "*t h w 3"] | Float16[np.ndarray, "*t h w c"]
    caption: str
    skipped: tuple[str, ...] = ()
    text: Float16[np.ndarray, "l d"] | None = None
    null_text: Float16[np.ndarray, "l d"] | None = None  # that takes its place when the caption is dropped


@runtime_checkable
class Source(Protocol):
    """What the pipeline asks of a source."""

    def __len__(self) -> int: ...

    def video(self, index: int, rng: np.random.Generator) -> Item:
        """Clip `index`, uint8 (T, H, W, 3), with its caption; `rng` draws the place in time and space."""
        ...

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        """Still `index`, uint8 (H + margin, W + margin, 3), with its caption."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingShapes:
    """The small world. `drop`: how often a caption leaves out the size, and how often the background.

    Clips have rates between `slowest_fps` and `fps`; of the stills the share `clip_stills` are frames of clips. All are
    (height, width) patches of `whole` ones, which are of that size where nothing larger is asked for.
    """

    split: str = "train"
    frames: int = 16
    fps: float = 8.0
    slowest_fps: float = 8.0
    clip_stills: float = 0.0
    height: int = 64
    width: int = 64
    whole: tuple[int, int] = (0, 0)
    drop: float = 0.1
    seed: int = 0

    def __post_init__(self):
        moving_shapes.combinations(self.split)  # raises for an unknown split

    def __len__(self) -> int:
        return _ENDLESS

    def video(self, index: int, rng: np.random.Generator) -> Item:
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
        return Item(self._patch(sample.pixels, 0, rng), sample.caption)

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        number, how = index + self.seed * _ENDLESS, {"drop": self.drop, **self._whole(margin)}
        if self.clip_stills and rng.random() < self.clip_stills:
            sample = moving_shapes.clip(self.split, number, frames=1, **how)
            pixels = sample.pixels
        else:
            sample = moving_shapes.image(self.split, number, **how)
            pixels = sample.pixels[None]
        return Item(self._patch(pixels, margin, rng)[0], sample.caption)

    def _whole(self, margin: int) -> dict[str, int]:
        """The size to draw."""
        return {"height": max(self.whole[0], self.height + margin), "width": max(self.whole[1], self.width + margin)}

    def _patch(self, frames: np.ndarray, margin: int, rng: np.random.Generator) -> np.ndarray:
        height, width = self.height + margin, self.width + margin
        if frames.shape[1:3] == (height, width):
            return frames
        return transforms.resize_crop(frames, height=height, width=width, rng=rng, whole=frames.shape[1:3])


def read_image(record: Record) -> UInt8[np.ndarray, "1 h w 3"]:
    """One picture, as a clip of one frame, turned as its camera was held."""
    content = io.BytesIO(record.content) if isinstance(record.content, bytes) else record.content
    try:
        with Image.open(content) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except Exception as error:  # pictures from the web are broken in more ways than Pillow has names for
        raise UserError(f"cannot read the image {record.name!r}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSource:
    """Clips and stills from records on disk.

    `video` is a random window of a clip, scaled until (height, width), and `whole`, just fits inside, and cut to
    (height, width). `image` is one of the `pictures`, or, without, one random frame of a clip with its caption. Places
    in time and space are random, or the middle with `random_place` = False.

    A record that cannot be read, or is too short, is skipped: the next one of the same order is shown in its place. Too
    many in a row are a UserError.
    """

    clips: Records | None = None
    pictures: Records | None = None
    window: video_files.Window
    height: int
    width: int
    whole: tuple[int, int] = (0, 0)
    random_place: bool = True
    seed: int = 0

    def __len__(self) -> int:
        records = self.clips if self.clips is not None else self.pictures
        return 0 if records is None else len(records)

    def video(self, index: int, rng: np.random.Generator) -> Item:
        def read(record: Record) -> Item:
            place = rng.random() if self.random_place else 0.5
            frames = video_files.read_window(record.content, self.window, place=place, name=record.name)
            return Item(self._cut(frames, 0, rng), record.caption)

        return first_readable(self.clips, index, read, kind="video", seed=self.seed)

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        def frame(record: Record) -> np.ndarray:
            one = dataclasses.replace(self.window, frames=1)
            return video_files.read_window(record.content, one, place=rng.random(), name=record.name)

        pictures = self.pictures is not None
        records, decode = (self.pictures, read_image) if pictures else (self.clips, frame)

        def read(record: Record) -> Item:
            return Item(self._cut(decode(record), margin, rng)[0], record.caption)

        return first_readable(records, index, read, kind="image", seed=self.seed)

    def _cut(self, frames: np.ndarray, margin: int, rng: np.random.Generator) -> np.ndarray:
        size = {"height": self.height + margin, "width": self.width + margin}
        return transforms.resize_crop(frames, **size, rng=rng if self.random_place else None, whole=self.whole)


def first_readable(records: Any, index: int, read: Callable[[Any], Item], *, kind: str, seed: int) -> Item:
    """What `read` makes of record `index` in the shuffled order, or of the first after it that can be read.

    `records` have a length and numbers, as `Records` do, and are what `read` takes.
    """
    skipped: list[str] = []
    for attempt in range(ATTEMPTS):
        epoch, place = divmod(index + attempt, len(records))
        try:
            item = read(records[int(_epoch_order(len(records), kind, seed, epoch)[place])])
        except UserError as error:
            skipped.append(str(error))
            continue
        return item._replace(skipped=tuple(skipped))
    raise UserError(f"{ATTEMPTS} records in a row cannot be read; the last: {skipped[-1]}")


def permutation(count: int, *key: object) -> Int[np.ndarray, "count"]:  # noqa: F821
    """0 to `count` - 1 in an order that `key` alone decides."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).permutation(count)


@functools.lru_cache(maxsize=32)  # two epochs for each of 16 parts of a mixture that have different sizes
def _epoch_order(count: int, kind: str, seed: int, epoch: int) -> Int[np.ndarray, "count"]:  # noqa: F821
    """The order of all records, another one each epoch; in half the memory, as there may be ten millions of them."""
    order = permutation(count, kind, seed, epoch)
    return order.astype(np.int32) if count < 2**31 else order


# ---- by kind ----


def open_records(
    kind: str, path: str, *, medium: Medium, split: str, window: video_files.Window, val_fraction: float = VAL_FRACTION
) -> Records:
    """The records of a split at `path`, of one of the KINDS. Raises UserError for what cannot be used."""
    if kind not in KINDS:
        raise UserError(f"unknown data source {kind!r}{suggest(kind, KINDS)}")
    given = {"medium": medium, "split": split, "val_fraction": val_fraction}
    if kind == "array_record":
        return ShardRecords(path, **given)
    if kind == "tfds":
        return TFDSRecords(path, **given)
    if kind == "webdataset":
        return TarRecords(path, **given)

    def long_enough(clip: Path) -> None:
        try:
            info = video_files.video_info(clip)
        except UserError as error:
            raise UserError(f"cannot be read: {error}") from error
        if window.room(info) < 0:
            raise UserError(f"are shorter than {window}: {os.fspath(clip)!r}")

    # Headers of single files are read now; those of clips within shards when they are shown.
    return open_folder(path, **given, check=long_enough if medium == "video" else None)
