"""Hashes of files; the cache folder; full disks and disks that cannot lock files, on which a run continues."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import logging

from lavie_jax.errors import user_path

# Errors of flock on disks that do not support it: NFS without a lock daemon, some FUSE and parallel file systems.
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(name: str) -> Path:
    """Returns a folder of this program in the user's cache folder, whether or not it exists."""
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lavie_jax" / name


@dataclasses.dataclass
class Written:
    """Whether a write completed; its truth value is the answer."""

    complete: bool = False

    def __bool__(self) -> bool:
        return self.complete


@contextlib.contextmanager
def tolerate_full_disk(what: str) -> Iterator[Written]:
    """Logs a full disk instead of raising it, around a write that the next interval repeats.

    Yields:
        An object that is true after the block if the block completed.
    """
    written = Written()
    try:
        yield written
        written.complete = True
    except Exception as error:
        if not is_full(error):
            raise
        logging.error("%s could not be written: the disk is full. Training continues.", what)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, means that the disk or its quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):  # tensorstore's errors
            return True
        error = error.__cause__ or error.__context__
    return False


def flock(file: IO) -> bool | None:
    """Tries to lock the file. Returns whether this process holds it now, or None on a disk without flock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        raise
    return True
