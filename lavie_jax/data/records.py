"""Records: encoded clips and images on disk, each with its caption.

`Records` are random access: any process can read record i at any time. Folders are in `folders.py`, webdataset tars in
`tars.py`, ArrayRecord shards and TFDS data sets in `shards.py`; `sources.py` decodes them.
"""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from absl import logging

from lavie_jax.data.files import LeftOut, walk
from lavie_jax.errors import UserError

# Streams without an index: FFmpeg finds a time in them only roughly, so that windows are decoded from further back.
UNINDEXED = (".ts", ".m2ts", ".mts", ".m2t", ".mpg", ".mpeg", ".vob", ".m2v")
VIDEO_SUFFIXES = (
    *(".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".qt", ".f4v", ".3gp", ".3g2"),
    *(".wmv", ".asf", ".flv", ".mxf", ".ogv", ".divx", ".nut", ".gif", *UNINDEXED),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
SUFFIXES = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES}
VAL_FRACTION = 0.05
Medium = Literal["video", "image"]


@dataclasses.dataclass(frozen=True)
class Record:
    """An encoded clip or image: the path of its file, or its bytes. `name` is for messages."""

    name: str
    caption: str
    content: Path | bytes


@runtime_checkable
class Records(Protocol):
    """The interface of a kind of storage. An index beyond the end raises IndexError, a damaged record UserError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def one_line(caption: str) -> str:
    """Returns a caption with single spaces between its words."""
    return " ".join(caption.split())


def of_split(names: Iterable[str], split: str, val_fraction: float) -> np.ndarray:
    """Indices of the `names` in a split, int64, by hash of the name: records keep their split when others are added.

    Equal names stay in one split. `val` gets about `val_fraction` of them, at least one, and `train` at least one; 0
    assigns all to `train`. If all names are equal, both splits have all of them.

    Raises:
        UserError: the split is neither train nor val.
    """
    digests = (hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest() for name in names)
    return split_of_hashes(np.frombuffer(b"".join(digests), "<u8"), split, val_fraction)


def name_hash(name: str) -> int:
    """The 64 bits by which `of_split` assigns a name."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_of_hashes(hashes: np.ndarray, split: str, val_fraction: float) -> np.ndarray:
    """`of_split` of names whose hashes, uint64, are known."""
    if split not in ("train", "val"):
        raise UserError(f"files only have the splits train and val; given {split!r}")
    positions = hashes.astype(np.float64) / 2**64
    if not val_fraction or not len(positions):
        return np.arange(len(positions) if split == "train" else 0)
    low, high = positions.min(), positions.max()
    if low == high:
        if split == "val":
            logging.warning("the only record is trained on and held out: the held-out loss is of a known clip")
        return np.arange(len(positions))
    held_out = (positions <= max(val_fraction, low)) & (positions < high)
    return np.flatnonzero(held_out == (split == "val"))


def shard_files(path: str | Path, suffix: str) -> list[Path]:
    """Sorted shards in a folder and its subfolders, of a pattern such as `clips-*.tar`, or one file.

    Raises:
        UserError: there is none.
    """
    name, left_out = os.fspath(path), LeftOut()
    if Path(path).is_dir():
        files = sorted(p for p in walk(Path(path), left_out, (suffix,)) if p.suffix.lower() == suffix)
        left_out.warn(len(files) + len(left_out))
    else:
        matches = [Path(p) for p in glob.glob(name) if Path(p).is_file()]
        files = sorted(matches) or ([Path(path)] if Path(path).is_file() else [])  # a name with pattern characters
    if not files:
        raise UserError(f"no {suffix} file at {name!r}: give a folder, one file, or a pattern such as 'data/*{suffix}'")
    return files


def empty_split(where: str | Path, medium: str, split: str, of: int, why: str = "") -> UserError:
    """The error for a split without records, of `of` records in total."""
    if not of:
        return UserError(
            f"no {medium} with a caption in {os.fspath(where)!r}; docs/data.md explains how files are named"
        )
    text = f"no {medium} for split {split!r} in {os.fspath(where)!r}: of {of} {medium}s"
    return UserError(f"{text} {why or 'all are in the other split'}")
