"""How near interpolation and super-resolution come to the truth, on clips of Moving Shapes, which is known.

    python -m lavie_jax.evaluation.cascade --interpolation-weights DIR --vsr-weights DIR [--clips 16] [--json FILE]

Interpolation makes 61 frames at 32 fps from every 4th of them, and 17 frames at 8 fps, with four times as much motion;
what is compared are the frames in between, all through the stage's VAE: the model's, key frames repeated, key frames
blended linearly, and the true frames, which are the ceiling. Super-resolution makes 256x256 frames from the means of
their 4x4 squares: the model's, the same without its temporal layers, in LaVie's chunks of 8 frames, bicubic
enlargement, and the true frames through the VAE.
Clips 0, 1, ... of a split (`--split`, held_out by default) that do not stand still; clip i has seed `--seed` + i.
Without `--...-weights` the shipped models are measured.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from einops import reduce
from jaxtyping import UInt8
from PIL import Image
from tqdm.auto import tqdm

from lavie_jax import cascade
from lavie_jax.data import moving_shapes
from lavie_jax.data.moving_shapes import Sample
from lavie_jax.errors import Parser, UserError, one_line_errors, suggest
from lavie_jax.evaluation import results
from lavie_jax.evaluation.fidelity import flicker, object_box, psnr, sharpness
from lavie_jax.stages.interpolation import KEY_FRAME_SPACING
from lavie_jax.training.diffusion import image_as_video
from lavie_jax.weights import folder_hash

KIND = "cascade"  # what marks our own JSON, which may be written anew
SPLITS = ("val", "held_out", "image_only")
FEW_FRAMES = 17  # as long as 61 at KEY_FRAME_SPACING times the frame rate
SCALE = 4  # pixels of a side for each low-resolution pixel

Clip = UInt8[np.ndarray, "t h w 3"]
Longer = UInt8[np.ndarray, "frames H W 3"]  # or larger
Make = Callable[[Clip, str, int], Longer]  # (low-rate or low-resolution clip, caption, seed) -> the clip
Table = dict[str, dict[str, float]]


def moving_samples(split: str, count: int, **shape: float) -> list[Sample]:
    """The first `count` clips of a split in which the object moves; `shape` as `moving_shapes.clip` takes it."""
    samples, index = [], 0
    while len(samples) < count:
        sample = moving_shapes.clip(split, index, **shape)
        samples += [sample] if sample.attributes.motion != "still" else []
        index += 1
    return samples


# ---- ways to make the frames ----


def through_vae(pipe: cascade.Cascade, stage: str) -> Callable[[Clip], Clip]:
    """Frames -> frames, by the stage's VAE and the posterior's mean."""

    def through(frames: Clip) -> Clip:
        model = pipe.model(stage)
        return np.concatenate(list(model.decode(model.encode(frames))))

    return through


def by_model(pipe: cascade.Cascade, stage: str, **settings: str | int) -> Make:
    """The stage as a user samples it, with the settings of its weights but for `settings`."""

    def make(clip: Clip, caption: str, seed: int) -> Longer:
        return pipe(caption, stages=(stage,), clip=clip, seed=seed, **{stage: settings})[0]

    return make


def without_temporal_layers(pipe: cascade.Cascade, stage: str) -> cascade.Cascade:
    """The image model inside: everything temporal adds nothing."""
    weights = pipe.weights[stage]
    unet = dataclasses.replace(weights.unet, params=image_as_video(weights.unet.params))
    return cascade.Cascade({stage: dataclasses.replace(weights, unet=unet)}, dtype=pipe.dtype, devices=pipe.devices)


def repeated(keys: Clip) -> Longer:
    """Each frame is the nearest key frame, the earlier of two."""
    frames = np.arange(KEY_FRAME_SPACING * (len(keys) - 1) + 1)
    return keys[(frames + KEY_FRAME_SPACING // 2 - 1) // KEY_FRAME_SPACING]


def blended(keys: Clip) -> Longer:
    """Each frame is the mean of the key frames around it, weighted by nearness."""
    place = np.arange(KEY_FRAME_SPACING * (len(keys) - 1) + 1) / KEY_FRAME_SPACING
    before = np.minimum(place.astype(int), len(keys) - 2)
    share = (place - before).astype(np.float32)[:, None, None, None]
    return ((1 - share) * keys[before] + share * keys[before + 1] + 0.5).astype(np.uint8)


def smaller(clip: Longer) -> Clip:
    """Each pixel is the mean of a square of SCALE x SCALE, as in training."""
    means = reduce(clip.astype(np.float32), "t (h rows) (w columns) c -> t h w c", "mean", rows=SCALE, columns=SCALE)
    return (means + 0.5).astype(np.uint8)


def bicubic(clip: Clip) -> Longer:
    """SCALE times the size, frame by frame."""
    size = SCALE * clip.shape[2], SCALE * clip.shape[1]
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in clip])


# ---- the measures ----


def interpolation(pipe: cascade.Cascade, samples: Sequence[Sample], seed: int) -> Table:
    """PSNR of the frames between key frames, of all pixels and inside the moving object's box: {row: {column}}."""
    model, vae = by_model(pipe, "interpolation"), through_vae(pipe, "interpolation")
    rows: dict[str, Make] = {
        "model": model,
        "blended key frames": lambda keys, *_: vae(blended(keys)),
        "repeated key frames": lambda keys, *_: vae(repeated(keys)),
    }

    def measure(made: Clip, true: Clip) -> dict[str, float]:
        between = np.arange(len(true)) % KEY_FRAME_SPACING != 0
        made, true = made[between], true[between]
        return {"psnr": psnr(made, true), "psnr_in_box": psnr(made, true, object_box(true))}

    return compare(rows, vae, samples, seed, lambda clip: clip[::KEY_FRAME_SPACING], measure)


def super_resolution(pipe: cascade.Cascade, samples: Sequence[Sample], seed: int) -> Table:
    """PSNR, sharpness of edges (1: as the truth's) and flicker (of 255) of enlarged clips: {row: {column}}."""
    rows: dict[str, Make] = {
        "model": by_model(pipe, "vsr"),
        "model, chunks of 8 frames": by_model(pipe, "vsr", windows="official"),
        "model without temporal layers": by_model(without_temporal_layers(pipe, "vsr"), "vsr"),
        "bicubic": lambda clip, *_: bicubic(clip),
    }

    return compare(rows, through_vae(pipe, "vsr"), samples, seed, smaller, enlargement)


def enlargement(made: Clip, true: Clip) -> dict[str, float]:
    """What is measured of an enlarged clip."""
    return {
        "psnr": psnr(made, true),
        "psnr_in_box": psnr(made, true, object_box(true)),
        "sharpness": sharpness(made, true),
        "flicker": flicker(made, true),
    }


def compare(
    rows: Mapping[str, Make],
    vae: Callable[[Clip], Clip],
    samples: Sequence[Sample],
    seed: int,
    source: Callable[[Longer], Clip],
    measure: Callable[[Clip, Clip], dict[str, float]],
) -> Table:
    """Each row's means over the samples, what it makes of each sample's `source`; last the true frames by the VAE."""
    table = {}
    for row in (*rows, "true frames through the VAE"):
        cells = []
        for i, sample in enumerate(tqdm(samples, desc=row, unit="clip")):
            true = sample.pixels
            made = rows[row](source(true), sample.caption, seed + i) if row in rows else vae(true)
            cells.append(measure(made, true))
        table[row] = {column: float(np.mean([cell[column] for cell in cells])) for column in cells[0]}
    return table


# ---- the command ----


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.cascade",
        description="Interpolation and super-resolution against the truth, on Moving Shapes.",
    )
    parser.add_argument("--interpolation-weights", type=Path, help="a weights folder; default: the shipped one")
    parser.add_argument("--vsr-weights", type=Path, help="likewise")
    parser.add_argument("--stages", default="interpolation,vsr", help="which to measure")
    parser.add_argument("--split", default="held_out", help=f"one of {', '.join(SPLITS)}")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--vsr-frames", type=int, default=61, help="of a clip in super-resolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the tables here")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> list[str]:
    """The stages; UserError for what would fail, or destroy a file, only after the sampling."""
    stages = args.stages.split(",")
    for stage in stages:
        if stage not in MEASURES:
            raise UserError(f"stages: unknown {stage!r}{suggest(stage, MEASURES)}")
    if args.split not in SPLITS:
        raise UserError(f"unknown split {args.split!r}{suggest(args.split, SPLITS)}")
    for name, low in (("clips", 1), ("vsr_frames", 2), ("seed", 0)):
        if getattr(args, name) < low:
            raise UserError(f"{name}: at least {low} is needed, given {getattr(args, name)}")
    results.check_place(args.json, KIND)
    return stages


MEASURES = {"interpolation": interpolation, "vsr": super_resolution}


def _measure(args: argparse.Namespace, stages: Sequence[str]) -> dict:
    begin, tables, hashes = time.perf_counter(), {}, {}
    given = {stage: getattr(args, f"{stage}_weights") for stage in stages}
    folders = {**cascade.stage_folders(), **{stage: folder for stage, folder in given.items() if folder}}
    for stage in stages:
        if stage not in folders:
            raise UserError(f"no {stage} model is shipped: give --{stage}-weights")
    for stage in stages:
        logging.info("stage %s", stage)
        pipe = cascade.load(folders={stage: folders[stage]}, devices=jax.local_devices())
        sampling, factor = pipe.weights[stage].sampling, pipe.weights[stage].vae.config.factor
        side = {name: sampling[name] - sampling[name] % (SCALE * factor) for name in ("height", "width")}
        lengths = {stage: (args.vsr_frames, sampling["fps"])}
        if stage == "interpolation":
            frames, fps = sampling["frames"], sampling["fps"]
            slower = f"{stage}, {KEY_FRAME_SPACING} times the motion"
            lengths = {stage: (frames, fps), slower: (FEW_FRAMES, fps / KEY_FRAME_SPACING)}
        for name, (frames, fps) in lengths.items():
            samples = moving_samples(args.split, args.clips, frames=frames, fps=fps, **side)
            tables[name] = MEASURES[stage](pipe, samples, args.seed)
        hashes[stage] = {"weights": os.fspath(folders[stage]), "hash": folder_hash(folders[stage])}
    seconds = round(time.perf_counter() - begin, 1)
    return {"kind": KIND, "split": args.split, "clips": args.clips, "seed": args.seed, "seconds": seconds,
            "models": hashes, "tables": tables}  # fmt: skip


def markdown(tables: Mapping[str, Table]) -> str:
    """A table for each stage."""
    parts = []
    for stage, table in tables.items():
        columns = list(next(iter(table.values())))
        rows = [[row, *(f"{cells[c]:.2f}" for c in columns)] for row, cells in table.items()]
        parts.append(results.markdown([stage, *columns], rows))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    with one_line_errors():
        args = _parse(argv)
        result = _measure(args, _check(args))
    print(markdown(result["tables"]))
    if args.json:
        results.write(args.json, result)


if __name__ == "__main__":
    main()
