"""Measures a model of Moving Shapes at several noise levels: its loss, the lower bound, and the value of each word.

    python -m lavie_jax.evaluation.noise_levels [--weights DIR] [--json FILE] [--samples 32]

The caption determines an attribute at the noise levels where x_t does not. The table has these columns, measured on
true images and clips of `val`, with the same noise in all columns:

    image, clip       mean squared error of the prediction for images and clips, with the true captions
    least             lower bound of `image`: the error of the optimal prediction, see `least_loss`
    colour, shape...  increase of the error of clips when this word of their captions is replaced by another;
                      0 = the model ignores it at this level
"""

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm.auto import tqdm

from lavie_jax import cascade, results
from lavie_jax.cascade.model import StageModel
from lavie_jax.data import moving_shapes as world
from lavie_jax.data.moving_shapes import Sample
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.evaluation.moving_shapes import true_samples
from lavie_jax.models.unet import UNet
from lavie_jax.weights import folder_hash

LEVELS = (200, 350, 500, 600, 700, 800, 900)
WORDS = {
    "background": world.BACKGROUNDS,
    "colour": world.VIDEO_COLOURS,
    "size": tuple(world.SIZES),
    "shape": world.VIDEO_SHAPES,
    "motion": tuple(world.MOTIONS),
}
POSITIONS = 40  # of the shape along each axis, over which `least_loss` averages
AT_ONCE = 64  # frames per call of the UNet
KIND = "noise_levels"

Row = dict[str, float]


def measure(model: StageModel, *, count: int, seed: int) -> dict[int, Row]:
    """Returns {t: {"image", "least", "clip", and one entry per word of `WORDS`}}, means over `count` samples."""
    images = true_samples("image", count, model.weights.sampling)
    clips = true_samples("val", count, model.weights.sampling)
    rng = np.random.default_rng(seed)
    image_x0, clip_x0 = (np.stack([model.encode(sample.pixels) for sample in group]) for group in (images, clips))
    image_eps, clip_eps = (rng.standard_normal(x.shape, np.float32) for x in (image_x0, clip_x0))
    replaced = {name: [replace_word(sample, name, i) for i, sample in enumerate(clips)] for name in WORDS}
    true_text = model.encode_text([sample.caption for sample in clips]).hidden
    replaced_text = {name: model.encode_text(captions).hidden for name, captions in replaced.items()}
    image_text = model.encode_text([sample.caption for sample in images]).hidden
    candidates = [
        model.encode(at_all_positions(sample, model.weights.sampling))
        for sample in tqdm(images, "positions", unit="image")
    ]
    schedule, rows = model.weights.schedule, {}
    for t in tqdm(LEVELS, "levels", unit="level"):
        clip = loss(model, clip_x0, clip_eps, t, true_text, images=False)
        rows[t] = {
            "image": loss(model, image_x0, image_eps, t, image_text, images=True),
            "least": float(np.mean([least_loss(schedule, t, *args) for args in zip(image_x0, image_eps, candidates)])),
            "clip": clip,
        }
        for name, text in replaced_text.items():
            rows[t][name] = loss(model, clip_x0, clip_eps, t, text, images=False) - clip
    return rows


def replace_word(sample: Sample, name: str, number: int) -> str:
    """Returns the caption with another word for the attribute `name`; `number` selects one that makes sense."""
    a = sample.attributes
    taken = (a.colour, a.background) if name in ("colour", "background") else (getattr(a, name),)
    others = [word for word in WORDS[name] if word not in taken]
    return world.caption(dataclasses.replace(a, **{name: others[number % len(others)]}))


def at_all_positions(sample: Sample, sampling: Mapping[str, Any]) -> UInt8[np.ndarray, "p H W 3"]:
    """Returns the image with its object at each position of a grid, p = POSITIONS^2."""
    side = {"height": sampling["height"], "width": sampling["width"]}
    along = (np.arange(POSITIONS) + 0.5) / POSITIONS
    return np.concatenate(
        [world.render(sample.attributes, u, v, frames=1, fps=1.0, **side) for u in along for v in along]
    )


def loss(
    model: StageModel,
    x0: Float[np.ndarray, "n t h w c"],
    eps: Float[np.ndarray, "n t h w c"],
    t: int,
    text: Float[np.ndarray, "n l d"],
    *,
    images: bool,
) -> float:
    """Returns the mean squared error of predictions for x0 noised to t with eps; `images` = frames are independent."""
    rows = max(1, AT_ONCE // x0.shape[1])
    total = 0.0
    for part in (slice(i, i + rows) for i in range(0, len(x0), rows)):
        errors = _errors(
            model.unet_params, x0[part], eps[part], np.int32(t), text[part], unet=model.unet,
            schedule=model.weights.schedule, images=images,
        )  # fmt: skip
        total += float(errors.sum())
    return total / len(x0)


@functools.partial(jax.jit, static_argnames=("unet", "schedule", "images"))
def _errors(
    params: dict, x0: Array, eps: Array, t: Array, text: Array, *, unet: UNet, schedule: Schedule, images: bool
):
    t = jnp.broadcast_to(t, x0.shape[:1])
    x_t, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
    captions = {"text": None, "image_text": text[:, None]} if images else {"text": text}
    prediction = unet.apply({"params": params}, x_t, t, **captions)
    return einops.reduce(jnp.square(prediction - target), "n t h w c -> n", "mean")


def least_loss(
    schedule: Schedule,
    t: int,
    x0: Float[np.ndarray, "1 h w c"],
    eps: Float[np.ndarray, "1 h w c"],
    candidates: Float[np.ndarray, "p h w c"],
) -> float:
    """Returns the error of the optimal prediction for an image noised to t, given its caption.

    A caption determines everything except the position. The least mean squared error is that of E[x0 | x_t], the mean
    over all positions weighted by the likelihood of x_t. The candidates lie on a grid and the true position between
    its points, so the result is slightly too high at low noise.
    """
    x0, eps, times = jnp.asarray(x0), jnp.asarray(eps), jnp.full((1,), t)
    x_t = np.asarray(schedule.add_noise(x0, eps, times), np.float64)
    alpha, sigma = np.sqrt(schedule.alphas_cumprod[t]), np.sqrt(1 - schedule.alphas_cumprod[t])
    log_likelihood = -np.square(x_t - alpha * candidates).sum(axis=(1, 2, 3)) / (2 * sigma**2)
    weight = np.exp(log_likelihood - log_likelihood.max())
    best_x0 = np.einsum("p,phwc->hwc", weight / weight.sum(), candidates)[None]
    best_eps = (x_t - alpha * best_x0) / sigma
    best = schedule.target(jnp.asarray(best_x0, x0.dtype), jnp.asarray(best_eps, x0.dtype), times)
    target = schedule.target(x0, eps, times)
    return float(jnp.square(best - target).mean())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.noise_levels",
        description="Measures the loss, its lower bound and the value of each word at several noise levels.",
    )
    parser.add_argument("--weights", type=Path, help="a weights folder (default: the shipped model)")
    parser.add_argument("--samples", type=int, default=32, help="number of images and of clips (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace) -> dict:
    if args.samples < 1 or args.seed < 0:
        raise UserError(f"--samples must be at least 1 and --seed at least 0; given {args.samples} and {args.seed}")
    results.check_path(args.json, KIND)
    start, folder = time.perf_counter(), cascade.stage_folder(args.weights, "base")
    rows = measure(cascade.load(folder, stages=("base",)).base, count=args.samples, seed=args.seed)
    return {
        "kind": KIND, "weights": os.fspath(folder), "weights_hash": folder_hash(folder), "samples": args.samples,
        "seed": args.seed, "levels": rows, "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        result = _measure(args)
    columns = list(next(iter(result["levels"].values())))
    lines = [[str(t), *(f"{row[name]:.3f}" for name in columns)] for t, row in result["levels"].items()]
    print(results.markdown(["t", *columns], lines))
    if args.json:
        results.write(args.json, result)


if __name__ == "__main__":
    main()
