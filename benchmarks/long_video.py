"""Compares ways to make clips longer than those of training: plain sampling, FreeNoise, and independent windows.

    python benchmarks/long_video.py [--weights DIR] [--frames 32,64] [--samples 8] [--steps 10] [--json FILE]

"plain" asks the model for all frames at once, "free_noise" is `--long free_noise`, and "independent" joins clips of the
training's length with seeds of their own. All use the captions of the same Moving Shapes clips. Attributes are detected
in the whole clip and in each stretch of the training's length. "Border" is the mean absolute difference of consecutive
frames where such stretches meet over that elsewhere; 1 = no border. "Every 4" is the same where FreeNoise's windows
start. Cost per frame is in FLOPs of one guided step, counted in the traced program, and in CPU seconds of a sample
without compilation; memory is the compiler's figure for the temporaries of that step. Needs no accelerator.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lavie_jax import cascade, parallel, results
from lavie_jax.cascade.denoising import adapted, predict_rows, sequential_guidance
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.evaluation.detectors import detect
from lavie_jax.evaluation.moving_shapes import ROWS, score, true_samples
from lavie_jax.flops import count_flops
from lavie_jax.stages.conditioning import Condition, Prompts

KIND = "long_video"
METHODS = ("plain", "free_noise", "independent")
SHEET_ROWS = 2  # captions on the contact sheet
SEED_STEP = 1000  # between the seeds of independent windows


def settings_of(pipe: cascade.Cascade, method: str, frames: int, steps: int | None):
    """Returns the base stage's settings of a method that takes the whole clip."""
    given = {"frames": frames, "steps": steps, "long": "free_noise" if method == "free_noise" else None}
    return cascade.resolve_settings(pipe.weights, ["base"], {"base": given})["base"]


# ---- cost ----


def cost(pipe: cascade.Cascade, method: str, frames: int) -> dict[str, float]:
    """Returns the FLOPs and the bytes of temporaries of one guided step of a whole clip."""
    model, settings = pipe.base, settings_of(pipe, method, frames, None)
    stage, shape = model.stage, model.stage.latent_shape(model.weights, settings)
    (window,) = stage.windows(shape, settings)
    prompt = model.encode_text([""])
    text = Prompts(jax.ShapeDtypeStruct(prompt.hidden.shape, prompt.hidden.dtype))
    traced = predict_rows.trace(
        model.unet_params, jax.ShapeDtypeStruct((1, *shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32),
        text, text, Condition(), unet=adapted(model.unet, stage.attention_windows(settings), None),
        guidance=float(settings.guidance), rescale=float(settings.guidance_rescale), image=False,
        sequential_guidance=sequential_guidance(1, window, model.mesh), mesh=model.mesh,
    )  # fmt: skip
    memory = traced.lower().compile().memory_analysis()
    return {"flops": count_flops(traced.jaxpr), "temporary": memory.temp_size_in_bytes}


def measure_costs(pipe: cascade.Cascade, lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Returns the costs of the methods that take the whole clip, and of a clip of the training's length."""
    trained = pipe.weights["base"].sampling["frames"]
    costs = {f"{trained}/plain": cost(pipe, "plain", trained)}
    for frames in lengths:
        costs |= {f"{frames}/{method}": cost(pipe, method, frames) for method in METHODS[:2]}
        print(frames, costs[f"{frames}/plain"], costs[f"{frames}/free_noise"], flush=True)
    return costs


# ---- samples ----


def make(pipe: cascade.Cascade, method: str, frames: int, caption: str, seed: int, steps: int | None) -> np.ndarray:
    """Returns one clip, uint8 (frames, H, W, 3)."""
    if method != "independent":
        long = "free_noise" if method == "free_noise" else None
        return pipe(caption, frames=frames, seed=seed, steps=steps, long=long)[0]
    trained = pipe.weights["base"].sampling["frames"]
    parts = [
        pipe(caption, frames=trained, seed=seed + SEED_STEP * k, steps=steps)[0] for k in range(-(-frames // trained))
    ]
    return np.concatenate(parts)[:frames]


def make_all(
    pipe: cascade.Cascade,
    caption: str,
    seed: int,
    lengths: Sequence[int],
    steps: int | None,
    clips: dict[str, list[np.ndarray]],
    costs: dict[str, dict[str, float]],
) -> None:
    """Adds a clip of every method and length to `clips`, and the least CPU seconds per frame to `costs`."""
    for method in METHODS[:2]:
        for frames in lengths:
            key, start = f"{frames}/{method}", time.process_time()
            compiled = key in clips
            clips.setdefault(key, []).append(make(pipe, method, frames, caption, seed, steps))
            seconds = (time.process_time() - start) / frames
            if compiled:
                costs[key]["seconds"] = min(seconds, costs[key].get("seconds", math.inf))
    longest = make(pipe, "independent", max(lengths), caption, seed, steps)
    for frames in lengths:  # the first windows of the longest clip
        clips.setdefault(f"{frames}/independent", []).append(longest[:frames])


def border(clip: np.ndarray, every: int) -> float:
    """Returns the mean change from frame to frame at multiples of `every` over that elsewhere."""
    change = np.abs(np.diff(clip.astype(np.float32), axis=0)).mean((1, 2, 3))
    at = np.arange(1, len(clip)) % every == 0
    return float(change[at].mean() / change[~at].mean())


def sheet(clips: Mapping[str, list[np.ndarray]], samples: Sequence, frames: int, path: Path) -> None:
    """Writes a contact sheet of the first captions' clips of one length."""
    rows = [
        (f"{method}: {sample.caption}", clips[f"{frames}/{method}"][i])
        for i, sample in enumerate(samples[: len(clips[f"{frames}/plain"])])
        for method in METHODS
    ]
    contact_sheet([clip for _, clip in rows], [name for name, _ in rows], path, columns=8)


def mean(values: Sequence[float]) -> dict[str, float]:
    """Returns the mean with its standard error."""
    return {
        "mean": float(np.mean(values)),
        "stderr": float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0,
        "n": len(values),
    }


def measure(clips: Sequence[np.ndarray], samples: Sequence, trained: int, fps: float) -> dict:
    """Returns attributes of whole clips and of stretches, and change at borders."""
    wanted = [sample.attributes for sample in samples]
    stretches = [[clip[i : i + trained] for clip in clips] for i in range(0, len(clips[0]), trained)]
    stretches = [parts for parts in stretches if len(parts[0]) == trained]
    detected = [[detect(part, fps=fps) for part in parts] for parts in stretches]
    return {
        "whole": score([detect(clip, fps=fps) for clip in clips], wanted),
        "stretches": score(sum(detected, []), wanted * len(detected)),
        "each stretch": [score(row, wanted) for row in detected],
        "border": mean([border(clip, trained) for clip in clips]),
        "every 4": mean([border(clip, trained // 4) for clip in clips]),
        "change": mean([float(np.abs(np.diff(clip.astype(np.float32), axis=0)).mean()) for clip in clips]),
    }


# ---- the command ----


def cell(value: Mapping[str, float], scale: float = 1) -> str:
    """Returns "mean ± standard error"."""
    digits = 0 if scale == 100 else 2
    return f"{scale * value.get('accuracy', value.get('mean')):.{digits}f} ± {scale * value['stderr']:.{digits}f}"


def tables(measured: dict, costs: dict) -> str:
    """Returns the tables of attributes, of stretches and of cost."""
    names = list(ROWS)
    whole = [[*key.split("/"), *(cell(row["whole"][n], 100) for n in names)] for key, row in measured.items()]
    parts = [
        [*key.split("/"), *(cell(row["stretches"][n], 100) for n in names), cell(row["border"]), cell(row["every 4"])]
        for key, row in measured.items()
    ]
    spent = [
        [
            *key.split("/"), f"{row['flops'] / 1e9 / int(key.split('/')[0]):.3f}",
            f"{row['temporary'] / 2**20 / int(key.split('/')[0]):.2f}", f"{row.get('seconds', float('nan')):.3f}",
        ]
        for key, row in costs.items()
    ]  # fmt: skip
    return "\n\n".join(
        [
            results.markdown(["frames", "method", *names], whole),
            results.markdown(["frames", "method", *(f"{n}, stretches" for n in names), "border", "every 4"], parts),
            results.markdown(
                ["frames", "method", "GFLOP per frame and step", "MiB per frame", "CPU s per frame"], spent
            ),
        ]
    )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="weights folder (default: the shipped model)")
    parser.add_argument("--frames", default="32,64", help="lengths (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="captions; 0 measures cost only (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the weights' own)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first captions to this file")
    args = parser.parse_args()
    results.check_path(args.json, KIND)
    lengths = [int(word) if word.strip().isdecimal() else 0 for word in args.frames.split(",")]
    if min(lengths) < 1:
        raise UserError(f"--frames must be numbers of frames, as in 32,64, not {args.frames!r}")
    if args.samples < 0:
        raise UserError(f"--samples must be at least 0, not {args.samples}")
    parallel.keep_compiled_programs()
    pipe = cascade.load(args.weights, stages=["base"])
    sampling = pipe.weights["base"].sampling
    costs = measure_costs(pipe, lengths)
    clips: dict[str, list[np.ndarray]] = {}
    samples = true_samples("val", args.samples, sampling) if args.samples else []
    result = {"kind": KIND, "steps": args.steps or sampling["steps"], "n": 0, "cost": costs, "samples": {}}
    for seed, sample in enumerate(samples):
        make_all(pipe, sample.caption, seed, lengths, args.steps, clips, costs)
        result["n"] = seed + 1
        for key, made in clips.items():
            result["samples"][key] = measure(made, samples[: seed + 1], sampling["frames"], sampling["fps"])
        print(f"{seed + 1} of {len(samples)} captions, {time.process_time():.0f} CPU s", flush=True)
        if args.json:  # after every caption, so that a run may be ended early
            results.write(args.json, result)
        if args.sheet:
            sheet(clips, samples[:SHEET_ROWS], max(lengths), args.sheet)
    print(tables(result["samples"], costs))
    if args.json:
        results.write(args.json, result)


if __name__ == "__main__":
    with one_line_errors():
        main()
