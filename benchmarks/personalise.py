"""Measures what LoRAs of the included base model learn from a few pictures: the numbers of docs/personalise.md.

    python benchmarks/personalise.py pictures --subject tee --count 5 --out runs/pictures-5
    python train.py --config configs/moving_shapes/lora.py:cpu --workdir runs/lora-5 \\
        --config.data.image_path=runs/pictures-5 --config.cpu_devices=1 --config.prompts=
    python benchmarks/personalise.py measure --subject tee --lora runs/lora-5/weights --out runs/measured-5
    python benchmarks/personalise.py all --out runs/personalise     # every subject, number of pictures and seed
    python benchmarks/personalise.py table --out runs/personalise   # of what is measured so far

Each subject is a shape and a colour that Moving Shapes does not have, so that the base never saw them. The colours are
among those that the included VAE can reproduce. The included tokenizer only has the words of Moving Shapes, so that a
subject takes two of them, which the base saw in images only. `measure` samples the subject in every direction, and
other prompts, and detects attributes in the pixels as `lavie_jax.evaluation.moving_shapes` does. `all` continues where
it stopped: finished trainings and measurements are kept.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import lavie_jax
from lavie_jax.data import moving_shapes
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.data.moving_shapes import Attributes
from lavie_jax.disk import new_folder
from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors, user_location
from lavie_jax.evaluation import detectors

ROOT = Path(__file__).parent.parent
BACKGROUNDS = ("white", "black", "gray", "green", "yellow")
COUNTS = (5, 10, 20)
SEEDS = (0, 1, 2)
OTHERS = 4  # prompts without the subject


def tee(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of the letter T."""
    bar = np.maximum(np.abs(x) - 0.9, np.abs(y + 0.65) - 0.25)
    return np.minimum(bar, np.maximum(np.abs(x) - 0.25, np.abs(y) - 0.9))


def hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, up to a factor, of two triangles whose tips meet."""
    return np.maximum(np.abs(x) - np.abs(y) - 0.1, np.abs(y) - 0.9)


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, up to a factor, of an arrow that points to the right."""
    shaft = np.maximum(np.abs(y) - 0.25, np.abs(x + 0.35) - 0.6)
    return np.minimum(shaft, np.maximum(-x, np.abs(y) + x - 1.0))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A shape and a colour that Moving Shapes does not have, and the words of its captions."""

    shape: str
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    colour: str
    rgb: tuple[int, int, int]
    words: str


SUBJECTS = {
    subject.shape: subject
    for subject in (
        Subject("tee", tee, "lavender", (190, 170, 245), "brown heart"),
        Subject("hourglass", hourglass, "rose", (205, 95, 120), "pink crescent"),
        Subject("arrow", arrow, "sky", (130, 175, 240), "brown crescent"),
    )
}


def add_subjects() -> None:
    """Adds the subjects to what Moving Shapes draws and the detectors know, in this process."""
    for subject in SUBJECTS.values():
        moving_shapes._DISTANCE[subject.shape] = subject.distance
        moving_shapes.RGB[subject.colour] = subject.rgb
        moving_shapes.IMAGE_SHAPES += (subject.shape,)
        moving_shapes.IMAGE_COLOURS += (subject.colour,)


def write_pictures(subject: Subject, count: int, out: Path, seed: int) -> None:
    """Writes pictures of the subject with captions, all or none: `all` takes an existing folder for complete."""
    rng = np.random.default_rng(seed)
    with new_folder(out) as folder:
        for i, (background, size) in enumerate(itertools.islice(itertools.cycle(_kinds()), count)):
            attributes = Attributes(subject.shape, subject.colour, size, background, None)
            picture = moving_shapes.render(attributes, *rng.random(2), frames=1, fps=1.0, height=64, width=64)[0]
            Image.fromarray(picture).save(folder / f"{i:02d}.png")
            (folder / f"{i:02d}.txt").write_text(f"a {size} {subject.words} over a {background} background\n")


def _kinds() -> list[tuple[str, str]]:
    """(background, size) in an order in which both vary from the first picture on."""
    return [
        (b, size) for i in range(2) for b, size in zip(BACKGROUNDS, itertools.cycle(("large", "small")[:: 1 - 2 * i]))
    ]


def prompts(subject: Subject) -> list[tuple[str, Attributes]]:
    """Returns prompts with the attributes that they ask for: the subject in every direction, then familiar objects."""
    directions = [motion for motion in moving_shapes.MOTIONS if motion != "still"]
    kinds = itertools.cycle(itertools.product(("white", "black"), ("large", "small")))
    wanted = [Attributes(subject.shape, subject.colour, size, b, m) for (b, size), m in zip(kinds, directions)]
    pairs = [(moving_shapes.caption(a).replace(f"{subject.colour} {subject.shape}", subject.words), a) for a in wanted]
    others = [moving_shapes.clip("val", i).attributes for i in range(OTHERS)]
    return pairs + [(moving_shapes.caption(a), a) for a in others]


def measure(subject: Subject, lora: str | None, out: Path, seed: int) -> None:
    """Samples every prompt, and writes detected attributes and a contact sheet."""
    cascade = lavie_jax.load(stages=("base",), loras=[lora] if lora else [])
    texts, wanted = zip(*prompts(subject))
    videos = cascade(list(texts), seed=[seed + i for i in range(len(texts))], batch_size=4, progress=True)
    rows = []
    for text, asked, video in zip(texts, wanted, videos):
        found = detectors.detect(video)
        right = {row: getattr(found, row) == getattr(asked, row) for row in ("shape", "colour", "size", "motion")}
        group = "subject" if asked.shape == subject.shape else "other prompts"
        rows.append({"prompt": text, "group": group, "found": vars(found), "right": right})
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(videos), list(texts), out / "sheet.png", columns=8)
    (out / "measured.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(json.dumps(summary(rows), indent=2))


def summary(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Returns the fraction of samples that are right, with its standard error and number, by group and attribute."""
    table: dict[str, dict[str, list[float]]] = {}
    for group in ("subject", "other prompts"):
        right = [row["right"] for row in rows if row["group"] == group]
        for name in right[0] if right else ():
            p = float(np.mean([one[name] for one in right]))
            table.setdefault(group, {})[name] = [p, math.sqrt(p * (1 - p) / len(right)), len(right)]
    return table


def run_all(out: Path) -> None:
    """Trains and measures every subject with every number of pictures, one seed after the other."""
    command = [sys.executable, str(Path(__file__))]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}

    def call(*words: str | Path) -> None:
        if subprocess.run([str(word) for word in words], env=environment, cwd=ROOT).returncode:
            raise UserError(f"{' '.join(map(str, words[1:]))} failed; its message is above")

    out = out.absolute()
    if not (out / "without/measured.json").exists():
        call(*command, "measure", "--out", out / "without")  # other prompts are the same for all subjects
    for seed, count, subject in itertools.product(SEEDS, COUNTS, SUBJECTS):
        run = out / f"{subject}-{count}-{seed}"
        if (run / "measured/measured.json").exists():
            continue
        common = ("--subject", subject, "--seed", seed)
        if not (run / "pictures").exists():
            call(*command, "pictures", *common, "--count", count, "--out", run / "pictures")
        config = ("--config", "configs/moving_shapes/lora.py:cpu", f"--config.data.image_path={run / 'pictures'}")
        settings = (f"--config.seed={seed}", "--config.cpu_devices=1", "--config.prompts=")
        call(sys.executable, "train.py", *config, "--workdir", run / "train", *settings)
        call(*command, "measure", *common, "--lora", run / "train/weights", "--out", run / "measured")


def print_table(out: Path) -> None:
    """Prints a table in Markdown of all measurements in a folder of `all`."""
    if next(out.glob("**/measured.json"), None) is None:
        raise UserError(f"no measurement is complete in {out}: run all --out {out}")
    columns = [
        (group, name) for group in ("subject", "other prompts") for name in ("shape", "colour", "size", "motion")
    ]
    print("| | runs |", " | ".join(f"{group}: {name}" for group, name in columns), "|")
    print("| --- |" + " --- |" * (1 + len(columns)))
    groups = {"no LoRA": sorted(out.glob("without/measured.json"))}
    for count in COUNTS:
        groups[f"{count} pictures"] = sorted(out.glob(f"*-{count}-*/measured/measured.json"))
    for subject in SUBJECTS:
        groups[f"{subject}, all"] = sorted(out.glob(f"{subject}-*/measured/measured.json"))
    for name, files in groups.items():
        if files:
            table = summary([row for file in files for row in json.loads(file.read_text())])
            cells = [table[group][column] for group, column in columns]
            print(f"| {name} | {len(files)} |", " | ".join(f"{100 * p:.0f} ± {100 * e:.0f}" for p, e, _ in cells), "|")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that would fail later, or replace what is there."""
    if args.count < 1 or args.seed < 0:
        raise UserError(f"--count must be at least 1 and --seed at least 0; given {args.count} and {args.seed}")
    check_folder(args.out, f"--out {args.out}")
    made = {"pictures": args.out, "measure": args.out / "measured.json"}.get(args.command)
    if made is not None and made.exists():
        raise UserError(f"{made} exists: give another --out")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pictures", "measure", "all", "table"))
    parser.add_argument("--subject", choices=tuple(SUBJECTS), default="tee", help="default: %(default)s")
    parser.add_argument("--count", type=int, default=5, help="number of pictures")
    parser.add_argument("--lora", type=user_location, help="the LoRA to measure (default: the base without one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    with one_line_errors():
        args = parser.parse_args(argv)
        check(args)
        add_subjects()
        if args.command == "pictures":
            write_pictures(SUBJECTS[args.subject], args.count, args.out, args.seed)
        elif args.command == "measure":
            measure(SUBJECTS[args.subject], args.lora, args.out, args.seed)
        elif args.command == "all":
            run_all(args.out)
        else:
            print_table(args.out)


if __name__ == "__main__":
    main()
