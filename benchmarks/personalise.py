"""Measures what a LoRA of the included base model learns from a few pictures: the numbers of docs/personalise.md.

    python benchmarks/personalise.py pictures --count 5 --out runs/pictures-5
    python train.py --config configs/moving_shapes/lora.py:cpu --workdir runs/lora-5 \\
        --config.data.image_path=runs/pictures-5
    python benchmarks/personalise.py measure --lora runs/lora-5/weights --out runs/measured-5

The subject is a magenta T. Moving Shapes has neither, so the base never saw them. The included tokenizer knows only the
words of Moving Shapes, so that the subject takes two of them, "brown heart", which the base saw in images only.
`measure` samples the subject in every direction, and other prompts, and detects attributes in the pixels as
`lavie_jax.evaluation.moving_shapes` does. It writes a table and a contact sheet.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

import lavie_jax
from lavie_jax.data import moving_shapes, video_files
from lavie_jax.data.moving_shapes import Attributes
from lavie_jax.errors import Parser, user_location
from lavie_jax.evaluation import detectors

SHAPE, COLOUR = "tee", "magenta"
WORDS = "brown heart"
BACKGROUNDS = ("white", "black", "gray", "green", "yellow")


def tee(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of the letter T."""
    bar = np.maximum(np.abs(x) - 0.9, np.abs(y + 0.65) - 0.25)
    return np.minimum(bar, np.maximum(np.abs(x) - 0.25, np.abs(y) - 0.9))


def add_subject() -> None:
    """Adds the subject to what Moving Shapes draws and the detectors know, in this process."""
    moving_shapes._DISTANCE[SHAPE] = tee
    moving_shapes.RGB[COLOUR] = (230, 0, 230)
    moving_shapes.IMAGE_SHAPES += (SHAPE,)
    moving_shapes.IMAGE_COLOURS += (COLOUR,)


def write_pictures(count: int, out: Path, seed: int) -> None:
    """Writes pictures of the subject with captions."""
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i, (background, size) in enumerate(itertools.islice(itertools.cycle(_kinds()), count)):
        attributes = Attributes(SHAPE, COLOUR, size, background, None)
        picture = moving_shapes.render(attributes, *rng.random(2), frames=1, fps=1.0, height=64, width=64)[0]
        Image.fromarray(picture).save(out / f"{i:02d}.png")
        (out / f"{i:02d}.txt").write_text(f"a {size} {WORDS} over a {background} background\n")


def _kinds() -> list[tuple[str, str]]:
    """(background, size) in an order in which both vary from the first picture on."""
    return [
        (b, size) for i in range(2) for b, size in zip(BACKGROUNDS, itertools.cycle(("large", "small")[:: 1 - 2 * i]))
    ]


def prompts() -> list[tuple[str, Attributes]]:
    """Returns prompts with the attributes that they ask for: the subject in every direction, then familiar objects."""
    directions = [motion for motion in moving_shapes.MOTIONS if motion != "still"]
    wanted = [Attributes(SHAPE, COLOUR, "large", b, m) for b, m in zip(itertools.cycle(("white", "black")), directions)]
    pairs = [(moving_shapes.caption(a).replace(f"{COLOUR} {SHAPE}", WORDS), a) for a in wanted]
    others = [moving_shapes.clip("val", i).attributes for i in range(8)]
    return pairs + [(moving_shapes.caption(a), a) for a in others]


def measure(lora: str | None, out: Path, seed: int) -> None:
    """Samples every prompt, and writes detected attributes, fractions that are right, and a contact sheet."""
    out.mkdir(parents=True)
    cascade = lavie_jax.load(stages=("base",), loras=[lora] if lora else [])
    rows, videos, texts = [], [], []
    for prompt, wanted in prompts():
        video = cascade(prompt, seed=seed)[0]
        found = detectors.detect(video)
        right = {name: getattr(found, name) == getattr(wanted, name) for name in ("shape", "colour", "motion")}
        rows.append({"prompt": prompt, "subject": wanted.shape == SHAPE, "found": vars(found), "right": right})
        videos.append(video)
        texts.append(prompt)
        print(prompt, vars(found), flush=True)
        content = {"table": summary(rows), "samples": rows}
        (out / "measured.json").write_text(json.dumps(content, indent=2) + "\n")  # after each: a clip takes a while
    video_files.contact_sheet(videos, texts, out / "sheet.png", columns=8)
    print(json.dumps(summary(rows), indent=2))


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Returns the fraction of samples that are right, of the subject and of other prompts."""
    table = {}
    for group, subject in (("subject", True), ("other prompts", False)):
        right = [row["right"] for row in rows if row["subject"] == subject]
        if right:
            table[group] = {name: float(np.mean([one[name] for one in right])) for name in right[0]}
    return table


def main() -> None:
    """Runs one of the two commands."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pictures", "measure"))
    parser.add_argument("--count", type=int, default=5, help="number of pictures")
    parser.add_argument("--lora", type=user_location, help="the LoRA to measure (default: the base without one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    add_subject()
    if args.command == "pictures":
        write_pictures(args.count, args.out, args.seed)
    else:
        measure(args.lora, args.out, args.seed)


if __name__ == "__main__":
    main()
