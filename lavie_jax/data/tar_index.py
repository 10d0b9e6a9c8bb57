"""The index of a webdataset: where each clip and its caption are, stored so that later runs need not read the tars.

It is a hidden file beside the tars, or in ~/.cache/lavie_jax if that folder cannot be written to. Tars that are new, or
changed by name, size or modification time, are read again; the others are not.

The file is a .npy array, which processes map instead of reading, followed by JSON with the tars it describes and
what was left out of each.
"""

import contextlib
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from lavie_jax.disk import cache_folder
from lavie_jax.errors import UserError

FIELDS = [
    ("shard", "<i4"),
    ("hash", "<u8"),  # of the name, for splits
    ("json", "?"),  # whether the caption is in a .json
    ("content", "<i8"),
    ("size", "<i8"),
    ("text", "<i8"),
    ("text_size", "<i4"),
]
LeftOutOfTar = dict[str, list]  # {reason: [number of records, the first of them]}
Walk = Callable[[Sequence[Path]], Iterator[tuple[np.ndarray, LeftOutOfTar]]]
_FORMAT = 1  # another one is ignored and written again
_MAGIC = b"lavie_jax tars\n\0"


class _Index(NamedTuple):
    rows: np.ndarray
    tars: list[list]  # (name, size, modification time) of each
    left_out: list[LeftOutOfTar]


class Rows:
    """The rows of an index file, mapped into memory; worker processes map the same file again."""

    def __init__(self, file: Path, rows: np.ndarray, key: str):
        self._file, self._rows, self._key = file, rows, key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __getstate__(self) -> tuple[Path, str]:
        return self._file, self._key

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self._file, self._key = state
        found = _read(self._file)
        if found is None or _key(found.tars) != self._key:
            raise UserError(f"the index {os.fspath(self._file)!r} was removed or changed: start again")
        self._rows = found.rows


def open_index(
    path: str | Path, medium: str, tars: Sequence[Path], walk: Walk
) -> tuple[Rows | np.ndarray, list[LeftOutOfTar]]:
    """Returns the rows of all tars, and what is left out of each, from their index as far as it describes them.

    Args:
        path: what the user gave: a folder, a pattern or a file.
        medium: kind of the files.
        tars: found there, sorted.
        walk: reads some of the tars.
    """
    folder = Path(path) if Path(path).is_dir() else tars[0].parent
    spelled = "" if Path(path).is_dir() else Path(path).name
    digest = hashlib.sha256(spelled.encode(errors="surrogateescape")).hexdigest()[:8]
    name = f".lavie_jax_index-{medium}{f'-{digest}' if spelled else ''}.npy"
    entries = [_entry(tar, folder) for tar in tars]
    candidates = [folder / name, *_cache(folder, name)]
    stored = {file: found for file in candidates if (found := _read(file)) is not None}
    for file, found in stored.items():
        if found.tars == entries:
            return Rows(file, found.rows, _key(entries)), found.left_out
    index = _updated(next(iter(stored.values()), None), tars, entries, walk)
    for file in candidates:
        with contextlib.suppress(OSError):
            _write(file, index)
            if (written := _read(file)) is not None and written.tars == entries:
                return Rows(file, written.rows, _key(entries)), index.left_out
    logging.warning("the index of %s cannot be written: the next run reads all %d tars again", folder, len(tars))
    return index.rows, index.left_out


def _entry(tar: Path, folder: Path) -> list:
    stat = tar.stat()
    return [os.path.relpath(tar, folder).encode(errors="surrogateescape").hex(), stat.st_size, stat.st_mtime_ns]


def _updated(found: _Index | None, tars: Sequence[Path], entries: list[list], walk: Walk) -> _Index:
    """The index of all tars; those that `found` does not describe are read."""
    old: dict[tuple, tuple[np.ndarray, LeftOutOfTar]] = {}
    if found is not None:
        starts = np.searchsorted(found.rows["shard"], np.arange(len(found.tars) + 1))
        parts = [np.array(found.rows[a:b]) for a, b in zip(starts, starts[1:])]
        old = dict(zip(map(tuple, found.tars), zip(parts, found.left_out)))
    read = walk([tar for tar, entry in zip(tars, entries) if tuple(entry) not in old])
    parts, left_out = [], []
    for number, entry in enumerate(entries):
        part, left = old[tuple(entry)] if tuple(entry) in old else next(read)
        part["shard"] = number
        parts.append(part)
        left_out.append(left)
    return _Index(np.concatenate(parts), entries, left_out)


def _cache(folder: Path, name: str) -> list[Path]:
    """Returns the path of an index in the user's cache folder, or nothing if the user has no home folder."""
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    try:
        return [cache_folder("tars") / f"{digest}{name}"]
    except UserError:
        return []


def _key(entries: list[list]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _write(file: Path, index: _Index) -> None:
    """Writes an index under a temporary name first: several hosts may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}-{uuid.uuid4().hex[:8]}")
    fields = {"format": _FORMAT, "rows": len(index.rows), "tars": index.tars, "left_out": index.left_out}
    manifest = json.dumps(fields).encode()
    try:
        with temporary.open("xb") as out:
            np.save(out, index.rows, allow_pickle=False)
            digest = hashlib.sha256(manifest).digest()[:16]
            out.write(manifest + digest + len(manifest).to_bytes(8, "little") + _MAGIC)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path) -> _Index | None:
    """An index; None if there is none, or it is damaged or of another format."""
    try:
        with file.open("rb") as index:
            index.seek(-len(_MAGIC) - 24, os.SEEK_END)
            digest, length, magic = index.read(16), int.from_bytes(index.read(8), "little"), index.read()
            if magic != _MAGIC:
                return None
            index.seek(-len(_MAGIC) - 24 - length, os.SEEK_END)
            manifest = index.read(length)
            if hashlib.sha256(manifest).digest()[:16] != digest:
                return None
        fields = json.loads(manifest)
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if fields.get("format") != _FORMAT or rows.dtype != np.dtype(FIELDS) or len(rows) != fields["rows"]:
        return None
    return _Index(rows, fields["tars"], fields["left_out"])
