"""Measures the quality of super-resolution on Moving Shapes by sampler and number of denoising steps.

    python benchmarks/vsr_steps.py [--weights DIR] [--clips 4] [--json FILE]
    python benchmarks/vsr_steps.py --clips 1 --frames 5 --steps 2,3    # a smoke test

Generates clips of 256x256 from the means of 4x4 squares and compares them with the true clips by PSNR, sharpness of
edges (1 = as sharp as the true clip) and flicker (of 255), see `lavie_jax.evaluation.cascade`. Other settings are those
of the weights. Seconds are per clip, without compilation. Runs on any device; the shipped model is the default.
"""

import argparse
import json
import time
from pathlib import Path

from lavie_jax import cascade, results
from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.evaluation.cascade import by_model, compare, downscaled, enlargement, moving_samples, through_vae

SAMPLERS = ("ddim", "dpm++2m")


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, help="folder of the vsr stage or of a cascade (default: the shipped one)"
    )
    parser.add_argument("--clips", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=17, help="frames per clip (default: %(default)s)")
    parser.add_argument("--steps", default="50,20,10,5,3", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    pipe = cascade.load(args.weights, stages=["vsr"])
    sampling = pipe.weights["vsr"].sampling
    shape = {"frames": args.frames, "fps": sampling["fps"], "height": sampling["height"], "width": sampling["width"]}
    samples = moving_samples("held_out", args.clips, **shape)
    seconds = {}

    def timed(row, method):
        """Wraps a method of `super_resolution` so that its mean seconds per clip are stored under `row`."""
        method(downscaled(samples[0].pixels), samples[0].caption, args.seed)  # compiles

        def timed_method(*args):
            start = time.perf_counter()
            frames = method(*args)
            seconds[row] = seconds.get(row, 0.0) + (time.perf_counter() - start) / len(samples)
            return frames

        return timed_method

    settings = {
        f"{sampler}, {steps} steps": {"sampler": sampler, "steps": int(steps)}
        for sampler in SAMPLERS
        for steps in args.steps.split(",")
    }
    methods = {row: timed(row, by_model(pipe, "vsr", **given)) for row, given in settings.items()}
    table = compare(methods, through_vae(pipe, "vsr"), samples, args.seed, downscaled, enlargement)
    for row, cells in table.items():
        cells["seconds"] = seconds.get(row, float("nan"))
    columns = list(next(iter(table.values())))
    print(results.markdown(["", *columns], [[row, *(f"{c[k]:.2f}" for k in columns)] for row, c in table.items()]))
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
