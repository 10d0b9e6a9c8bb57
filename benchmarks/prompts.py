"""Measures what weighted words, FreeInit and FreeU change in the included base model, and the work that they take.

    python benchmarks/prompts.py --json FILE [--samples 64] [--rows "official;FreeU"]
    python benchmarks/prompts.py --work

Every row samples the same captions with the same seeds (`evaluation.moving_shapes`, split val) and detects attributes
in the pixels. Rows of a weight give it to the colour of the shape, as in "a small (red:1.5) circle moving left". Rows
that FILE has already are kept, unless `--samples` differs. `--work` traces the released base model at 16 frames of
320x512 and counts the FLOPs of its UNet in a whole sample, as `benchmarks/work.py` does; nothing is computed.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lavie_jax
from configs import base
from lavie_jax import cascade, results
from lavie_jax.errors import Parser, UserError, one_line_errors, suggest
from lavie_jax.evaluation.detectors import detect
from lavie_jax.evaluation.moving_shapes import score, true_samples
from lavie_jax.flops import count_flops
from lavie_jax.models.free_u import FreeU
from lavie_jax.planner.sampling import sampling_program
from lavie_jax.stages import STAGES

KIND = "prompts"
FREE_U = "1.3,1.4,0.9,0.2"  # published for Stable Diffusion 1.4
ROWS: dict[str, dict[str, Any]] = {
    "official": {},
    "FreeU": {"free_u": FREE_U},
    "FreeInit, 1 more pass": {"free_init": 1},
    "colour with weight 0": {"weight": 0.0},
    "colour with weight 0.5": {"weight": 0.5},
    "colour with weight 1.5": {"weight": 1.5},
    "FreeInit, 2 more passes": {"free_init": 2},
    "colour with weight 3": {"weight": 3.0},
}


def measure(pipe: cascade.Cascade, given: dict[str, Any], count: int) -> dict[str, Any]:
    """Returns the accuracies of a row, the sharpness of its frames, and how much they change over time."""
    samples = true_samples("val", count, pipe.weights["base"].sampling)
    captions, settings = [sample.caption for sample in samples], dict(given)
    if (weight := settings.pop("weight", None)) is not None:
        settings["prompt_syntax"] = "weighted"
        colours = [sample.attributes.colour for sample in samples]
        captions = [text.replace(colour, f"({colour}:{weight})", 1) for text, colour in zip(captions, colours)]
    videos = pipe(captions, seed=list(range(count)), batch_size=min(16, count), progress=True, **settings)
    table = score([detect(video) for video in videos], [sample.attributes for sample in samples])
    pixels = videos.astype(np.float32)
    return {
        "samples": count,
        "accuracy": table,
        "sharpness": float(np.abs(np.diff(pixels, axis=3)).mean()),
        "change": float(np.abs(np.diff(pixels, axis=1)).mean()),
    }


def work() -> str:
    """Returns a table of the FLOPs of the released base model's UNet in a sample."""
    program = sampling_program(base.get_config(), "base", "guided step", jax.devices()[:1])
    steps, factors = STAGES["base"].sampling["steps"], FreeU((1.3, 1.4), (0.9, 0.2))

    def flops(unet: Any) -> float:
        changed = dataclasses.replace(program, static={**program.static, "unet": unet})
        return steps * count_flops(changed.trace().jaxpr)

    plain = flops(program.static["unet"])
    rows = {"official": plain, "FreeU": flops(program.static["unet"].clone(free_u=factors))}
    rows |= {f"FreeInit, {n} more": (n + 1) * plain for n in (1, 2)}
    lines = [[name, f"{value / 1e15:.4f}", f"{value / plain:.4f}"] for name, value in rows.items()]
    return results.markdown(["settings", "PFLOP", "of official"], lines)


def main() -> None:
    """Measures the rows that are missing, and prints the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rows", help="names of rows, separated by semicolons (default: all)")
    parser.add_argument("--work", action="store_true", help="count FLOPs instead")
    args = parser.parse_args()
    if args.work:
        print(work())
        return
    if args.json is None:
        raise UserError("give a file for the results: --json FILE")
    results.check_path(args.json, KIND)
    done = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    pipe = lavie_jax.load(stages=("base",))
    for name in args.rows.split(";") if args.rows else ROWS:
        if name not in ROWS:
            raise UserError(f"--rows: unknown {name!r}{suggest(name, ROWS)}")
        if done.get(name, {}).get("samples") != args.samples:
            done[name] = measure(pipe, ROWS[name], args.samples)
            results.write(args.json, {"kind": KIND, "rows": done})
    attributes = [name for name in next(iter(done.values()))["accuracy"] if name != "all"]
    rows = [
        [name, str(row["samples"])]
        + [f"{100 * row['accuracy'][a]['accuracy']:.1f} ± {100 * row['accuracy'][a]['stderr']:.1f}" for a in attributes]
        + [f"{row['sharpness']:.2f}", f"{row['change']:.2f}"]
        for name, row in done.items()
    ]
    print(results.markdown(["settings", "n", *attributes, "sharpness", "change"], rows))


if __name__ == "__main__":
    with one_line_errors():
        main()
