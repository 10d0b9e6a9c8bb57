"""Does a text-to-video model of Moving Shapes show what its prompts say? Accuracy of each attribute.

    python -m lavie_jax.evaluation.moving_shapes --weights DIR [--json FILE] [--samples 256] [--split val]
    python -m lavie_jax.evaluation.moving_shapes --truth        # the detectors on true clips
    python -m lavie_jax.evaluation.moving_shapes --weights DIR --vae    # true clips through DIR's VAE

Captions are full (size and background named), those of clips 0, 1, ... of a split; sample i has seed
`--seed` + i. Splits: `val` (combinations that training shows), `held_out`, `image_only`, `image` (stills).
"""

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import UInt8
from tqdm.auto import tqdm

from lavie_jax import cascade
from lavie_jax.data import moving_shapes, transforms, video_files
from lavie_jax.data.moving_shapes import Attributes, Sample
from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors, suggest
from lavie_jax.evaluation import results
from lavie_jax.evaluation.cascade import smaller
from lavie_jax.evaluation.detectors import detect
from lavie_jax.models.vae import VAE
from lavie_jax.stages.interpolation import KEY_FRAME_SPACING
from lavie_jax.stages.settings import parse_stages
from lavie_jax.weights import folder_hash, load_part
from lavie_jax.weights.folder import read_json

SPLITS = ("val", "held_out", "image_only", "image")
DEFAULT_SPLITS = SPLITS[:3]
ROWS = {
    "background": "background",
    "colour": "colour",
    "size": "size",
    "shape": "shape",
    "direction": "motion",
}
KIND = "moving_shapes"  # what marks our own JSON, which may be written anew
DEFAULTS = {"height": 64, "width": 64, "frames": 16, "fps": 8.0}
SHEET_ROWS = 16

Table = dict[str, dict[str, float]]
Videos = list[UInt8[np.ndarray, "t h w 3"]]


def score(seen: Sequence[Attributes], attributes: Sequence[Attributes]) -> Table:
    """Accuracy of each attribute, and of all at once, of what detectors saw: {row: {accuracy, stderr, n}}.

    `stderr` is the binomial standard error sqrt(p (1 - p) / n). Still images have no row `direction`.
    """
    if not seen or len(seen) != len(attributes):
        raise UserError(f"as many clips as attributes, at least 1; given {len(seen)} and {len(attributes)}")
    rows = {
        row: [getattr(s, name) == getattr(a, name) for s, a in zip(seen, attributes)]
        for row, name in ROWS.items()
        if row != "direction" or attributes[0].motion is not None
    }
    rows["all"] = [all(right) for right in zip(*rows.values())]
    return {row: _accuracy(right) for row, right in rows.items()}


def mistakes(seen: Sequence[Attributes], attributes: Sequence[Attributes]) -> dict[str, dict[str, int]]:
    """What was seen in place of what was asked for, the most frequent first: {row: {"left, not up": count}}."""
    table = {}
    for row, name in ROWS.items():
        pairs = [(getattr(s, name), getattr(a, name)) for s, a in zip(seen, attributes)]
        wrong = Counter(f"{got}, not {asked}" for got, asked in pairs if got != asked and asked is not None)
        table[row] = dict(wrong.most_common())
    return table


def _accuracy(right: Sequence[bool]) -> dict[str, float]:
    n, p = len(right), sum(right) / len(right)
    return {"accuracy": p, "stderr": math.sqrt(p * (1 - p) / n), "n": n}


def true_samples(split: str, count: int, sampling: Mapping) -> list[Sample]:
    """Clips 0 to `count` - 1 of a split with full captions; stills, as clips of one frame, for `image`."""
    side = {"height": sampling["height"], "width": sampling["width"]}
    if split != "image":
        time_axis = {"frames": sampling["frames"], "fps": sampling["fps"]}
        return [moving_shapes.clip(split, i, **side, **time_axis) for i in range(count)]
    stills = [moving_shapes.image("val", i, **side) for i in range(count)]
    return [Sample(s.pixels[None], s.caption, s.attributes) for s in stills]


# ---- where the clips come from ----


def _reconstructed(weights: Path, samples: list[Sample]) -> Videos:
    """True clips through the VAE: the ceiling of what a model with these latents can show."""
    part = load_part(weights, "vae", dtype=np.float32)
    vae, params = VAE(part.config), jax.tree.map(jnp.asarray, part.params)

    @jax.jit
    def through(images):
        mean, _ = vae.apply({"params": params}, images, method="encode")
        return vae.apply({"params": params}, mean, method="decode")

    clips = (sample.pixels for sample in tqdm(samples, desc="reconstructing", unit="clip"))
    return [transforms.to_uint8(np.asarray(through(transforms.to_float(clip)))) for clip in clips]


def _generated(pipe: cascade.Cascade, samples: list[Sample], args: argparse.Namespace) -> Videos:
    """Samples for the captions; images where the captions are of stills."""
    together = len(samples) if args.stages == ("base",) else args.batch_size  # those of later stages are large
    clips = []
    for start in range(0, len(samples), together):
        some = samples[start : start + together]
        videos = pipe(
            [sample.caption for sample in some],
            stages=args.stages,
            seed=list(range(args.seed + start, args.seed + start + len(some))),
            frames=1 if some[0].attributes.motion is None else None,
            sampler=args.sampler,
            steps=args.steps,
            guidance=args.guidance,
            batch_size=args.batch_size,
            progress=True,
        )
        clips += [_as_base_makes_them(video, args.stages) for video in videos]
    return clips


def _as_base_makes_them(video: UInt8[np.ndarray, "t H W 3"], stages: Sequence[str]) -> UInt8[np.ndarray, "k h w 3"]:
    """Only the key frames, at the base stage's size: what the detectors know."""
    key_frames = video[::KEY_FRAME_SPACING] if "interpolation" in stages else video
    return smaller(key_frames) if "vsr" in stages else key_frames


# ---- the command ----


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.moving_shapes",
        description="Accuracy of background, colour, size, shape and direction in sampled videos.",
    )
    parser.add_argument("--weights", type=Path, help="a weights folder; the shipped model's by default")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--truth", action="store_true", help="measure the detectors on true clips")
    what.add_argument("--vae", action="store_true", help="measure true clips after the weights' VAE")
    parser.add_argument("--stages", default="base", help="base (default), or with later ones, base,interpolation,vsr: "
                        "does what the base made come through them?")  # fmt: skip
    parser.add_argument("--split", action="append", help=f"one of {', '.join(SPLITS)}; may repeat")
    parser.add_argument("--samples", type=int, default=256, help="captions a split")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", help="default: as in the weights")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--json", type=Path, help="write the tables here")
    parser.add_argument("--sheets", type=Path, help="write a contact sheet for each split into this folder")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """UserError for what would fail, or destroy a file, only after the sampling."""
    for split in args.split or ():
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}{suggest(split, SPLITS)}")
    for name in ("samples", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}: at least 1 is needed, given {getattr(args, name)}")
    args.stages = parse_stages(args.stages, own_clip=False)
    if args.stages != ("base",) and (args.truth or args.vae or "image" in (args.split or ())):
        raise UserError("stages: later ones are for sampled videos, not for --truth, --vae or stills")
    if args.seed < 0:
        raise UserError(f"seed: at least 0 is needed, given {args.seed}")
    results.check_place(args.json, KIND)
    if args.sheets is not None:
        check_folder(args.sheets, f"--sheets {args.sheets}")


def _maker(args: argparse.Namespace) -> tuple[Mapping, Callable[[list[Sample]], Videos]]:
    """(sampling settings, what makes the videos that are to show true samples)."""
    if args.truth:
        return DEFAULTS, lambda samples: [sample.pixels for sample in samples]
    weights = cascade.base_folder(cascade.SHIPPED if args.weights is None else args.weights)
    if args.vae:
        sampling = read_json(weights / "config.json").get("sampling") or DEFAULTS
        return sampling, lambda samples: _reconstructed(weights, samples)
    pipe = cascade.load(args.weights, stages=args.stages)
    return pipe.weights["base"].sampling, lambda samples: _generated(pipe, samples, args)


def _measure(args: argparse.Namespace) -> dict:
    """Samples and scores every split; writes the contact sheets."""
    sampling, make = _maker(args)
    tables, wrong, begin = {}, {}, time.perf_counter()
    for split in dict.fromkeys(args.split or DEFAULT_SPLITS):
        logging.info("split %s", split)
        samples = true_samples(split, args.samples, sampling)
        clips = make(samples)
        seen = [detect(clip, fps=sampling["fps"]) for clip in clips]
        attributes = [sample.attributes for sample in samples]
        tables[split], wrong[split] = score(seen, attributes), mistakes(seen, attributes)
        if args.sheets:
            captions = [sample.caption for sample in samples[:SHEET_ROWS]]
            video_files.contact_sheet(clips[:SHEET_ROWS], captions, args.sheets / f"{split}.png")
    what = "truth" if args.truth else "vae" if args.vae else "samples"
    seconds = round(time.perf_counter() - begin, 1)
    result = {"kind": KIND, "what": what, "splits": tables, "mistakes": wrong, "seconds": seconds}
    if not args.truth:
        folder = cascade.base_folder(args.weights or cascade.SHIPPED)
        result |= {"weights": os.fspath(folder), "weights_hash": folder_hash(folder)}
    if what == "samples":
        given = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance}
        asked = {name: value for name, value in given.items() if value is not None}
        result |= {"stages": args.stages, "seed": args.seed, "sampling": {**sampling, **asked}}
    return result


def _markdown(tables: Mapping[str, Table]) -> str:
    """A table with a line a split, in per cent with standard errors."""
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
    """The command line of this module."""
    with one_line_errors():
        args = _parse(argv)
        _check(args)
        result = _measure(args)
    print(_markdown(result["splits"]))
    if args.json:
        results.write(args.json, result)


if __name__ == "__main__":
    main()
