"""Records: clips and pictures as they lie on disk, still encoded, each with its caption.

`Records` are random access: record i can be read by any process at any time. Folders are in `folders.py`,
webdataset tars in `tars.py`, ArrayRecord shards and TFDS data sets in `shards.py`; `sources.py` decodes them.
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
    """An encoded clip or picture: the path of its file, or its bytes. `name` is for messages."""

    name: str
    caption: str
    content: Path | bytes


@runtime_checkable
class Records(Protocol):
    """What a kind of storage offers. An index beyond its end is an IndexError, a damaged record a UserError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def one_line(caption: str) -> str:
    """A caption with single spaces between its words."""
    return " ".join(caption.split())


def of_split(names: Iterable[str], split: str, val_fraction: float) -> np.ndarray:
    """Indices of the `names` in a split, int64: by the name's hash, so a record stays in its split whatever is added.

    `val` gets about `val_fraction` of them, one at least; 0 leaves all to `train`. Raises UserError for another split.
    """
    if split not in ("train", "val"):
        raise UserError(f"files have the splits train and val; given {split!r}")
    digests = (hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest() for name in names)
    places = np.frombuffer(b"".join(digests), "<u8").astype(np.float64) / 2**64
    limit = max(val_fraction, places.min(initial=1.0)) if val_fraction else -1.0
    return np.flatnonzero((places <= limit) == (split == "val"))


def shard_files(path: str | Path, suffix: str) -> list[Path]:
    """Shards, sorted: those of a folder and below it, of a pattern such as `clips-*.tar`, or one file.

    Raises UserError where there is none.
    """
    name = os.fspath(path)
    if Path(path).is_dir():
        found = sorted(p for p in Path(path).rglob(f"*{suffix}") if p.is_file())
    else:
        found = sorted(Path(p) for p in glob.glob(name) if Path(p).is_file())
        found = found or ([Path(path)] if Path(path).is_file() else [])  # a name that only looks like a pattern
    if not found:
        raise UserError(f"no {suffix} file at {name!r}: a folder, one file, or a pattern such as 'data/*{suffix}'")
    return found


def empty_split(where: str | Path, medium: str, split: str, of: int, why: str = "") -> UserError:
    """The error for a split without records. `of` is how many there are in all."""
    if not of:
        return UserError(f"no {medium} with a caption in {os.fspath(where)!r}; docs/data.md says how files are named")
    text = f"no {medium} for split {split!r} in {os.fspath(where)!r}: of {of} {medium}s"
    return UserError(f"{text} {why or 'all are in the other split'}")
