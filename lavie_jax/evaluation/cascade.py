"""Compares interpolation and super-resolution with the true frames, on clips of Moving Shapes.

    python -m lavie_jax.evaluation.cascade --interpolation-weights DIR --vsr-weights DIR [--clips 16] [--json FILE]

Interpolation generates 61 frames at 32 fps from every 4th of them, and 17 frames at 8 fps, with four times the motion
per frame. The frames in between are compared: the model's, repeated key frames, linearly blended key frames, and the
true frames, which are the upper bound, all passed through the stage's VAE. Super-resolution generates 256x256 frames
from the means of 4x4 squares. Its methods are the model, the model in LaVie's chunks of 8 frames, the model without
its temporal layers, bicubic enlargement, and the true frames passed through the VAE.

Uses clips 0, 1, ... of a split (`--split`, held_out by default), skipping those without motion. Clip i has seed
`--seed` + i. The default weights are the shipped models.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from einops import reduce
from jaxtyping import UInt8
from PIL import Image
from tqdm.auto import tqdm

from lavie_jax import cascade, results
from lavie_jax.data import moving_shapes
from lavie_jax.data.moving_shapes import Sample
from lavie_jax.errors import Parser, UserError, one_line_errors, suggest
from lavie_jax.evaluation.fidelity import flicker, object_box, psnr, sharpness
from lavie_jax.stages.interpolation import KEY_FRAME_SPACING
from lavie_jax.training.diffusion import image_as_video
from lavie_jax.weights import folder_hash

KIND = "cascade"  # of the result file
SPLITS = ("val", "held_out", "image_only")
FEW_FRAMES = 17  # as long as 61 frames at KEY_FRAME_SPACING times the rate
SCALE = 4  # of super-resolution, per side

Clip = UInt8[np.ndarray, "t h w 3"]
Output = UInt8[np.ndarray, "frames H W 3"]  # longer or larger than the input
Method = Callable[[Clip, str, int], Output]  # (low-rate or low-resolution clip, caption, seed) -> clip
Table = dict[str, dict[str, float]]


def moving_samples(split: str, count: int, **shape: float) -> list[Sample]:
    """Returns the first `count` clips of a split with motion; `shape` is passed to `moving_shapes.clip`."""
    samples, index = [], 0
    while len(samples) < count:
        sample = moving_shapes.clip(split, index, **shape)
        samples += [sample] if sample.attributes.motion != "still" else []
        index += 1
    return samples


# ---- methods that generate the frames ----


def through_vae(pipe: cascade.Cascade, stage: str) -> Callable[[Clip], Clip]:
    """Returns a function that encodes frames to the posterior mean of the stage's VAE and decodes them again."""

    def reconstruct(frames: Clip) -> Clip:
        model = pipe.model(stage)
        return np.concatenate(list(model.decode(model.encode(frames))))

    return reconstruct


def by_model(pipe: cascade.Cascade, stage: str, **settings: str | int) -> Method:
    """Returns the stage as a method; `settings` override those of its weights."""

    def sample(clip: Clip, caption: str, seed: int) -> Output:
        return pipe(caption, stages=(stage,), clip=clip, seed=seed, **{stage: settings})[0]

    return sample


def without_temporal_layers(pipe: cascade.Cascade, stage: str) -> cascade.Cascade:
    """Returns the cascade with a stage whose temporal layers contribute nothing, an image model."""
    weights = pipe.weights[stage]
    unet = dataclasses.replace(weights.unet, params=image_as_video(weights.unet.params))
    return cascade.Cascade({stage: dataclasses.replace(weights, unet=unet)}, dtype=pipe.dtype, devices=pipe.devices)


def repeated(keys: Clip) -> Output:
    """Repeats the nearest key frame; the earlier one if two are equally near."""
    frames = np.arange(KEY_FRAME_SPACING * (len(keys) - 1) + 1)
    return keys[(frames + KEY_FRAME_SPACING // 2 - 1) // KEY_FRAME_SPACING]


def blended(keys: Clip) -> Output:
    """Interpolates linearly between key frames."""
    position = np.arange(KEY_FRAME_SPACING * (len(keys) - 1) + 1) / KEY_FRAME_SPACING
    before = np.minimum(position.astype(int), len(keys) - 2)
    weight = (position - before).astype(np.float32)[:, None, None, None]
    return ((1 - weight) * keys[before] + weight * keys[before + 1] + 0.5).astype(np.uint8)


def downscaled(clip: Output) -> Clip:
    """Averages squares of SCALE x SCALE pixels, as in training."""
    means = reduce(clip.astype(np.float32), "t (h rows) (w columns) c -> t h w c", "mean", rows=SCALE, columns=SCALE)
    return (means + 0.5).astype(np.uint8)


def bicubic(clip: Clip) -> Output:
    """Enlarges each frame by SCALE."""
    size = SCALE * clip.shape[2], SCALE * clip.shape[1]
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in clip])


# ---- measurements ----


def interpolation(pipe: cascade.Cascade, samples: Sequence[Sample], seed: int) -> Table:
    """Returns the PSNR of the frames between key frames, over all pixels and within the moving object's box."""
    vae = through_vae(pipe, "interpolation")
    methods: dict[str, Method] = {
        "model": by_model(pipe, "interpolation"),
        "blended key frames": lambda keys, *_: vae(blended(keys)),
        "repeated key frames": lambda keys, *_: vae(repeated(keys)),
    }

    def measure(clip: Clip, true: Clip) -> dict[str, float]:
        between = np.arange(len(true)) % KEY_FRAME_SPACING != 0
        clip, true = clip[between], true[between]
        return {"psnr": psnr(clip, true), "psnr_in_box": psnr(clip, true, object_box(true))}

    return compare(methods, vae, samples, seed, lambda clip: clip[::KEY_FRAME_SPACING], measure)


def super_resolution(pipe: cascade.Cascade, samples: Sequence[Sample], seed: int) -> Table:
    """Returns the measures of `enlargement` for each method."""
    methods: dict[str, Method] = {
        "model": by_model(pipe, "vsr"),
        "model, chunks of 8 frames": by_model(pipe, "vsr", windows="official"),
        "model without temporal layers": by_model(without_temporal_layers(pipe, "vsr"), "vsr"),
        "bicubic": lambda clip, *_: bicubic(clip),
    }
    return compare(methods, through_vae(pipe, "vsr"), samples, seed, downscaled, enlargement)


def enlargement(clip: Clip, true: Clip) -> dict[str, float]:
    """Returns PSNR, sharpness of edges (1 = as sharp as the true clip) and flicker (of 255) of an enlarged clip."""
    return {
        "psnr": psnr(clip, true),
        "psnr_in_box": psnr(clip, true, object_box(true)),
        "sharpness": sharpness(clip, true),
        "flicker": flicker(clip, true),
    }


def compare(
    methods: Mapping[str, Method],
    vae: Callable[[Clip], Clip],
    samples: Sequence[Sample],
    seed: int,
    degrade: Callable[[Output], Clip],
    measure: Callable[[Clip, Clip], dict[str, float]],
) -> Table:
    """Compares each method's output for degraded clips with the original clips.

    Args:
        degrade: computes a method's input from the true clip.
        measure: (generated clip, true clip) -> {column: value}.

    Returns:
        {method: {column: mean over the samples}}. The last row is the true frames passed through the VAE.
    """
    table = {}
    for row in (*methods, "true frames through the VAE"):
        cells = []
        for i, sample in enumerate(tqdm(samples, desc=row, unit="clip")):
            true = sample.pixels
            clip = methods[row](degrade(true), sample.caption, seed + i) if row in methods else vae(true)
            cells.append(measure(clip, true))
        table[row] = {column: float(np.mean([cell[column] for cell in cells])) for column in cells[0]}
    return table


MEASURES = {"interpolation": interpolation, "vsr": super_resolution}


# ---- the command ----


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.cascade",
        description="Compares interpolation and super-resolution with the true frames, on Moving Shapes.",
    )
    for stage in MEASURES:
        parser.add_argument(f"--{stage}-weights", type=Path, help="a weights folder (default: the shipped one)")
    parser.add_argument("--stages", default=",".join(MEASURES), help="stages to measure (default: %(default)s)")
    parser.add_argument("--split", default="held_out", help=f"one of {', '.join(SPLITS)} (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=16, help="number of clips (default: %(default)s)")
    parser.add_argument(
        "--vsr-frames", type=int, default=61, help="frames per clip in super-resolution (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the tables to this file")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> list[str]:
    """Checks everything that would otherwise fail, or replace a file, after sampling; returns the stages."""
    stages = args.stages.split(",")
    for stage in stages:
        if stage not in MEASURES:
            raise UserError(f"--stages: unknown stage {stage!r}{suggest(stage, MEASURES)}")
    if args.split not in SPLITS:
        raise UserError(f"unknown split {args.split!r}{suggest(args.split, SPLITS)}")
    for name, low in (("clips", 1), ("vsr_frames", 2), ("seed", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}; given {getattr(args, name)}")
    results.check_path(args.json, KIND)
    return stages


def _measure(args: argparse.Namespace, stages: Sequence[str]) -> dict:
    start, tables, models = time.perf_counter(), {}, {}
    named = {stage: getattr(args, f"{stage}_weights") for stage in stages}
    folders = {**cascade.stage_folders(), **{stage: folder for stage, folder in named.items() if folder}}
    for stage in stages:
        if stage not in folders:
            raise UserError(f"no {stage} model is shipped: give a weights folder with --{stage}-weights")
    for stage in stages:
        logging.info("stage %s", stage)
        pipe = cascade.load(folders={stage: folders[stage]})
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
        models[stage] = {"weights": os.fspath(folders[stage]), "hash": folder_hash(folders[stage])}
    seconds = round(time.perf_counter() - start, 1)
    return {"kind": KIND, "split": args.split, "clips": args.clips, "seed": args.seed, "seconds": seconds,
            "models": models, "tables": tables}  # fmt: skip


def markdown(tables: Mapping[str, Table]) -> str:
    """Returns a table for each stage."""
    parts = []
    for stage, table in tables.items():
        columns = list(next(iter(table.values())))
        rows = [[row, *(f"{cells[c]:.2f}" for c in columns)] for row, cells in table.items()]
        parts.append(results.markdown([stage, *columns], rows))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        result = _measure(args, _check(args))
    print(markdown(result["tables"]))
    if args.json:
        results.write(args.json, result)


if __name__ == "__main__":
    main()
