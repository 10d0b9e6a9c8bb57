"""How few denoising steps keep the quality of super-resolution, on clips of Moving Shapes.

    python benchmarks/vsr_steps.py [--weights DIR] [--clips 4] [--json FILE]
    python benchmarks/vsr_steps.py --clips 1 --frames 5 --steps 2,3    # a smoke test

Clips of 256x256 are made from the means of their 4x4 squares, with the settings of the weights but for sampler and
steps, and compared with the truth by the measures of `lavie_jax.evaluation.cascade`: PSNR, sharpness of edges (1: as
the truth's), and flicker, of 255. Seconds are those of a clip, without compiling. Without --weights: the shipped model.
"""

import argparse
import json
import time
from pathlib import Path

from lavie_jax import cascade, results
from lavie_jax.evaluation.cascade import by_model, compare, downscaled, enlargement, moving_samples, through_vae

SAMPLERS = ("ddim", "dpm++2m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of the vsr stage, or of a cascade")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--frames", type=int, default=17, help="of a clip (default 17)")
    parser.add_argument("--steps", default="50,20,10,5,3", help="default 50,20,10,5,3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipe = cascade.load(args.weights, stages=["vsr"])
    sampling = pipe.weights["vsr"].sampling
    shape = {"frames": args.frames, "fps": sampling["fps"], "height": sampling["height"], "width": sampling["width"]}
    samples = moving_samples("held_out", args.clips, **shape)
    seconds = {}

    def timed(row, make):
        make(downscaled(samples[0].pixels), samples[0].caption, args.seed)  # compiles

        def made(*given):
            start = time.perf_counter()
            frames = make(*given)
            seconds[row] = seconds.get(row, 0.0) + (time.perf_counter() - start) / len(samples)
            return frames

        return made

    ways = {
        f"{sampler}, {steps} steps": {"sampler": sampler, "steps": int(steps)}
        for sampler in SAMPLERS
        for steps in args.steps.split(",")
    }
    rows = {row: timed(row, by_model(pipe, "vsr", **given)) for row, given in ways.items()}
    table = compare(rows, through_vae(pipe, "vsr"), samples, args.seed, downscaled, enlargement)
    for row, cells in table.items():
        cells["seconds"] = seconds.get(row, float("nan"))
    columns = list(next(iter(table.values())))
    print(results.markdown(["", *columns], [[row, *(f"{c[k]:.2f}" for k in columns)] for row, c in table.items()]))
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
