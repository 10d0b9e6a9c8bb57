"""Anonymous memory of a process, for the other scripts here: what it holds for itself. Linux only.

Pages of mapped files do not count: the kernel drops them when somebody needs the memory.
"""

import threading
from pathlib import Path

if not Path("/proc/self/status").exists():
    raise SystemExit("error: there is no /proc here; memory is measured on Linux only")


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


class AnonymousPeak:
    """The highest `anonymous_bytes` of a process while the block runs, in `bytes`."""

    def __init__(self, pid: int):
        self.pid, self.bytes, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes(self.pid))

    def __enter__(self) -> "AnonymousPeak":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()
