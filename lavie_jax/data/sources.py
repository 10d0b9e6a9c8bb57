"""Data sources of clips and images: Moving Shapes, or records on disk.

A source has `video(index, rng)` and `image(index, rng)`, which return uint8 pixels and a caption. They depend only
on their arguments, so that any process can compute any example. `len` is the number of different videos; an index may
exceed it.
"""

import dataclasses
import functools
import hashlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16, Int, UInt8
from PIL import Image, ImageOps

from lavie_jax.data import moving_pairs, moving_shapes, transforms, video_files
from lavie_jax.data.display import UnusableVideo, picture_pixels
from lavie_jax.data.downloads import local_data
from lavie_jax.data.folders import open_folder
from lavie_jax.data.records import SUFFIXES, VAL_FRACTION, Medium, Record, Records
from lavie_jax.data.shards import ShardRecords, TFDSRecords
from lavie_jax.data.tars import TarRecords
from lavie_jax.errors import UserError, suggest, user_location

KINDS = ("video_folder", "array_record", "tfds", "webdataset")  # of records
ATTEMPTS = 8  # to read a record: after as many unreadable ones in a row, the run stops
_ENDLESS = 2**40
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # other formats have pages, layers or thumbnails


class Skipped(NamedTuple):
    """A record that could not be used, and why. Its message may contain a random time, so records are counted."""

    record: str
    error: str


class Item(NamedTuple):
    """A clip's `pixels` uint8 (T, H, W, 3), or an image's (H, W, 3), its caption, and the records skipped before it.

    Sets of latents have float16 (T, h, w, 2 C) instead of pixels, and encoded captions (L, D): see `latents.py`.
    """

    pixels: UInt8[np.ndarray, "*t h w 3"] | Float16[np.ndarray, "*t h w c"]
    caption: str
    skipped: tuple[Skipped, ...] = ()
    text: Float16[np.ndarray, "l d"] | None = None
    null_text: Float16[np.ndarray, "l d"] | None = None  # replaces `text` when the caption is dropped


@runtime_checkable
class Source(Protocol):
    """The interface of a data source."""

    def __len__(self) -> int: ...

    def video(self, index: int, rng: np.random.Generator) -> Item:
        """Returns clip `index`, uint8 (T, H, W, 3), and its caption; `rng` chooses the start and the crop."""
        ...

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        """Returns image `index`, uint8 (H + margin, W + margin, 3), and its caption."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingShapes:
    """Moving Shapes, rendered on demand.

    Attributes:
        split: one of `moving_shapes.SPLITS`.
        frames: frames of a clip.
        fps: the highest frame rate.
        slowest_fps: the lowest frame rate.
        images_from_clips: fraction of the images that are frames of clips.
        height: of the patch that is returned.
        width: of the patch that is returned.
        whole: (height, width) of the rendered frame, if it is larger than the patch.
        drop: probability that a caption omits the size, and likewise the background.
        objects: 1, or 2 for `moving_pairs`.
        seed: selects a disjoint range of indices.
    """

    split: str = "train"
    frames: int = 16
    fps: float = 8.0
    slowest_fps: float = 8.0
    images_from_clips: float = 0.0
    height: int = 64
    width: int = 64
    whole: tuple[int, int] = (0, 0)
    drop: float = 0.1
    objects: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.objects == 2:
            moving_pairs.check_split(self.split)
        else:
            moving_shapes.combinations(self.split)  # raises for an unknown split

    @property
    def _world(self):
        return moving_pairs if self.objects == 2 else moving_shapes

    def __len__(self) -> int:
        return _ENDLESS

    def video(self, index: int, rng: np.random.Generator) -> Item:
        """Renders clip `index`; `rng` chooses the frame rate and the patch."""
        one_rate = self.slowest_fps == self.fps
        fps = self.fps if one_rate else self.slowest_fps * (self.fps / self.slowest_fps) ** rng.random()
        sample = self._world.clip(
            self.split,
            index + self.seed * _ENDLESS,
            frames=self.frames,
            fps=fps,
            drop=self.drop,
            **self._whole(0),
        )
        return Item(self._patch(sample.pixels, 0, rng), sample.caption)

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        """Renders image `index`, or, for a fraction that `rng` chooses, a frame of a clip."""
        number, how = index + self.seed * _ENDLESS, {"drop": self.drop, **self._whole(margin)}
        if self.images_from_clips and rng.random() < self.images_from_clips:
            sample = self._world.clip(self.split, number, frames=1, **how)
            pixels = sample.pixels
        else:
            sample = self._world.image(self.split, number, **how)
            pixels = sample.pixels[None]
        return Item(self._patch(pixels, margin, rng)[0], sample.caption)

    def _whole(self, margin: int) -> dict[str, int]:
        """The size to render."""
        return {"height": max(self.whole[0], self.height + margin), "width": max(self.whole[1], self.width + margin)}

    def _patch(self, frames: np.ndarray, margin: int, rng: np.random.Generator) -> np.ndarray:
        height, width = self.height + margin, self.width + margin
        if frames.shape[1:3] == (height, width):
            return frames
        return transforms.resize_crop(frames, height=height, width=width, rng=rng, whole=frames.shape[1:3])


def read_image(record: Record) -> UInt8[np.ndarray, "1 h w 3"]:
    """Decodes an image as a clip of one frame, as it is shown: see `display.picture_pixels`."""
    content = io.BytesIO(record.content) if isinstance(record.content, bytes) else record.content
    try:
        with Image.open(content) as picture:
            return picture_pixels(ImageOps.exif_transpose(picture))[None]
    except Exception as error:  # Pillow raises many types for broken images
        raise UserError(f"cannot read the image {record.name!r}: {error}") from error


def read_picture(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a user's picture, as it is shown. Raises UserError for a video, an animation and a file that is damaged."""
    if not path.is_file():
        raise UserError(f"the picture {os.fspath(path)!r} {'is not a file' if path.exists() else 'does not exist'}")
    with warnings.catch_warnings():  # Pillow refuses bombs; below that limit it warns of large photographs
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        _check_one_image(path)
        return read_image(Record(os.fspath(path), "", path))[0]


def _check_one_image(path: Path) -> None:
    """Raises UserError for a video and an animation."""
    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1) if picture.format in _ANIMATED else 1
    except Exception as error:  # as above
        if path.suffix.lower() in (*SUFFIXES["video"], ".npz"):  # which samples are written as
            raise UserError(f"{os.fspath(path)!r} is a video, where a picture is needed") from error
        frames = 1  # reading it raises an error that says why
    if frames > 1:
        raise UserError(f"{os.fspath(path)!r} is an animation of {frames} frames, where a picture is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordSource:
    """Clips and images from records on disk.

    `video` returns a window of a clip, scaled to cover both (height, width) and `whole`, and cropped to
    (height, width). `image` returns one of `images`, or, if that is None, a random frame of a clip with its caption.
    Starts and crops are random, or central with `random_crop` = False.

    A record that is unreadable or too short is replaced by the next one in the same order.

    Raises:
        UserError: `ATTEMPTS` records in a row are unusable.
    """

    clips: Records | None = None
    images: Records | None = None
    window: video_files.ClipWindow
    height: int
    width: int
    whole: tuple[int, int] = (0, 0)
    random_crop: bool = True
    seed: int = 0

    def __len__(self) -> int:
        records = self.clips if self.clips is not None else self.images
        return 0 if records is None else len(records)

    def video(self, index: int, rng: np.random.Generator) -> Item:
        """Returns a window of a clip, scaled and cropped; see the class."""

        def read(record: Record) -> Item:
            place = rng.random() if self.random_crop else 0.5
            frames = video_files.read_window(record.content, self.window, place=place, name=record.name)
            return Item(self._cut(frames, 0, rng), record.caption)

        return first_readable(self.clips, index, read, kind="video", seed=self.seed)

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        """Returns an image, or, without images, a random frame of a clip, scaled and cropped."""

        def frame(record: Record) -> np.ndarray:
            one = dataclasses.replace(self.window, frames=1)
            return video_files.read_window(record.content, one, place=rng.random(), name=record.name)

        records, decode = (self.clips, frame) if self.images is None else (self.images, read_image)

        def read(record: Record) -> Item:
            return Item(self._cut(decode(record), margin, rng)[0], record.caption)

        return first_readable(records, index, read, kind="image", seed=self.seed)

    def _cut(self, frames: np.ndarray, margin: int, rng: np.random.Generator) -> np.ndarray:
        size = {"height": self.height + margin, "width": self.width + margin}
        return transforms.resize_crop(frames, **size, rng=rng if self.random_crop else None, whole=self.whole)


def first_readable(records: Any, index: int, read: Callable[[Any], Item], *, kind: str, seed: int) -> Item:
    """Returns `read` of record `index` in the shuffled order, or of the first readable record after it.

    Args:
        records: a random-access sequence of what `read` takes.
        index: position in the shuffled order; epochs follow one another.
        read: decodes a record; raises UserError for one to skip.
        kind: keys the shuffle, together with `seed`.
        seed: keys the shuffle, together with `kind`.

    Raises:
        UserError: `ATTEMPTS` records in a row cannot be read.
    """
    skipped: list[Skipped] = []
    for attempt in range(ATTEMPTS):
        epoch, position = divmod(index + attempt, len(records))
        name = ""
        try:
            record = records[int(_epoch_order(len(records), kind, seed, epoch)[position])]
            name = record.name
            item = read(record)
        except (UserError, RecursionError) as error:  # JSON nested too deep
            skipped.append(Skipped(name or str(error), str(error)))
            continue
        return item._replace(skipped=tuple(skipped))
    raise UserError(f"{ATTEMPTS} records in a row cannot be read; the last: {skipped[-1].error}")


def permutation(count: int, *key: object) -> Int[np.ndarray, "count"]:  # noqa: F821
    """Returns the numbers 0 to `count` - 1 in an order that depends only on `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).permutation(count)


@functools.lru_cache(maxsize=32)  # two epochs of 16 parts of a mixture with different sizes
def _epoch_order(count: int, kind: str, seed: int, epoch: int) -> Int[np.ndarray, "count"]:  # noqa: F821
    """The order of all records in an epoch; int32 where possible, as there may be tens of millions."""
    order = permutation(count, kind, seed, epoch)
    return order.astype(np.int32) if count < 2**31 else order


# ---- by kind ----


def open_records(
    kind: str,
    path: str,
    *,
    medium: Medium,
    split: str,
    window: video_files.ClipWindow,
    val_fraction: float = VAL_FRACTION,
    caption: str = "",
) -> Records:
    """Opens the records of a split at `path`, of one of KINDS.

    `caption` is that of files in a folder which have none of their own; other kinds do not take one.

    Raises:
        UserError: the kind is unknown, or the data cannot be used, or not be copied from a bucket.
    """
    if kind not in KINDS:
        raise UserError(f"unknown data source {kind!r}{suggest(kind, KINDS)}")
    path = local_data(user_location(path))
    options = {"medium": medium, "split": split, "val_fraction": val_fraction}
    if caption and kind != "video_folder":
        raise UserError(f"data.image_captions is for folders of images, kind video_folder; given {kind}:{path}")
    if kind == "array_record":
        return ShardRecords(path, **options)
    if kind == "tfds":
        return TFDSRecords(path, **options)
    if kind == "webdataset":
        return TarRecords(path, **options)

    def long_enough(clip: Path) -> None:
        """Raises UserError with the reason to leave a file out: it cannot be shown or read, or is too short."""
        try:
            info = video_files.video_info(clip)
        except UnusableVideo as error:
            raise UserError(f"are {error.reason}: {error}") from error
        except UserError as error:
            raise UserError(f"cannot be read: {error}") from error
        if window.room(info) < 0:
            raise UserError(f"are shorter than {window}: {os.fspath(clip)!r}")

    # Headers of separate files are read now, headers of clips in shards when the clips are used.
    return open_folder(path, **options, caption=caption, check=long_enough if medium == "video" else None)
