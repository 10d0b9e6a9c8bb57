"""Measures whether a text-to-video model of Moving Shapes follows its prompts: the accuracy of each attribute.

    python -m lavie_jax.evaluation.moving_shapes --weights DIR [--json FILE] [--samples 256] [--split val]
    python -m lavie_jax.evaluation.moving_shapes --truth                # the detectors, on true clips
    python -m lavie_jax.evaluation.moving_shapes --weights DIR --vae    # true clips reconstructed by DIR's VAE

Captions are those of clips 0, 1, ... of a split, with size and background. Sample i has seed `--seed` + i.
Splits: `val` (combinations seen in training), `held_out`, `image_only`, `image` (single images).
"""

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import UInt8
from tqdm.auto import tqdm

from lavie_jax import cascade, results
from lavie_jax.data import moving_shapes, transforms
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.data.moving_shapes import Attributes, Sample
from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors, suggest
from lavie_jax.evaluation.cascade import downscaled
from lavie_jax.evaluation.detectors import detect
from lavie_jax.models.vae import VAE
from lavie_jax.samples.flags import add_dtype
from lavie_jax.stages.interpolation import KEY_FRAME_SPACING
from lavie_jax.stages.settings import MAIN_STAGE, parse_stages
from lavie_jax.text_files import read_json
from lavie_jax.weights import folder_hash, load_part

SPLITS = ("val", "held_out", "image_only", "image")
DEFAULT_SPLITS = SPLITS[:3]
ROWS = {
    "background": "background",
    "colour": "colour",
    "size": "size",
    "shape": "shape",
    "direction": "motion",
}
KIND = "moving_shapes"  # of the result file
DEFAULTS = {"height": 64, "width": 64, "frames": 16, "fps": 8.0}
SHEET_ROWS = 16

Table = dict[str, dict[str, float]]
Videos = list[UInt8[np.ndarray, "t h w 3"]]


def score(detected: Sequence[Attributes], attributes: Sequence[Attributes]) -> Table:
    """Computes the accuracy of each attribute and of all at once.

    Returns:
        {row: {accuracy, stderr, n}}, with the binomial standard error sqrt(p (1 - p) / n). Images have no row
        `direction`.
    """
    if not detected or len(detected) != len(attributes):
        raise UserError(f"give as many clips as attributes, at least 1; given {len(detected)} and {len(attributes)}")
    rows = {
        row: [getattr(d, name) == getattr(a, name) for d, a in zip(detected, attributes)]
        for row, name in ROWS.items()
        if row != "direction" or attributes[0].motion is not None
    }
    rows["all"] = [all(right) for right in zip(*rows.values())]
    return {row: accuracy(right) for row, right in rows.items()}


def mistakes(detected: Sequence[Attributes], attributes: Sequence[Attributes]) -> dict[str, dict[str, int]]:
    """Counts which wrong value was detected instead of the right one: {row: {"left, not up": count}}, sorted."""
    table = {}
    for row, name in ROWS.items():
        pairs = [(getattr(d, name), getattr(a, name)) for d, a in zip(detected, attributes)]
        wrong = Counter(f"{shown}, not {right}" for shown, right in pairs if shown != right and right is not None)
        table[row] = dict(wrong.most_common())
    return table


def accuracy(right: Sequence[bool]) -> dict[str, float]:
    """Returns {accuracy, stderr, n}, with the binomial standard error."""
    n, p = len(right), sum(right) / len(right)
    return {"accuracy": p, "stderr": math.sqrt(p * (1 - p) / n), "n": n}


def true_samples(split: str, count: int, sampling: Mapping) -> list[Sample]:
    """Returns clips 0 to `count` - 1 of a split with full captions; for `image`, images as clips of one frame."""
    side = {"height": sampling["height"], "width": sampling["width"]}
    if split != "image":
        time_axis = {"frames": sampling["frames"], "fps": sampling["fps"]}
        return [moving_shapes.clip(split, i, **side, **time_axis) for i in range(count)]
    images = [moving_shapes.image("val", i, **side) for i in range(count)]
    return [Sample(image.pixels[None], image.caption, image.attributes) for image in images]


# ---- sources of clips ----


def reconstructed(weights: Path, samples: Sequence[Any]) -> Videos:
    """Encodes and decodes true clips: an upper bound for any model with these latents."""
    part = load_part(weights, "vae", dtype=np.float32)
    vae, params = VAE(part.config), jax.tree.map(jnp.asarray, part.params)

    @jax.jit
    def reconstruct(images):
        mean, _ = vae.apply({"params": params}, images, method="encode")
        return vae.apply({"params": params}, mean, method="decode")

    clips = (sample.pixels for sample in tqdm(samples, desc="reconstructing", unit="clip"))
    return [transforms.to_uint8(np.asarray(reconstruct(transforms.to_float(clip)))) for clip in clips]


def generated(
    pipe: cascade.Cascade, captions: Sequence[str], args: argparse.Namespace, *, images: bool = False
) -> Videos:
    """Samples videos for the captions, or images as clips of one frame."""
    at_once = len(captions) if args.stages == (MAIN_STAGE,) else args.batch_size  # outputs of later stages are large
    clips = []
    for start in range(0, len(captions), at_once):
        part = captions[start : start + at_once]
        videos = pipe(
            part,
            stages=args.stages,
            seed=list(range(args.seed + start, args.seed + start + len(part))),
            frames=1 if images else None,
            sampler=args.sampler,
            steps=args.steps,
            guidance=args.guidance,
            batch_size=args.batch_size,
            progress=True,
        )
        clips += [_as_from_base(video, args.stages) for video in videos]
    return clips


def _as_from_base(video: UInt8[np.ndarray, "t H W 3"], stages: Sequence[str]) -> UInt8[np.ndarray, "k h w 3"]:
    """Returns the key frames at the base stage's size, which the detectors are made for."""
    key_frames = video[::KEY_FRAME_SPACING] if "interpolation" in stages else video
    return downscaled(key_frames) if "vsr" in stages else key_frames


# ---- the command ----


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every command that samples clips of Moving Shapes and measures them, but `--samples`."""
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample (default: %(default)s)")
    parser.add_argument("--sampler", help="default: the weights' own, also for --steps and --guidance")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    add_dtype(parser.add_argument)
    parser.add_argument("--json", type=Path, help="write the tables to this file")


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings, by name, that flags of `add_sampling_flags` set."""
    flags = {name: getattr(args, name) for name in ("sampler", "steps", "guidance")}
    return {name: value for name, value in flags.items() if value is not None}


def check_sampling_flags(args: argparse.Namespace, *counts: str) -> None:
    """Raises UserError for impossible values of `--samples`, `--batch-size`, `--seed` and other `counts`."""
    for name in ("samples", "batch_size", *counts):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; given {getattr(args, name)}")
    if not 0 <= args.seed < 2**32 - args.samples:
        raise UserError(f"--seed must be from 0 to {2**32 - args.samples - 1} for {args.samples} samples")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.moving_shapes",
        description="Measures the accuracy of background, colour, size, shape and direction in sampled videos.",
    )
    parser.add_argument("--weights", type=Path, help="a weights folder (default: the shipped model)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--truth", action="store_true", help="measure the detectors on true clips")
    group.add_argument("--vae", action="store_true", help="measure true clips reconstructed by the weights' VAE")
    parser.add_argument("--stages", default="base", help="base (default), or with later stages, such as "
                        "base,interpolation,vsr, to measure whether they preserve the attributes")  # fmt: skip
    parser.add_argument("--split", action="append", help=f"one of {', '.join(SPLITS)}; may be repeated")
    parser.add_argument("--samples", type=int, default=256, help="samples per split (default: %(default)s)")
    add_sampling_flags(parser)
    parser.add_argument("--sheets", type=Path, help="write a contact sheet per split to this folder")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Checks everything that would otherwise fail, or replace a file, after sampling."""
    for split in args.split or ():
        if split not in SPLITS:
            raise UserError(f"--split: unknown split {split!r}{suggest(split, SPLITS)}")
    check_sampling_flags(args)
    args.stages = parse_stages(args.stages, own_clip=False)
    if args.stages != (MAIN_STAGE,) and (args.truth or args.vae or "image" in (args.split or ())):
        raise UserError("--stages: later stages need sampled videos, without --truth, --vae and --split image")
    results.check_path(args.json, KIND)
    if args.sheets is not None:
        check_folder(args.sheets, f"--sheets {args.sheets}")


def _generator(args: argparse.Namespace) -> tuple[Mapping, Callable[[list[Sample]], Videos]]:
    """Returns the sampling settings and a function that generates a video for each true sample."""
    if args.truth:
        return DEFAULTS, lambda samples: [sample.pixels for sample in samples]
    weights = cascade.stage_folder(args.weights, MAIN_STAGE)
    if args.vae:
        sampling = read_json(weights / "config.json").get("sampling") or DEFAULTS
        return sampling, lambda samples: reconstructed(weights, samples)
    pipe = cascade.load(args.weights, stages=args.stages, dtype=args.dtype)

    def generate(samples: list[Sample]) -> Videos:
        captions = [sample.caption for sample in samples]
        return generated(pipe, captions, args, images=samples[0].attributes.motion is None)

    return pipe.weights["base"].sampling, generate


def _measure(args: argparse.Namespace) -> dict:
    """Samples and scores every split, and writes the contact sheets."""
    sampling, generate = _generator(args)
    tables, wrong, start = {}, {}, time.perf_counter()
    for split in dict.fromkeys(args.split or DEFAULT_SPLITS):
        logging.info("split %s", split)
        samples = true_samples(split, args.samples, sampling)
        clips = generate(samples)
        detected = [detect(clip, fps=sampling["fps"]) for clip in clips]
        attributes = [sample.attributes for sample in samples]
        tables[split], wrong[split] = score(detected, attributes), mistakes(detected, attributes)
        if args.sheets:
            captions = [sample.caption for sample in samples[:SHEET_ROWS]]
            contact_sheet(clips[:SHEET_ROWS], captions, args.sheets / f"{split}.png")
    source = "truth" if args.truth else "vae" if args.vae else "samples"
    seconds = round(time.perf_counter() - start, 1)
    result = {"kind": KIND, "what": source, "splits": tables, "mistakes": wrong, "seconds": seconds}
    if not args.truth:
        folder = cascade.stage_folder(args.weights, MAIN_STAGE)
        result |= {"weights": os.fspath(folder), "weights_hash": folder_hash(folder)}
    if source == "samples":
        result |= {"stages": args.stages, "seed": args.seed, "sampling": {**sampling, **given_sampling(args)}}
    return result


def _markdown(tables: Mapping[str, Table]) -> str:
    """Returns a table with a row per split, in percent with standard errors."""
    rows = [*ROWS, "all"]
    lines = []
    for split, table in tables.items():
        cells = [
            f"{100 * table[row]['accuracy']:.1f} ± {100 * table[row]['stderr']:.1f}" if row in table else ""
            for row in rows
        ]
        lines.append([split, str(table["all"]["n"]), *cells])
    return results.markdown(["split", "n", *rows], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        _check(args)
        result = _measure(args)
    print(_markdown(result["splits"]))
    if args.json:
        results.write(args.json, result)


if __name__ == "__main__":
    main()
