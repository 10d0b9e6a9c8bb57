"""Buckets: a few sizes of frames that batches may have, so that clips keep their shape and few programs are compiled.

Every global batch is of one bucket. Which one is a function of the step, and which clip a function of the step and the
place in the batch, so the position in the data is still one integer, and any number of processes finds the same.
"""

import concurrent.futures
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from absl import logging
from PIL import Image
from tqdm import tqdm

from lavie_jax.data import video_files
from lavie_jax.data.mixture import Order
from lavie_jax.data.records import Medium, Record, Records
from lavie_jax.data.shards import ShardRecords
from lavie_jax.data.sources import Source
from lavie_jax.errors import UserError

Size = tuple[int, int]  # (height, width)
ALIKE = 0.95  # buckets that keep nearly as much of a picture as the best one does


def size_name(size: Size) -> str:
    """ "320x512" of (320, 512)."""
    return f"{size[0]}x{size[1]}"


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """The number of the bucket that a picture belongs to.

    The one that keeps most of it when it is scaled until the bucket just fits inside and the rest is cut off. Of those
    that keep nearly as much, the largest that it fills without being scaled up, else the smallest.
    """
    rows, columns = size
    scales = [max(height / rows, width / columns) for height, width in buckets]
    kept = [height * width / (rows * columns * scale**2) for scale, (height, width) in zip(scales, buckets)]
    alike = [i for i, share in enumerate(kept) if share >= ALIKE * max(kept)]
    filled = [i for i in alike if scales[i] <= 1]
    area = {i: buckets[i][0] * buckets[i][1] for i in alike}
    return max(filled, key=area.__getitem__) if filled else min(alike, key=area.__getitem__)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """((320, 512), (512, 320)) of "320x512,512x320"."""
    try:
        sizes = tuple(tuple(int(side) for side in size.split("x")) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(len(size) != 2 for size in sizes):
        raise UserError(f"sizes are HEIGHTxWIDTH, such as 320x512,512x320; given {text!r}")
    return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """A source for each size. Each has as large a share of the steps as it has of the clips.

    Attributes:
      order: which source a step is of, and the how-manieth of its steps it is; an "example" of it is a step.
      batch: examples in a step.
    """

    sizes: tuple[Size, ...]
    sources: tuple[Source, ...]
    order: Order
    batch: int

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def of(self, index: int) -> tuple[Source, int, Size]:
        """(source, number within it, size) of example `index`."""
        step, place = divmod(index, self.batch)
        part, number = self.order(step)
        return self.sources[part], number * self.batch + place, self.sizes[part]

    def __str__(self) -> str:
        shares = [len(source) / len(self) for source in self.sources]
        return ", ".join(f"{size_name(size)} {share:.1%}" for size, share in zip(self.sizes, shares))


def make_buckets(parts: Sequence[tuple[Size, Source]], *, batch: int, whole: bool, seed: int) -> Buckets:
    """Of sources, each of one size; those without clips are left out.

    `whole`: a batch holds no clip twice. Raises UserError for a source that has clips, and fewer than that needs.
    """
    used = [(size, source) for size, source in parts if len(source)]
    for size, source in used:
        if whole and len(source) < batch:
            raise UserError(
                f"the bucket {size_name(size)} has {len(source)} clips to train on, fewer than a batch of {batch}: "
                "leave it out of data.buckets, and they go to another"
            )
    shares = tuple(len(source) for _, source in used)
    sizes, sources = zip(*used)
    return Buckets(sizes=sizes, sources=sources, order=Order(((0, shares),), 1, seed), batch=batch)


# ---- which record belongs to which bucket ----


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of the records of a kind of storage."""

    records: Records
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[int(self.indices[index])]


def divide(records: Records, medium: Medium, buckets: Sequence[Size]) -> list[Subset]:
    """The records of each bucket, which may be none."""
    sizes = records.listed_sizes() if isinstance(records, ShardRecords) else None
    places = [nearest(size, buckets) for size in (_measured(records, medium) if sizes is None else sizes)]
    return [Subset(records, np.flatnonzero(np.array(places) == number)) for number in range(len(buckets))]


def _measured(records: Records, medium: Medium) -> list[Size]:
    """(height, width) of every record as it is shown; 1x1 of what cannot be read, which training will skip and name."""

    def measure(index: int) -> Size:
        try:
            return _shown_size(records[index], medium)
        except UserError:
            return 1, 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(measure, range(len(records)))
        sizes = list(tqdm(found, "sizes", len(records), disable=len(records) < 500, leave=False))
    if unreadable := sizes.count((1, 1)):
        logging.warning("%d of %d %ss have no size that can be read", unreadable, len(records), medium)
    return sizes


def _shown_size(record: Record, medium: Medium) -> Size:
    if medium == "video":
        return video_files.shown_size(record.content, name=record.name)
    content = io.BytesIO(record.content) if isinstance(record.content, bytes) else record.content
    try:
        with Image.open(content) as picture:
            turned = picture.getexif().get(_ORIENTATION, 1) in _TURNED
            return (picture.width, picture.height) if turned else (picture.height, picture.width)
    except Exception as error:  # pictures from the web are broken in more ways than Pillow has names for
        raise UserError(f"cannot read the image {record.name!r}: {error}") from error


_ORIENTATION, _TURNED = 0x0112, range(5, 9)  # Exif: how the camera was held, and on which side
