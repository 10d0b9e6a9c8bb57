"""Hashes of files; files and folders that are complete or absent; the cache folder; full disks; locks."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import logging

from lavie_jax.errors import UserError, user_path

# Errors of flock on disks that do not support it: NFS without a lock daemon, some FUSE and parallel file systems.
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def process_name() -> str:
    """Returns host and number of this process, for names of its own in folders that hosts may share."""
    return f"{platform.node()}-{os.getpid()}"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same suffix. It is renamed to `path` if the block succeeds.

    If `path` is a link, the file that it points to is written, and the link stays.
    """
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {os.fspath(path)!r}: a folder above it is a file") from error
    temporary = path.with_name(f".{process_name()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `path`, which is renamed to `path` at the end, or removed after an error.

    If `path` is a link, the folder that it points to is written, and the link stays.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.parent / f".{path.name}.{kind}-{process_name()}" for kind in ("writing", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process: in a container, the next one has its number
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)  # likewise
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Cleans up after a process was killed inside `new_folder`: removes partial folders, restores a moved one.

    Call it only where no other process can be writing `path`.
    """
    path = Path(os.path.realpath(path))
    for old in sorted(path.parent.glob(f".{path.name}.old-*")):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for partial in path.parent.glob(f".{path.name}.writing-*"):
        shutil.rmtree(partial, ignore_errors=True)


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
