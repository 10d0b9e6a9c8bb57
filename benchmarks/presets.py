"""Measures what saved work costs: prompt following of the included base model with presets, and with each trick alone.

    python benchmarks/presets.py --json FILE [--samples 64] [--rows official,fast]

Every row samples the same captions with the same seeds (`evaluation.moving_shapes`, split val) and detects attributes
in the pixels. Work is the number of halves of guided evaluations, relative to the first row: the included model has one
window, so that it is the share of the UNet's FLOPs. Rows that FILE has already are kept, unless `--samples` differs.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lavie_jax
from lavie_jax import cascade, results
from lavie_jax.cascade.running import guidance_of
from lavie_jax.diffusion import make_sampler
from lavie_jax.diffusion.guidance import COMPUTED
from lavie_jax.errors import Parser, UserError, one_line_errors, suggest
from lavie_jax.evaluation.detectors import detect
from lavie_jax.evaluation.moving_shapes import score, true_samples

KIND = "presets"
ROWS: dict[str, dict[str, Any]] = {
    "official": {},
    "guidance every 2": {"guidance_every": 2},
    "guidance every 3": {"guidance_every": 3},
    "guidance from 300": {"guidance_low": 300},
    "guidance from 500": {"guidance_low": 500},
    "dpm++2m with 12 steps": {"sampler": "dpm++2m", "steps": 12},
    "dpm++2m with 12 steps and guidance every 2": {"sampler": "dpm++2m", "steps": 12, "guidance_every": 2},
    "balanced": {"preset": "balanced"},
    "fast": {"preset": "fast"},
}


def halves(pipe: cascade.Cascade, given: Mapping[str, Any]) -> int:
    """Returns the number of halves of guided evaluations of a sample."""
    preset = given.get("preset", "official")
    own = {name: value for name, value in given.items() if name != "preset"}
    settings = cascade.resolve_settings(pipe.weights, ["base"], {"base": own}, preset=preset)["base"]
    sampler = make_sampler(settings.sampler, settings.steps, pipe.weights["base"].schedule, settings.spacing)
    return sum(2 if mode == COMPUTED else 1 for mode in guidance_of(settings).plan(sampler.timesteps))


def measure(pipe: cascade.Cascade, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns the number of halves and the accuracies of a row."""
    samples = true_samples("val", count, pipe.weights["base"].sampling)
    videos = pipe(
        [sample.caption for sample in samples], seed=list(range(count)), batch_size=16, progress=True, **given
    )
    table = score([detect(video) for video in videos], [sample.attributes for sample in samples])
    return {"halves": halves(pipe, given), "samples": count, "accuracy": table, "sharpness": sharpness(videos)}


def sharpness(videos: np.ndarray) -> float:
    """Mean absolute difference of horizontal neighbours, of 255: falls with blur and rises with noise."""
    return float(np.abs(np.diff(videos.astype(np.float32), axis=3)).mean())


def main() -> None:
    """Measures the rows that are missing, and prints the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rows", default=",".join(ROWS), help="names of rows (default: all)")
    args = parser.parse_args()
    results.check_path(args.json, KIND)
    done = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    pipe = lavie_jax.load(stages=("base",))
    for name in args.rows.split(","):
        if name not in ROWS:
            raise UserError(f"--rows: unknown {name!r}{suggest(name, ROWS)}")
        if done.get(name, {}).get("samples") != args.samples:
            done[name] = measure(pipe, ROWS[name], args.samples)
            results.write(args.json, {"kind": KIND, "rows": done})
    attributes = [name for name in next(iter(done.values()))["accuracy"] if name != "all"]
    rows = [
        [name, f"{row['halves'] / done['official']['halves']:.2f}"]
        + [f"{100 * row['accuracy'][a]['accuracy']:.1f} ± {100 * row['accuracy'][a]['stderr']:.1f}" for a in attributes]
        + [f"{row['sharpness']:.2f}"]
        for name, row in done.items()
    ]
    print(results.markdown(["settings", "work", *attributes, "sharpness"], rows))


if __name__ == "__main__":
    with one_line_errors():
        main()
