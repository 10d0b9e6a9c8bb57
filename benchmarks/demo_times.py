"""Seconds and memory of `make demo` after the install: with an empty compilation cache, and again with a full one.

    python benchmarks/demo_times.py

Runs the sampling commands of the Makefile's target `demo`, but for their folders, with the Python that runs this
script, start of Python and loading included. Linux only; a busy machine is named.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from memory import AnonymousPeak

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """What `make demo` runs, as the Makefile has it."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\t")[2].partition("\n\t@")[0]
    lines = recipe.replace("\\\n", " ").splitlines()
    return [[sys.executable, *shlex.split(line)[1:]] for line in lines]


def measured(words: Sequence[str], cache: Path, out: Path) -> tuple[float, float]:
    """(seconds, GB of anonymous memory) of one command."""
    words = list(words)
    words[words.index("--out") + 1] = str(out)
    start = time.perf_counter()
    process = subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with AnonymousPeak(process.pid) as memory:
        code = process.wait()
    if code:
        raise SystemExit(f"error: {shlex.join(words)} ended with {code}")
    return time.perf_counter() - start, memory.bytes / 1e9


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"The machine is busy (load {load:.1f}): measure again.")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty", "full"):
            folders = Path(folder) / "cache", Path(folder) / "demo"
            each = [measured(words, *folders) for words in commands()]
            parts = " + ".join(f"{seconds:.1f}" for seconds, _ in each)
            total, memory = sum(seconds for seconds, _ in each), max(memory for _, memory in each)
            print(f"{name} cache: {parts} = {total:.1f} s, at most {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
