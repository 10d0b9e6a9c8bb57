"""One run at a time in a workdir."""

import fcntl
import json
import math
import os
import platform
import threading
import time
from io import TextIOWrapper
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lavie_jax.errors import UserError

BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one, after which the run of another host counts as dead


class Lock:
    """Holds `workdir/lock` while a run lives; the first process holds it for all processes of the run.

    The file names host and process. On one host the kernel lets go of it when the process dies, however it
    dies; the locks of other hosts, on a shared disk, are stale when they were not touched for a minute.

    Raises:
      UserError: another run is at work in `workdir`.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / "lock"
        self._file: TextIOWrapper | None = None
        self._stopped = threading.Event()
        problem = self._take() if jax.process_index() == 0 else ""
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(bool(problem))):
            problem = problem or f"--workdir {workdir} is in use by another run: see the first host's message."
        if problem:
            raise UserError(problem)

    def _take(self) -> str:
        """Takes the lock; what is wrong, if it cannot."""
        self._made_workdir = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+")
        while not (free := _flock(file)) or not _is(file, self._path):
            if not free:
                problem = self._in_use(_holder(file))
                file.close()
                return problem
            file.close()  # the run before has just ended and removed its lock
            file = self._path.open("a+")
        holder = _holder(file)
        silent = time.time() - self._path.stat().st_mtime
        if holder.get("host", platform.node()) != platform.node() and silent < STALE:
            file.close()
            left = math.ceil(STALE - silent)
            return f"{self._in_use(holder)} Or wait {left} s: after {STALE:.0f} s without a sign of life it is dead."
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
        # Disks that several hosts share may keep a lock whose host is gone.
        return text if host == platform.node() else f"{text} If you are sure that it was killed, delete {self._path}."

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                os.utime(self._path)
            except OSError:  # a disk that is away for a moment
                continue

    def release(self) -> None:
        """Lets other runs in. Removes a workdir that this run made and wrote nothing to."""
        self._stopped.set()
        if self._file is None:
            return
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
        if self._made_workdir and not any(self._path.parent.iterdir()):
            self._path.parent.rmdir()


def _flock(file: TextIOWrapper) -> bool:
    """Whether the file is now locked by us."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(file: TextIOWrapper, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _holder(file: TextIOWrapper) -> dict:
    """What the lock's last holder wrote into it; empty if it was killed before it could."""
    file.seek(0)
    try:
        return json.load(file)
    except ValueError:
        return {}
