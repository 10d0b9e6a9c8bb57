"""Seconds and memory of `make demo` after the install: with an empty compilation cache, and again with a full one.

    python benchmarks/demo_times.py

Runs the sampling command of the Makefile's target `demo`, but for its folder, with the Python that runs this script,
start of Python and loading included. Linux only; a busy machine is named.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import AnonymousPeak

ROOT = Path(__file__).parents[1]


def command() -> list[str]:
    """What `make demo` runs, as the Makefile has it."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\t")[2].partition("\n\t@")[0]
    words = shlex.split(recipe.replace("\\\n", " ").replace("$(PY)", "python"))
    return [sys.executable, *words[1:]]


def measured(cache: Path, out: Path) -> tuple[float, float]:
    """(seconds, GB of anonymous memory)."""
    words = command()
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
            seconds, memory = measured(Path(folder) / "cache", Path(folder) / "demo")
            print(f"{name} cache: {seconds:.1f} s, at most {memory:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
