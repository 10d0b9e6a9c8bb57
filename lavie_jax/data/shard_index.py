"""The index of a set of ArrayRecord shards, stored beside its list of clips, so that many shards open at once.

Without it every shard is opened to count its records, its first record is read, and the list is parsed: minutes for
10,000 shards. With it a start compares names, sizes and modification times of files. An index that does not describe
them is ignored.
"""

import contextlib
import dataclasses
import os
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64, UInt64

NAME = ".lavie_jax_index-shards.npz"
MANY = 200  # shards of a set without an index, from which on opening it stores one


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What is known about the records of some shards.

    Attributes:
        fields: names of the fields of a record.
        counts: records of each shard.
        hashes: by which each record is assigned to a split.
        sizes: (height, width) of each record, 0 if unknown.
    """

    fields: tuple[str, ...]
    counts: Int64[np.ndarray, " shards"]
    hashes: UInt64[np.ndarray, " n"]
    sizes: Int32[np.ndarray, "n 2"]


def read_index(folder: Path, list_name: str, paths: Sequence[Path]) -> ShardIndex | None:
    """Returns the index of shards below `folder`; None if there is none that describes all of them as they are."""
    try:
        with np.load(folder / NAME) as file:
            stored = {name: file[name] for name in file.files}
        if stored["list"].tolist() != _versions([folder / list_name])[0]:
            return None
        positions = {name: i for i, name in enumerate(stored["names"].tolist())}
        chosen = np.array([positions[path.relative_to(folder).as_posix()] for path in paths])
        if stored["versions"][chosen].tolist() != _versions(paths):
            return None
        counts, hashes, sizes = stored["counts"], stored["hashes"], stored["sizes"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    if len(chosen) < len(counts) or (np.diff(chosen) != 1).any():
        ends = np.cumsum(counts)
        rows = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in chosen])
        counts, hashes, sizes = counts[chosen], hashes[rows], sizes[rows]
    return ShardIndex(tuple(stored["fields"].tolist()), counts, hashes, sizes)


def write_index(folder: Path, list_name: str, paths: Sequence[Path], index: ShardIndex) -> None:
    """Stores the index of shards below `folder`, unless the folder cannot be written to."""
    temporary = folder / f".{uuid.uuid4().hex[:12]}.npz"
    with contextlib.suppress(OSError):
        try:
            np.savez(
                temporary,
                names=np.array([path.relative_to(folder).as_posix() for path in paths]),
                versions=np.array(_versions(paths)),
                list=np.array(_versions([folder / list_name])[0]),
                fields=np.array(index.fields),
                counts=index.counts,
                hashes=index.hashes,
                sizes=index.sizes,
            )
            os.replace(temporary, folder / NAME)
        finally:
            temporary.unlink(missing_ok=True)


def _versions(paths: Sequence[Path]) -> list[list[int]]:
    """Returns what changes with a file; the size alone does not, as shards are padded."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, paths)]
