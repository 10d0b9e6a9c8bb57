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

from lavie_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
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

    `val` gets about `val_fraction` of them, at least one; 0 assigns all to `train`.

    Raises:
        UserError: the split is neither train nor val.
    """
    if split not in ("train", "val"):
        raise UserError(f"files only have the splits train and val; given {split!r}")
    digests = (hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest() for name in names)
    positions = np.frombuffer(b"".join(digests), "<u8").astype(np.float64) / 2**64
    limit = max(val_fraction, positions.min(initial=1.0)) if val_fraction else -1.0
    return np.flatnonzero((positions <= limit) == (split == "val"))


def shard_files(path: str | Path, suffix: str) -> list[Path]:
    """Sorted shards in a folder and its subfolders, of a pattern such as `clips-*.tar`, or one file.

    Raises:
        UserError: there is none.
    """
    name = os.fspath(path)
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob(f"*{suffix}") if p.is_file())
    else:
        files = sorted(Path(p) for p in glob.glob(name) if Path(p).is_file())
        files = files or ([Path(path)] if Path(path).is_file() else [])  # a file name that contains pattern characters
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
