"""Measures the anonymous memory of processes, for the other scripts in this folder. Linux only.

Anonymous memory (RssAnon) is what a process holds for itself. Pages of mapped files do not count, because the kernel
drops them when memory is needed.
"""

import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

if not Path("/proc/self/status").exists():
    raise SystemExit("error: memory is measured on Linux only: there is no /proc")


def anonymous_bytes(pid: int) -> int:
    """Returns the RssAnon of a process; 0 after it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


class AnonymousPeak:
    """A context manager that records the peak of `anonymous_bytes` of a process in its attribute `bytes`."""

    def __init__(self, pid: int):
        self.pid, self.bytes, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes(self.pid))

    def __enter__(self) -> "AnonymousPeak":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()


def run_measured(
    command: Sequence[str | Path], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[float, int]:
    """Runs a command to its end, without showing its output.

    Returns:
        Seconds, including the start of the process; peak of anonymous memory in bytes.

    Raises:
        SystemExit: the command failed.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=cwd, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=log
        )
        with AnonymousPeak(process.pid) as memory:
            code = process.wait()
        seconds = time.perf_counter() - start
        if code:
            log.seek(0)
            raise SystemExit(f"error: {shlex.join(words)} ended with {code}:\n{log.read().decode()[-2000:]}")
    return seconds, memory.bytes


def warn_if_busy() -> None:
    """Prints a warning if other processes are using the machine."""
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}), measure again")
