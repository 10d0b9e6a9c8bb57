"""Measures the included models with one and with two devices of the CPU (`parallel.split_cpu`), in one run.

    python benchmarks/cpu_devices.py [--rounds 3] [--json FILE]

Each number of devices has a process of its own, with JAX_NUM_CPU_DEVICES; the processes take turns, so that other load
affects both. A row is a stage with its default settings, given one prompt, and, after the base, the key frames or
frames of a true clip. Reports the fastest of the rounds in seconds of wall and CPU time, without loading and
compilation, and the ratio of wall times.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lavie_jax import results
from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.program_cache import cores

DEVICES = (1, 2)
PROMPT = "a red circle moving left"
MODELS = {  # row: weights (None: the included cascade), stage, and how many frames apart those of its clip are
    "base": (None, "base", None),
    "base-distilled": ("base-distilled", "base", None),
    "interpolation": (None, "interpolation", 4),
    "vsr": (None, "vsr", 1),
}


class Side:
    """A process with its own number of devices."""

    def __init__(self, devices: int):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def measure(self, row: str) -> dict[str, float]:
        """Returns wall and CPU seconds of one sample."""
        print(row, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: a process failed; see its message above")
        return json.loads(line)


def serve() -> None:
    """Makes a sample for every row that is named on stdin, and prints its seconds."""
    from lavie_jax import cascade
    from lavie_jax.evaluation.cascade import moving_samples

    clip, pipe, loaded = moving_samples("val", 1, frames=61, fps=32, height=64, width=64)[0].pixels, None, None
    for row in map(str.strip, sys.stdin):
        weights, stage, spacing = MODELS[row]
        if row != loaded:
            pipe, loaded = cascade.load(weights, stages=[stage]), row
        wall, cpu = time.perf_counter(), time.process_time()
        pipe(PROMPT, seed=0, stages=(stage,), clip=None if spacing is None else clip[::spacing])
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    sides, table, lines = {devices: Side(devices) for devices in DEVICES}, {}, []
    for row in MODELS:
        for side in sides.values():
            side.measure(row)  # loads and compiles
        times = {devices: [] for devices in DEVICES}
        for _ in range(args.rounds):
            for devices, side in sides.items():
                times[devices].append(side.measure(row))
        table[row] = {str(n): {kind: min(each[kind] for each in times[n]) for kind in ("wall", "cpu")} for n in DEVICES}
        one, two = (table[row][str(n)] for n in DEVICES)
        cells = [f"{value:.2f}" for value in (one["wall"], two["wall"], one["cpu"], two["cpu"])]
        lines.append([row, *cells, f"{two['wall'] / one['wall']:.2f}"])
    columns = ["", "1 device, s", "2 devices, s", "1 device, CPU s", "2 devices, CPU s", "ratio of wall times"]
    print(f"{cores()} cores\n\n{results.markdown(columns, lines)}")
    if args.json:
        args.json.write_text(json.dumps({"cores": cores(), "rows": table}, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
