"""Measures time and memory of sample.py by stage for longer and larger clips.

    python benchmarks/cascade_growth.py [--weights DIR] [--json FILE] [--plot FILE.png]
    python benchmarks/cascade_growth.py --frames 5,9 --sides 64 --steps 2    # a smoke test

Each row is one `sample.py` command on a clip of Moving Shapes, run twice: the first run fills the compilation cache
and the second is measured, including the start of Python and loading. Memory is the peak of anonymous memory, which
excludes mapped files. Needs Linux, and matplotlib (extra `plots`) for --plot.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from memory import run_measured

import lavie_jax
from lavie_jax.data import moving_shapes
from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.stages.interpolation import KEY_FRAME_SPACING

ROOT = Path(__file__).parents[1]
FPS = {"interpolation": 8, "vsr": 32}
INDEX = 1  # of the clip in `val`
SCALE = {"interpolation": 1, "vsr": 4}  # of the sides


def whole_numbers(text: str) -> list[int]:
    """Parses "17,61" to [17, 61]."""
    return [int(word) for word in text.split(",")]


def command(stages: str, args: argparse.Namespace, out: Path) -> list[str]:
    """Returns the command line of sample.py without prompt and input."""
    words = [sys.executable, ROOT / "sample.py", "--stages", stages, "--out", out, "--format", "mp4", "--overwrite"]
    words += ["--weights", args.weights] if args.weights else []
    for stage in stages.split(",") if args.steps else ():
        words += [f"--{stage}-steps" if stage != "base" else "--steps", args.steps]
    return [str(word) for word in words]


def measure(words: list[str], caption: str, cache: Path) -> dict[str, float]:
    """Returns seconds and GiB of the second of two runs."""
    for _ in range(2):
        seconds, peak = run_measured(
            [*words, "--prompt", caption], environment={"JAX_COMPILATION_CACHE_DIR": str(cache)}
        )
    return {"seconds": seconds, "gib": peak / 2**30}


def later_stage(stage: str, frames: int, side: int, args: argparse.Namespace, folder: Path) -> dict:
    """Measures a row: `frames` output frames from a clip of side x side pixels."""
    input_frames = (frames - 1) // KEY_FRAME_SPACING + 1 if stage == "interpolation" else frames
    clip = moving_shapes.clip("val", INDEX, frames=input_frames, fps=FPS[stage], height=side, width=side)
    path = folder / f"{stage}-{frames}-{side}.npz"
    lavie_jax.save_video(clip.pixels, path, fps=FPS[stage])
    words = [*command(stage, args, folder / path.stem), "--input", str(path)]
    output_frames = KEY_FRAME_SPACING * (input_frames - 1) + 1 if stage == "interpolation" else frames
    size = {"frames": output_frames, "side": side * SCALE[stage]}
    return {"stages": stage} | size | measure(words, clip.caption, folder / "cache")


def rows(args: argparse.Namespace, folder: Path):
    """Yields every row as soon as it is measured."""
    caption = moving_shapes.clip("val", INDEX, frames=2, fps=8, height=64, width=64).caption
    for stages in ("base", "base,interpolation,vsr"):
        words = command(stages, args, folder / "from-text")
        yield {"stages": stages} | measure(words, caption, folder / "cache")
    for frames in args.frames:
        for stage in FPS:
            yield later_stage(stage, frames, args.sides[0], args, folder)
    for side in args.sides[1:]:
        for stage in FPS:
            yield later_stage(stage, args.frames[0], side, args, folder)


def plot(results: list[dict], path: Path, args: argparse.Namespace) -> None:
    """Plots seconds and memory against output frames, and against the pixels of an output frame."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col")
    for stage in FPS:
        later = [row for row in results if row["stages"] == stage]
        least = min(row["side"] for row in later)
        longer = [row for row in later if row["side"] == least]
        larger = [row for row in later if row["frames"] == longer[0]["frames"]]
        for column, (part, x) in enumerate(((longer, "frames"), (larger, "side"))):
            values = [row[x] ** (1 if x == "frames" else 2) for row in part]
            for axis, unit in zip(axes[:, column], ("seconds", "gib")):
                axis.plot(values, [row[unit] for row in part], marker="o", label=stage)
    for axis, label in zip(axes[1], (f"frames, from {args.sides[0]}x{args.sides[0]}", "pixels of a frame")):
        axis.set_xlabel(label)
    for axis, label in zip(axes[:, 0], ("seconds", "GiB of anonymous memory")):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder of a cascade (default: the shipped one)")
    parser.add_argument(
        "--frames", type=whole_numbers, default=[17, 61, 241], help="output frames (default: 17,61,241)"
    )
    parser.add_argument("--sides", type=whole_numbers, default=[64, 96, 128], help="of the input: the first with "
                        "each of --frames, the others with its first number (default: 64,96,128)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="denoising steps of every stage (default: the weights' own)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="write a plot to this file")
    args = parser.parse_args()
    results = []
    print("| stages | frames | pixels | seconds | GiB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(args, Path(folder)):
            results.append(row)
            size = f"{row['side']}x{row['side']}" if "side" in row else ""
            cells = row["stages"], row.get("frames", ""), size, f"{row['seconds']:.1f}", f"{row['gib']:.2f}"
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot:
        plot(results, args.plot, args)


if __name__ == "__main__":
    with one_line_errors():
        main()
