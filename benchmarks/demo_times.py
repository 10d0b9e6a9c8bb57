"""Measures time and memory of `make demo` after the install, with an empty compilation cache and with a full one.

    python benchmarks/demo_times.py

Runs the sampling commands of the Makefile's target `demo` in a temporary folder, with the Python that runs this script.
Times include the start of Python and loading. Needs Linux.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from memory import run_measured, warn_if_busy

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """Returns the commands of `make demo`, read from the Makefile."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\t")[2].partition("\n\t@")[0]
    lines = recipe.replace("\\\n", " ").splitlines()
    return [[sys.executable, *shlex.split(line)[1:]] for line in lines]


def measure(command: Sequence[str], cache: Path, out: Path) -> tuple[float, int]:
    """Returns seconds and peak bytes of anonymous memory of a command that writes to `out`."""
    words = list(command)
    words[words.index("--out") + 1] = str(out)
    return run_measured(words, cwd=ROOT, environment={"JAX_COMPILATION_CACHE_DIR": str(cache)})


def main() -> None:
    """Runs the command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warn_if_busy()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("empty", "full"):
            folders = Path(folder) / "cache", Path(folder) / "demo"
            measurements = [measure(command, *folders) for command in commands()]
            parts = " + ".join(f"{seconds:.1f}" for seconds, _ in measurements)
            total, peak = sum(seconds for seconds, _ in measurements), max(peak for _, peak in measurements)
            print(f"{name} cache: {parts} = {total:.1f} s, peak {peak / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
