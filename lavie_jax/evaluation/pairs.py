"""Measures whether a model of Moving Shapes with two objects swaps their attributes (LaVie, appendix E).

    python -m lavie_jax.evaluation.pairs --weights DIR [--images] [--json FILE] [--samples 256]
    python -m lavie_jax.evaluation.pairs --truth                     # the detectors, on true clips
    python -m lavie_jax.evaluation.pairs --weights DIR --vae         # true clips reconstructed by DIR's VAE

Captions are those of clips, or with --images of images, 0, 1, ... of the split `val` of `data.moving_pairs`. Sample i
has seed `--seed` + i. `pair_detectors.outcome` defines the rows of the table; `swapped of right` is the fraction of
swapped clips among those with the right colours and shapes.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lavie_jax import cascade, results
from lavie_jax.data import moving_pairs
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.data.moving_pairs import PairSample
from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors
from lavie_jax.evaluation.moving_shapes import (
    DEFAULTS,
    SHEET_ROWS,
    Table,
    Videos,
    accuracy,
    add_sampling_flags,
    check_sampling_flags,
    generated,
    given_sampling,
    reconstructed,
)
from lavie_jax.evaluation.pair_detectors import OUTCOMES, detect_pair, outcome
from lavie_jax.stages.settings import MAIN_STAGE
from lavie_jax.text_files import read_json
from lavie_jax.weights import folder_hash

KIND = "moving_pairs"  # of the result file
ROWS = ("two objects", *OUTCOMES, "swapped of right")


def score(outcomes: Sequence[Mapping[str, bool] | None]) -> Table:
    """Computes the fraction of all clips for each outcome, {row: {accuracy, stderr, n}}, with binomial standard errors.

    Clips without two objects count as wrong. `swapped of right` is absent if no clip has the right colours and shapes.
    """
    if not outcomes:
        raise UserError("give at least 1 clip")
    names = [name for name in OUTCOMES if any(one and name in one for one in outcomes) or name != "motions"]
    table = {"two objects": accuracy([one is not None for one in outcomes])}
    table |= {name: accuracy([bool(one and one[name]) for one in outcomes]) for name in names}
    right = [one["swapped"] for one in outcomes if one and one["colours"] and one["shapes"]]
    return table | ({"swapped of right": accuracy(right)} if right else {})


def true_samples(count: int, sampling: Mapping, *, images: bool) -> list[PairSample]:
    """Returns clips 0 to `count` - 1 of the split `val`, or images as clips of one frame."""
    side = {"height": sampling["height"], "width": sampling["width"]}
    if not images:
        time_axis = {"frames": sampling["frames"], "fps": sampling["fps"]}
        return [moving_pairs.clip("val", i, **side, **time_axis) for i in range(count)]
    samples = [moving_pairs.image("val", i, **side) for i in range(count)]
    return [PairSample(one.pixels[None], one.caption, one.objects) for one in samples]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.pairs",
        description="Measures how often a model swaps the colours and shapes of two objects.",
    )
    parser.add_argument("--weights", type=Path, help="a weights folder of the base stage")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--truth", action="store_true", help="measure the detectors on true clips")
    group.add_argument("--vae", action="store_true", help="measure true clips reconstructed by the weights' VAE")
    parser.add_argument("--images", action="store_true", help="images instead of clips")
    parser.add_argument("--samples", type=int, default=256, help="default: %(default)s")
    add_sampling_flags(parser)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet to this PNG file")
    args = parser.parse_args(argv)
    args.stages = (MAIN_STAGE,)
    if args.weights is None and not args.truth:
        raise UserError("give --weights with a model that was trained on two objects, or --truth")
    return args


def _check(args: argparse.Namespace) -> None:
    """Checks everything that would otherwise fail, or replace a file, after sampling."""
    check_sampling_flags(args)
    results.check_path(args.json, KIND)
    if args.sheet is not None:
        check_folder(args.sheet.parent, f"--sheet {args.sheet}")


def _measure(args: argparse.Namespace) -> dict:
    """Samples and scores the clips, and writes the contact sheet."""
    start = time.perf_counter()
    if args.truth:
        sampling = DEFAULTS
    else:
        weights = cascade.stage_folder(args.weights, MAIN_STAGE)
        sampling = read_json(weights / "config.json").get("sampling") or DEFAULTS
    samples = true_samples(args.samples, sampling, images=args.images)
    captions = [one.caption for one in samples]
    if args.truth:
        clips: Videos = [one.pixels for one in samples]
    elif args.vae:
        clips = reconstructed(weights, samples)
    else:
        pipe = cascade.load(args.weights, stages=args.stages, dtype=args.dtype)
        clips = generated(pipe, captions, args, images=args.images)
    found = [detect_pair(clip, fps=sampling["fps"]) for clip in clips]
    outcomes = [outcome(one, sample.objects) for one, sample in zip(found, samples)]
    if args.sheet is not None:
        contact_sheet(clips[:SHEET_ROWS], captions[:SHEET_ROWS], args.sheet)
    source = "truth" if args.truth else "vae" if args.vae else "samples"
    result = {"kind": KIND, "what": source, "images": args.images, "seed": args.seed, "table": score(outcomes)}
    if not args.truth:
        result |= {"weights": os.fspath(weights), "weights_hash": folder_hash(weights)}
    result["sampling"] = {**sampling, **given_sampling(args)}
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def _markdown(table: Table) -> str:
    """Returns a table with a row per outcome, in percent with standard errors."""
    rows = [
        [row, str(table[row]["n"]), f"{100 * table[row]['accuracy']:.1f} ± {100 * table[row]['stderr']:.1f}"]
        for row in ROWS
        if row in table
    ]
    return results.markdown(["outcome", "n", "percent"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        _check(args)
        result = _measure(args)
    print(_markdown(result["table"]))
    if args.json:
        results.write(args.json, result)


if __name__ == "__main__":
    main()
