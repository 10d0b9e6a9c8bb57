"""Readers of ArrayRecord shards, of which a bounded number is open at a time."""

import collections
import concurrent.futures
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lavie_jax.errors import UserError


class _Pool:
    """The readers of this process: a bounded number, for all sets of shards together, as each holds a file open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: collections.OrderedDict[str, Any] = collections.OrderedDict()

    def reader(self, path: str) -> Any:
        """The reader of a shard; opens it, and drops the one that was not used for longest."""
        with self._lock:
            reader = self._readers.get(path)
            if reader is None:
                reader = self._readers[path] = _open(path, "readahead_buffer_size:0", 32768)
            self._readers.move_to_end(path)
            # A reader that is dropped closes its file once no thread reads from it.
            while len(self._readers) > most_open():
                self._readers.popitem(last=False)
        return reader

    def forget(self, paths: Sequence[str]) -> None:
        """Drops readers of shards that may have been written again."""
        with self._lock:
            for path in paths:
                self._readers.pop(path, None)


_POOL = _Pool()


def most_open() -> int:
    """Number of shards that a process holds open, within its limit of open files."""
    return max(4, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class Readers:
    """Random access to the records of many shards.

    Attributes:
        paths: the shards.
        starts: position of the first record of each shard, and at the end the number of records. Counted by opening all
            shards unless `counts` of their records are given.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int] | np.ndarray | None = None):
        self.paths = [os.fspath(path) for path in paths]
        _POOL.forget(self.paths)
        if counts is not None:
            self.starts = np.concatenate([[0], np.cumsum(counts)])
            return
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            counts = pool.map(_count, self.paths)
            counts = list(tqdm(counts, "shards", len(paths), disable=len(paths) < 500, leave=False))
        self.starts = np.cumsum([0, *counts])

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self.starts[-1]:
            raise IndexError(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return _POOL.reader(self.paths[shard]).read([int(index - self.starts[shard])])[0]


def _open(path: str, options: str = "", buffer: int | None = None) -> Any:
    from array_record.python import array_record_module  # part of grain; needed only for shards

    more = {} if buffer is None else {"file_reader_buffer_size": buffer}
    return array_record_module.ArrayRecordReader(path, options=options, **more)


def _count(path: str) -> int:
    """Number of records of a shard."""
    try:
        reader = _open(path)
        count = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the shard {path!r} is truncated or damaged: {error}. Remove it.") from error
    return count
