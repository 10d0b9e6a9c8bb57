"""A lock that allows one run at a time in a workdir."""

import json
import math
import os
import platform
import threading
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from absl import logging

from lavie_jax import disk
from lavie_jax.errors import UserError

BEAT = 10.0  # seconds between heartbeats
LOCK = "lock"  # its name in the workdir
STALE = 60.0  # seconds without one after which a run on another host counts as dead


class Lock:
    """Holds `workdir/lock` during a run; on several hosts, the first one holds it for all.

    The file contains host and process. On one host the kernel releases it when the process dies for any reason. Locks
    of other hosts, on a shared disk, are stale when they were not touched for a minute. On a disk without flock, which
    is warned of, a lock of this host is stale when its process is gone or did not touch it either.

    Raises:
        UserError: another run uses `workdir`, or it cannot be written.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / LOCK
        self._file: TextIOWrapper | None = None
        self._stopped = threading.Event()
        if problem := self._try():
            raise UserError(problem)

    def _try(self) -> str:
        """Takes the lock. Returns an error message, or "" on success."""
        self._made_workdir = not self._path.parent.exists()
        existed = self._path.exists()
        try:
            return self._take()
        except OSError as error:
            if not existed:
                self._path.unlink(missing_ok=True)
                self._remove_new_workdir()
            return f"--workdir {self._path.parent} cannot be locked: {error}"

    def _take(self) -> str:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+")
        try:
            while (free := disk.flock(file)) is False or not _is(file, self._path):
                if free is False:
                    problem = self._in_use(_holder(file))
                    file.close()
                    return problem
                file.close()  # a run has just ended and removed its lock
                file = self._path.open("a+")
        except OSError:
            file.close()
            raise
        holder = _holder(file)
        silent = time.time() - self._path.stat().st_mtime
        if free is None:
            if holder.get("host") == platform.node() and silent < STALE and alive(holder.get("pid")):
                file.close()
                return f"{self._in_use(holder)} If that process is another program, delete {self._path}."
            logging.warning(
                "%s is on a disk without flock: two runs that start in it at the same moment do not notice each other",
                self._path.parent,
            )
        if holder.get("host", platform.node()) != platform.node() and silent < STALE:
            file.close()
            left = math.ceil(STALE - silent)
            return f"{self._in_use(holder)} Or wait {left} s: after {STALE:.0f} s without a heartbeat its lock expires."
        file.seek(0)
        file.truncate()
        json.dump({"host": platform.node(), "pid": os.getpid()}, file)
        file.flush()
        self._file = file
        threading.Thread(target=self._beat, daemon=True).start()
        return ""

    def _in_use(self, holder: dict) -> str:
        host = holder.get("host", "?")
        text = (
            f"--workdir {self._path.parent} is in use by process {holder.get('pid', '?')} on host {host}: wait for it, "
            "stop it, or name another --workdir."
        )
        # A shared disk may still have the lock of a host that is gone.
        return text if host == platform.node() else f"{text} If you are sure that it was killed, delete {self._path}."

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                os.utime(self._path)
            except OSError:  # a disk that is temporarily unavailable
                continue

    def release(self) -> None:
        """Releases the lock. Removes the workdir if this run created it and wrote nothing into it."""
        self._stopped.set()
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        self._remove_new_workdir()

    def _remove_new_workdir(self) -> None:
        if self._made_workdir and self._path.parent.is_dir() and not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()


def alive(pid: Any) -> bool:
    """Whether a process of this host runs that is not this one."""
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _is(file: TextIOWrapper, path: Path) -> bool:
    """Returns whether the open file is still the one at `path`."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _holder(file: TextIOWrapper) -> dict:
    """Returns what the lock's last holder wrote into it, or {} if it was killed before that."""
    file.seek(0)
    try:
        return json.load(file)
    except ValueError:
        return {}
