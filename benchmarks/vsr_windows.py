"""Cuts and cost of the super-resolution stage's windows: blended against the original's chunks of 8 frames.

    python benchmarks/vsr_windows.py --weights weights/vsr [--input clip.mp4 --prompt TEXT] [--json FILE]

A cut shows as frames that differ more across a window's border than inside a window. What moves in the clip itself is
taken off first: differences are of what the model adds to its input, enlarged bicubically. Each way of cutting the clip
is judged at its own borders (blended windows: all pairs of frames in an overlap) and at those of the official chunks,
where a blended clip should show nothing. "Ratio" is the mean difference at borders over that inside, 1 without cuts.
The cost of overlapping is UNet windows and seconds, compiling left out. Without --input: clips of Moving Shapes, at the
size of the weights' settings.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from lavie_jax import cascade
from lavie_jax.data import moving_shapes
from lavie_jax.data.video_files import read_clip
from lavie_jax.errors import UserError
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo

WAYS = {
    "official": {"windows": "official"},
    "blended, 1 frame shared": {"overlap_frames": 1},
    "blended, 2 frames shared": {"overlap_frames": 2},
    "blended, 4 frames shared": {"overlap_frames": 4},
}


def clips(args: argparse.Namespace, pipe: cascade.Cascade) -> list[tuple[np.ndarray, str]]:
    """(low-resolution frames, prompt)."""
    if args.input:
        return [(read_clip(args.input)[0], args.prompt)]
    weights = pipe.weights["vsr"]
    sides = {side: weights.sampling[side] // weights.vae.config.factor for side in ("height", "width")}
    samples = [moving_shapes.clip("val", i, frames=args.frames, fps=24, **sides) for i in range(args.clips)]
    return [(sample.pixels, sample.caption) for sample in samples]


def enlarged(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic."""
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images]).astype(np.float32)


def pairs_at_borders(windows: list) -> set[int]:
    """Each i for which frames i and i + 1 are on two sides of a border, or together in an overlap."""
    bounds = sorted({(window.spans[0].start, window.spans[0].stop) for window in windows})
    return {i for (_, stop), (start, _) in zip(bounds, bounds[1:]) for i in range(start - 1, stop)}


def ratio(steps: np.ndarray, at_borders: set[int]) -> float:
    """Mean of `steps` (a difference for each pair of frames) at borders over that elsewhere."""
    inside = np.array([i not in at_borders for i in range(len(steps))])
    return float(steps[~inside].mean() / steps[inside].mean()) if inside.any() and not inside.all() else float("nan")


def measure(pipe: cascade.Cascade, name: str, clip: np.ndarray, prompt: str, args: argparse.Namespace) -> dict:
    given = {"steps": args.steps, **WAYS[name]}
    info = ClipInfo(frames=len(clip), height=clip.shape[1], width=clip.shape[2], fps=24, own=True)

    def of(given):
        settings = cascade.resolve_settings(pipe.weights, ["vsr"], {"vsr": given}, info)["vsr"]
        return settings, STAGES["vsr"].windows(STAGES["vsr"].latent_shape(pipe.weights["vsr"], settings), settings)

    settings, windows = of(given)
    _, chunks = of({**given, "windows": "official"})
    begin = time.perf_counter()
    (video,) = pipe(prompt, stages=("vsr",), clip=clip, vsr=given, seed=args.seed)
    seconds = time.perf_counter() - begin
    added = video.astype(np.float32) - enlarged(clip, settings.height, settings.width)
    steps = np.abs(np.diff(added, axis=0)).mean((1, 2, 3))
    return {
        "ratio at its borders": ratio(steps, pairs_at_borders(windows)),
        "ratio at official borders": ratio(steps, pairs_at_borders(chunks)),
        "difference of neighbours": float(steps.mean()),
        "windows": len(windows),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="of the vsr stage, or of a cascade")
    parser.add_argument("--input", type=Path, help="a low-resolution clip")
    parser.add_argument("--prompt", default="", help="of --input")
    parser.add_argument("--clips", type=int, default=8, help="of Moving Shapes (default 8)")
    parser.add_argument("--frames", type=int, default=61, help="of each (default 61)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        pipe = cascade.load(args.weights, stages=["vsr"])
        todo = clips(args, pipe)
        rows = {}
        for name in WAYS:
            measure(pipe, name, *todo[0], args)  # compiles
            rows[name] = [measure(pipe, name, clip, prompt, args) for clip, prompt in todo]
    except UserError as error:
        sys.exit(f"error: {error}")
    means = {
        name: {key: float(np.mean([row[key] for row in found])) for key in found[0]} for name, found in rows.items()
    }
    columns = list(next(iter(means.values())))
    print(f"{len(todo)} clips of {todo[0][0].shape}, {jax.devices()[0].device_kind}, {pipe.dtype.name}")
    print("| way | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 1) + "|")
    for name, row in means.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.4g}" for key in columns) + " |")
    if args.json:
        args.json.write_text(json.dumps(means, indent=2) + "\n")


if __name__ == "__main__":
    main()
