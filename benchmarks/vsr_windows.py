"""Measures seams and cost of super-resolution windows: blended windows against the original's chunks of 8 frames.

    python benchmarks/vsr_windows.py --weights weights/vsr [--input clip.mp4 --prompt TEXT] [--json FILE]

At a visible seam, consecutive frames differ more across a window's border than inside a window. To exclude motion in
the clip itself, differences are taken of what the model adds to its bicubically enlarged input. Each method is measured
at its own borders (for blended windows, all pairs of frames in an overlap) and at those of the official chunks, where a
blended clip should have no seams. "Ratio" is the mean difference at borders over that elsewhere; 1 = no seams. The cost
of overlaps is given as numbers of windows and as seconds without compilation. Runs on any device. Without --input, uses
clips of Moving Shapes at the size of the weights' settings.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from lavie_jax import cascade, results
from lavie_jax.data import moving_shapes
from lavie_jax.data.video_files import read_clip
from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo

METHODS = {
    "official": {"windows": "official"},
    "blended, 1 frame shared": {"overlap_frames": 1},
    "blended, 2 frames shared": {"overlap_frames": 2},
    "blended, 4 frames shared": {"overlap_frames": 4},
}


def clips(args: argparse.Namespace, pipe: cascade.Cascade) -> list[tuple[np.ndarray, str]]:
    """Returns pairs of low-resolution frames and prompt."""
    if args.input:
        return [(read_clip(args.input)[0], args.prompt)]
    weights = pipe.weights["vsr"]
    sides = {side: weights.sampling[side] // weights.vae.config.factor for side in ("height", "width")}
    samples = [moving_shapes.clip("val", i, frames=args.frames, fps=24, **sides) for i in range(args.clips)]
    return [(sample.pixels, sample.caption) for sample in samples]


def enlarged(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarges each frame bicubically."""
    images = (Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images]).astype(np.float32)


def pairs_at_borders(windows: list) -> set[int]:
    """Returns each i for which frames i and i + 1 lie on opposite sides of a border, or both in an overlap."""
    bounds = sorted({(window.spans[0].start, window.spans[0].stop) for window in windows})
    return {i for (_, stop), (start, _) in zip(bounds, bounds[1:]) for i in range(start - 1, stop)}


def ratio(steps: np.ndarray, at_borders: set[int]) -> float:
    """Returns the mean of `steps`, a difference per pair of frames, at borders over that elsewhere."""
    inside = np.array([i not in at_borders for i in range(len(steps))])
    return float(steps[~inside].mean() / steps[inside].mean()) if inside.any() and not inside.all() else float("nan")


def measure(pipe: cascade.Cascade, name: str, clip: np.ndarray, prompt: str, args: argparse.Namespace) -> dict:
    """Returns one value per column for a method and a clip."""
    given = {"steps": args.steps, **METHODS[name]}
    info = ClipInfo(frames=len(clip), height=clip.shape[1], width=clip.shape[2], fps=24, own=True)

    def settings_and_windows(given):
        settings = cascade.resolve_settings(pipe.weights, ["vsr"], {"vsr": given}, info)["vsr"]
        stage = STAGES["vsr"]
        return settings, stage.windows(stage.latent_shape(pipe.weights["vsr"], settings), settings)

    settings, windows = settings_and_windows(given)
    _, chunks = settings_and_windows({**given, "windows": "official"})
    start = time.perf_counter()
    (video,) = pipe(prompt, stages=("vsr",), clip=clip, vsr=given, seed=args.seed)
    seconds = time.perf_counter() - start
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
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the vsr stage or of a cascade")
    parser.add_argument("--input", type=Path, help="a low-resolution clip")
    parser.add_argument("--prompt", default="", help="prompt of --input")
    parser.add_argument("--clips", type=int, default=8, help="number of Moving Shapes clips (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=61, help="frames per clip (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the weights' own)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    try:
        pipe = cascade.load(args.weights, stages=["vsr"])
        todo = clips(args, pipe)
        rows = {}
        for name in METHODS:
            measure(pipe, name, *todo[0], args)  # compiles
            rows[name] = [measure(pipe, name, clip, prompt, args) for clip, prompt in todo]
    except UserError as error:
        sys.exit(f"error: {error}")
    means = {
        name: {key: float(np.mean([row[key] for row in measured])) for key in measured[0]}
        for name, measured in rows.items()
    }
    columns = list(next(iter(means.values())))
    print(f"{len(todo)} clips of {todo[0][0].shape}, {jax.devices()[0].device_kind}, {pipe.dtype.name}")
    cells = [[name, *(f"{row[key]:.4g}" for key in columns)] for name, row in means.items()]
    print(results.markdown(["windows", *columns], cells))
    if args.json:
        args.json.write_text(json.dumps(means, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
