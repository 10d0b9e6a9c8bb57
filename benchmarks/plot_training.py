"""Plots the training curves of one or more runs below each other. Measures nothing.

    python benchmarks/plot_training.py runs/image runs/base --out docs/images/training.png

Left: the training loss of video and images from `metrics.jsonl`. Right: the held-out loss of the averaged model at
fixed timesteps with fixed noise, which can be compared between runs. Needs matplotlib (extra `plots`).
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from lavie_jax.errors import Parser, one_line_errors


def series(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of the rows that have `name`."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def main() -> None:
    """Runs the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="work directories of train.py")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(len(args.runs), 2, figsize=(10, 3.2 * len(args.runs)), squeeze=False)
    for (left, right), run in zip(axes, args.runs, strict=True):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        names = dict.fromkeys(name for row in rows for name in row)
        for name in names:
            if name in ("video_loss", "image_loss"):
                left.plot(*series(rows, name), label=name.replace("_", " "), linewidth=1)
            elif name.startswith("held_out/") and "_t" in name.removeprefix("held_out/"):
                label = name.removeprefix("held_out/").replace("_loss_", ", ")
                right.plot(*series(rows, name), label=label, marker=".")
        left.set_title(f"{run.name}: training loss")
        right.set_title(f"{run.name}: held-out loss at fixed timesteps")
        for axis in (left, right):
            axis.set_yscale("log")
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    with one_line_errors():
        main()
