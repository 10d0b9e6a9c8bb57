"""Buckets: a few frame sizes, so that clips keep their shape and few programs are compiled.

Every global batch has one size, a function of the step. A clip is a function of the step and its row in the batch, so
the position in the data is still one integer, and any number of processes finds the same batches.
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
ALIKE = 0.95  # buckets that keep nearly as much of a frame as the best one


def size_name(size: Size) -> str:
    """ "320x512" of (320, 512)."""
    return f"{size[0]}x{size[1]}"


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """Returns the index of the bucket for a frame of (height, width) `size`.

    The best bucket keeps most of the frame, when it is scaled to cover the bucket and then cropped. Among the buckets
    that keep nearly as much, the result is the largest that does not need upscaling, or else the smallest.
    """
    rows, columns = size
    scales = [max(height / rows, width / columns) for height, width in buckets]
    kept = [height * width / (rows * columns * scale**2) for scale, (height, width) in zip(scales, buckets)]
    alike = [i for i, share in enumerate(kept) if share >= ALIKE * max(kept)]
    filled = [i for i in alike if scales[i] <= 1]
    area = {i: buckets[i][0] * buckets[i][1] for i in alike}
    return max(filled, key=area.__getitem__) if filled else min(alike, key=area.__getitem__)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Parses "320x512,512x320" to ((320, 512), (512, 320))."""
    try:
        sizes = tuple(tuple(int(side) for side in size.split("x")) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or any(len(size) != 2 for size in sizes):
        raise UserError(f"sizes are HEIGHTxWIDTH, such as 320x512,512x320; given {text!r}")
    return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
    """A source for each size. In training, a bucket's fraction of the steps equals its fraction of the clips.

    Attributes:
        sizes: (height, width) of each bucket.
        sources: of each bucket.
        order: assigns steps to buckets; one "example" of it is a step.
        batch: examples per step.
    """

    sizes: tuple[Size, ...]
    sources: tuple[Source, ...]
    order: Order
    batch: int

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def of(self, index: int) -> tuple[Source, int, Size]:
        """(source, index within it, size) of example `index`."""
        step, row = divmod(index, self.batch)
        part, number = self.order(step)
        return self.sources[part], number * self.batch + row, self.sizes[part]

    def weights(self, steps: int) -> list[float]:
        """The weight of each of the first `steps` batches, so that a bucket counts by its share of the clips."""
        parts = [self.order(step)[0] for step in range(steps)]
        weights = [len(self.sources[part]) / parts.count(part) for part in parts]
        return [weight / sum(weights) for weight in weights]

    def __str__(self) -> str:
        shares = [len(source) / len(self) for source in self.sources]
        return ", ".join(f"{size_name(size)} {share:.1%}" for size, share in zip(self.sizes, shares))


def make_buckets(parts: Sequence[tuple[Size, Source]], *, batch: int, unique: bool, seed: int) -> Buckets:
    """Makes buckets of (size, source) pairs; empty sources are left out.

    Args:
        parts: a source for each size.
        batch: examples per step.
        unique: whether a batch must not repeat a clip, as in training. Otherwise, all buckets have equally many steps.
        seed: of the order.

    Raises:
        UserError: `unique`, and a source has fewer clips than a batch.
    """
    used = [(size, source) for size, source in parts if len(source)]
    for size, source in used:
        if unique and len(source) < batch:
            raise UserError(
                f"the bucket {size_name(size)} has {len(source)} clips for training, fewer than a batch of {batch}: "
                "remove it from data.buckets, and they join another"
            )
    # Few held-out steps show every bucket only if they are divided equally; `weights` restores the shares.
    shares = tuple(len(source) if unique else 1 for _, source in used)
    sizes, sources = zip(*used)
    return Buckets(sizes=sizes, sources=sources, order=Order(((0, shares),), 1, seed), batch=batch)


# ---- assignment of records to buckets ----


@dataclasses.dataclass(frozen=True)
class Subset:
    """A subset of records."""

    records: Records
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[int(self.indices[index])]


def divide(records: Records, medium: Medium, buckets: Sequence[Size]) -> list[Subset]:
    """The records of each bucket; some may be empty."""
    sizes = records.listed_sizes() if isinstance(records, ShardRecords) else None
    numbers = [nearest(size, buckets) for size in (_measured(records, medium) if sizes is None else sizes)]
    return [Subset(records, np.flatnonzero(np.array(numbers) == number)) for number in range(len(buckets))]


def _measured(records: Records, medium: Medium) -> list[Size]:
    """(height, width) of every record as shown; 1x1 for an unreadable one, which training skips and logs."""

    def measure(index: int) -> Size:
        try:
            return _shown_size(records[index], medium)
        except UserError:
            return 1, 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        measured = pool.map(measure, range(len(records)))
        sizes = list(tqdm(measured, "sizes", len(records), disable=len(records) < 500, leave=False))
    if unreadable := sizes.count((1, 1)):
        logging.warning("%d of %d %ss have no readable size", unreadable, len(records), medium)
    return sizes


def _shown_size(record: Record, medium: Medium) -> Size:
    if medium == "video":
        return video_files.shown_size(record.content, name=record.name)
    content = io.BytesIO(record.content) if isinstance(record.content, bytes) else record.content
    try:
        with Image.open(content) as picture:
            rotated = picture.getexif().get(_ORIENTATION, 1) in _ROTATED
            return (picture.width, picture.height) if rotated else (picture.height, picture.width)
    except Exception as error:  # Pillow raises many types for broken images
        raise UserError(f"cannot read the image {record.name!r}: {error}") from error


_ORIENTATION, _ROTATED = 0x0112, range(5, 9)  # Exif: orientation tag, and its values with height and width swapped
