"""Time and memory of sample.py, stage by stage, as clips become longer and larger.

    python benchmarks/cascade_growth.py [--weights DIR] [--json FILE] [--plot FILE.png]
    python benchmarks/cascade_growth.py --frames 5,9 --sides 64 --steps 2    # a smoke test

Every row is one `sample.py` command on clips of Moving Shapes, run twice: the first fills the compilation cache, the
second is measured, start of Python and loading included. Memory is the highest RssAnon of that process: pages of
mapped files, among them the frames on their way to disk, are the kernel's to drop. Without --weights the shipped
cascade is measured. Linux only; --plot needs matplotlib (extra `plots`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import AnonymousPeak

import lavie_jax
from lavie_jax.data import moving_shapes
from lavie_jax.stages.interpolation import KEY_FRAME_SPACING

ROOT = Path(__file__).parents[1]
FPS = {"interpolation": 8, "vsr": 32}
INDEX = 1  # of the clip in `val`
ENLARGED = {"interpolation": 1, "vsr": 4}  # sides, by the stage


def whole_numbers(text: str) -> list[int]:
    """`"17,61"` as [17, 61]."""
    return [int(word) for word in text.split(",")]


def command(stages: str, args: argparse.Namespace, out: Path) -> list[str]:
    """sample.py with what all rows have in common."""
    given = [sys.executable, ROOT / "sample.py", "--stages", stages, "--out", out, "--format", "mp4", "--overwrite"]
    given += ["--weights", args.weights] if args.weights else []
    for stage in stages.split(",") if args.steps else ():
        given += [f"--{stage}-steps" if stage != "base" else "--steps", args.steps]
    return [str(part) for part in given]


def measured(call: list[str], caption: str, cache: Path) -> dict[str, float]:
    """Seconds and GiB of the second of two runs."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    for _ in range(2):
        start = time.perf_counter()
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*call, "--prompt", caption], env=environment, **pipes)
        with AnonymousPeak(process.pid) as memory:
            _, said = process.communicate()
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{' '.join(call)}\n{said.decode()[-2000:]}")
    return {"seconds": seconds, "gib": memory.bytes / 2**30}


def later_stage(stage: str, frames: int, side: int, args: argparse.Namespace, folder: Path) -> dict:
    """One row: `frames` frames that come out, from a clip of side x side pixels."""
    given = (frames - 1) // KEY_FRAME_SPACING + 1 if stage == "interpolation" else frames
    clip = moving_shapes.clip("val", INDEX, frames=given, fps=FPS[stage], height=side, width=side)
    path = folder / f"{stage}-{frames}-{side}.npz"
    lavie_jax.save_video(clip.pixels, path, fps=FPS[stage])
    call = [*command(stage, args, folder / path.stem), "--input", str(path)]
    made = KEY_FRAME_SPACING * (given - 1) + 1 if stage == "interpolation" else frames
    out = side * ENLARGED[stage]
    return {"stages": stage, "frames": made, "side": out} | measured(call, clip.caption, folder / "cache")


def rows(args: argparse.Namespace, folder: Path):
    """Every row, as soon as it is measured."""
    caption = moving_shapes.clip("val", INDEX, frames=2, fps=8, height=64, width=64).caption
    for stages in ("base", "base,interpolation,vsr"):
        call = command(stages, args, folder / "from-text")
        yield {"stages": stages} | measured(call, caption, folder / "cache")
    for frames in args.frames:
        for stage in FPS:
            yield later_stage(stage, frames, args.sides[0], args, folder)
    for side in args.sides[1:]:
        for stage in FPS:
            yield later_stage(stage, args.frames[0], side, args, folder)


def plot(found: list[dict], path: Path, args: argparse.Namespace) -> None:
    """Seconds and memory against frames, and against the pixels of a frame that comes out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col")
    for stage in FPS:
        later = [row for row in found if row["stages"] == stage]
        least = min(row["side"] for row in later)
        longer = [row for row in later if row["side"] == least]
        larger = [row for row in later if row["frames"] == longer[0]["frames"]]
        for column, (some, x) in enumerate(((longer, "frames"), (larger, "side"))):
            places = [row[x] ** (1 if x == "frames" else 2) for row in some]
            for axis, unit in zip(axes[:, column], ("seconds", "gib")):
                axis.plot(places, [row[unit] for row in some], marker="o", label=stage)
    for axis, label in zip(axes[1], (f"frames, from {args.sides[0]}x{args.sides[0]}", "pixels of a frame")):
        axis.set_xlabel(label)
    for axis, label in zip(axes[:, 0], ("seconds", "GiB, not shared")):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a cascade's folder (default: the shipped one)")
    parser.add_argument("--frames", type=whole_numbers, default=[17, 61, 241], help="that come out (default 17,61,241)")
    parser.add_argument("--sides", type=whole_numbers, default=[64, 96, 128], help="of input frames; the first with "
                        "every number of frames, the others with the first number (default 64,96,128)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of every stage (default: the weights' own)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = []
    print("| stages | frames | pixels | seconds | GiB |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(args, Path(folder)):
            found.append(row)
            size = f"{row['side']}x{row['side']}" if "side" in row else ""
            said = row["stages"], row.get("frames", ""), size, f"{row['seconds']:.1f}", f"{row['gib']:.2f}"
            print("| " + " | ".join(map(str, said)) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.plot:
        plot(found, args.plot, args)


if __name__ == "__main__":
    main()
