"""One full-size base UNet evaluation on the CPU, ours against the original PyTorch modules in the same run.

    python benchmarks/base_unet_vs_original.py --original CHECKOUT --original-python PYTHON [--json FILE]

CHECKOUT is a copy of the public repository Vchitect/LaVie, PYTHON an interpreter that can import its modules:
Python 3.11, torch 2.13.0 (CPU), numpy<2, diffusers 0.16.0, transformers 4.30.2, huggingface_hub<0.20,
einops 0.6.1, rotary-embedding-torch 0.3.0. Nothing of either is part of this project.

Both sides hold the same 909 M float32 weights (the formula of the golden cases), see the same input of
(1, 8 frames, 20x32 latents) and the same cores, and take turns: original, ours, original, ours, ... so that a
busy moment of the machine hits both. The outputs are compared. Reported: seconds (median and fastest of the
rounds), their ratio, our trace and compile time, the peak of anonymous memory of each process, weights
included. Needs Linux, about 12 GB of memory and 5 minutes; a busy machine is named in the report.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import AnonymousPeak

ROOT = Path(__file__).parents[1]
CASE = ROOT / "tests" / "golden" / "base_unet_full.json"
SHAPES = {"sample": [1, 4, 8, 20, 32], "context": [1, 77, 768], "timesteps": [501]}  # b c t h w
BOUND = 1e-5  # relative error of outputs worth timing


class Original:
    """The original model in its own process."""

    def __init__(self, python: Path, checkout: Path, cores: int, output: Path):
        script = Path(__file__).with_name("original_base_unet.py")
        command = [python, script, checkout, CASE, json.dumps(SHAPES), cores, output]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self.version = self.answer()["torch"]

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: the original did not run; its own message is above")
        return json.loads(line)

    def seconds(self, word: str = "") -> float:
        """Seconds of one evaluation; the word "save" keeps its output."""
        print(word, file=self.process.stdin, flush=True)
        return self.answer()["seconds"]


class Ours:
    """Our model in this process, compiled."""

    def __init__(self):
        import jax

        from lavie_jax.models.unet import UNet
        from lavie_jax.parity.cases import read_case
        from lavie_jax.parity.kinds import load_params, take
        from lavie_jax.weights.diffusers_configs import unet_config

        self.jax, self.pid, self.version = jax, os.getpid(), jax.__version__
        case = dataclasses.replace(read_case(CASE), inputs=SHAPES)
        unet = UNet(unet_config(case.model, "base"))
        timesteps = jax.numpy.asarray(SHAPES["timesteps"])
        params = load_params(case, "unet", unet.config)
        self.arguments = ({"params": params}, take(case, "sample"), timesteps, take(case, "context"))
        start = time.perf_counter()
        lowered = jax.jit(unet.apply).lower(*self.arguments)
        self.trace_s = time.perf_counter() - start
        start = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start

    def seconds(self) -> float:
        """Seconds of one evaluation; the result stays in `output`."""
        start = time.perf_counter()
        self.output = self.jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict:
    """All numbers of the report."""
    import numpy as np

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "original.npy"
        original = Original(arguments.original_python, arguments.original, arguments.cores, output)
        ours = Ours()
        original.seconds("save")  # the first evaluation of each warms up and is not counted
        ours.seconds()
        golden, output = np.load(output), np.moveaxis(np.asarray(ours.output), -1, 1)
    error = float(np.linalg.norm(output - golden) / np.linalg.norm(golden))
    times, peaks = {"original": [], "ours": []}, {"original": 0.0, "ours": 0.0}
    for _ in range(arguments.rounds):
        for name, side in (("original", original), ("ours", ours)):
            with AnonymousPeak(side.pid) as memory:
                times[name].append(side.seconds())
            peaks[name] = max(peaks[name], memory.bytes / 2**30)
    original.process.stdin.close()
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "cores": arguments.cores,
        "load_before": load,
        "jax": ours.version,
        "torch": original.version,
        "relative_error": error,
        "seconds": times,
        "median_s": median,
        "fastest_s": {name: min(values) for name, values in times.items()},
        "ratio_of_medians": median["ours"] / median["original"],
        "trace_s": ours.trace_s,
        "compile_s": ours.compile_s,
        "peak_anonymous_gib": peaks,
    }


def report(numbers: dict) -> None:
    """Prints the numbers for a person."""
    print(f"base UNet, float32, (1, 8, 20, 32, 4), {numbers['cores']} cores")
    for name, library in (("original", "torch"), ("ours", "jax")):
        print(
            f"{name:9} {library} {numbers[library]:12} median {numbers['median_s'][name]:6.2f} s  "
            f"fastest {numbers['fastest_s'][name]:6.2f} s  "
            f"peak memory {numbers['peak_anonymous_gib'][name]:5.2f} GiB"
        )
    print(f"ratio of medians (ours / original): {numbers['ratio_of_medians']:.2f}")
    print(f"trace {numbers['trace_s']:.1f} s, compile {numbers['compile_s']:.1f} s")
    print(f"relative error of the outputs: {numbers['relative_error']:.1e}")
    if numbers["load_before"] > 0.5:
        print(f"The machine was busy before the run (load {numbers['load_before']:.1f}): measure again.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--original-python", type=Path, required=True, metavar="PYTHON")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= arguments.cores <= len(cores):
        parser.error(f"--cores {arguments.cores}: this machine offers {len(cores)}")
    os.sched_setaffinity(0, cores[: arguments.cores])
    os.environ["JAX_PLATFORMS"] = "cpu"
    numbers = measure(arguments)
    report(numbers)
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n")
    return int(numbers["relative_error"] > BOUND)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
