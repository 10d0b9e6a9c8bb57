"""Measures LaVie's central claim on Moving Shapes (section 3.1, appendix D): the numbers of docs/joint_training.md.

    python benchmarks/joint_training.py --out runs/joint_training [--json FILE] [--plot FILE.png]

Fine-tunes the image model inside the included base model on clips, in three regimes at equal steps: the whole UNet on
clips with images ("joint"), the whole UNet on clips ("video_only"), temporal layers on clips ("temporal_only"). Then
"joint" once each with other numbers of images M and other weights alpha. Every run is `train.py --config
configs/moving_shapes/fine_tuning.py` with workdir OUT/RUN. It is measured at the start, half-way and at the end:

    concept   clips of `image_only`: is the shape or colour that only images have right?
    motion    clips of `val`, whose shapes and colours the training clips have: is the direction right?
    image     images of `val` by the image path, with all shapes and colours: are all attributes right?

Weights and measurements are kept in OUT/RUN/weights-STEP and OUT/RUN/measured-STEP.json. The same command resumes, and
repeats nothing that is complete; `--so-far` shows what is. Other weights or another config need another OUT. With too
little time, leave out seeds (`--seeds 1`) or variants (`--images= --alphas=`). Needs matplotlib (extra `plots`) for
--plot.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavie_jax import cascade, parallel, results
from lavie_jax.data import moving_shapes
from lavie_jax.data.moving_shapes import Attributes, Sample
from lavie_jax.disk import new_folder, recover_folder
from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors, user_location, user_path
from lavie_jax.evaluation.detectors import detect
from lavie_jax.evaluation.moving_shapes import score, true_samples
from lavie_jax.text_files import read_json
from lavie_jax.training import build, checkpoint, options
from lavie_jax.training.diffusion import image_as_video
from lavie_jax.weights import Weights, folder_hash, load_folder

ROOT = Path(__file__).parents[1]
CONFIG = os.fspath(ROOT / "configs" / "moving_shapes" / "fine_tuning.py")
KIND = "joint_training"  # of the result file
REGIMES = ("joint", "video_only", "temporal_only")
MEASURES = {  # name: (split, what its accuracy is of)
    "concept": ("image_only", "image-only concepts in videos"),
    "motion": ("val", "motion in videos"),
    "image": ("image", "images, all attributes"),
}
BATCH = 8  # clips that are sampled at once

Cell = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of train.py: M `images` beside each clip, with weight `alpha`."""

    regime: str
    seed: int
    images: int = 0
    alpha: float = 1.0

    @property
    def group(self) -> str:
        """The name that runs share which differ in the seed only."""
        return f"{self.regime}-M{self.images}-alpha{self.alpha:g}" if self.regime == "joint" else self.regime

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.group}-{self.seed}"


def planned(seeds: int, images: int, other_images: Sequence[int], other_alphas: Sequence[float]) -> list[Run]:
    """Returns the regimes with each seed, then the variants of "joint" with the first seed, each run once."""
    runs = [Run(regime, seed, images * (regime == "joint")) for seed in range(seeds) for regime in REGIMES]
    runs += [Run("joint", 0, other) for other in other_images]
    runs += [Run("joint", 0, images, alpha) for alpha in other_alphas]
    return list(dict.fromkeys(runs))  # a variant may be what the regimes have


# ---- training ----


def train(run: Run, step: int, args: argparse.Namespace) -> Path:
    """Trains a run, or continues it, until `step`, and returns a copy of the weights that it has then."""
    workdir, copy = args.out / run.name, args.out / run.name / f"weights-{step}"
    recover_folder(copy)
    if copy.exists():
        return copy
    if (newest := max(checkpoint.steps(workdir / "checkpoints"), default=0)) > step:
        raise UserError(
            f"{workdir} is at step {newest}, beyond the wanted {step}: give the --steps of that run, or another --out"
        )
    fields = {
        "init_from": args.weights, "regime": run.regime, "steps": step, "seed": run.seed, "data.seed": run.seed,
        "data.images": run.images, "loss.alpha": run.alpha, "held_out_every": step, "checkpoint_every": step,
        "keep_checkpoints": 1, "keep_best": 0,
    }  # fmt: skip
    words = [sys.executable, ROOT / "train.py", "--config", args.config, "--workdir", workdir]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    if subprocess.run([str(word) for word in words], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the training of {run.name} failed; its message is above")
    with new_folder(copy) as folder:
        shutil.copytree(workdir / "weights", folder, dirs_exist_ok=True)
    return copy


# ---- measurements ----


def is_image_only(attributes: Attributes) -> bool:
    """Whether no training clip has the shape, or none has the colour."""
    return attributes.shape in moving_shapes.IMAGE_SHAPES or attributes.colour in moving_shapes.IMAGE_COLOURS


def concept(detected: Attributes, wanted: Attributes) -> bool:
    """Whether the shape, or colour, that occurs in images only is right; other attributes do not count."""
    if wanted.shape in moving_shapes.IMAGE_SHAPES:
        return detected.shape == wanted.shape
    return detected.colour == wanted.colour


def accuracy(right: Sequence[bool]) -> Cell:
    """Returns {mean, stderr, n} with the binomial standard error."""
    n, p = len(right), sum(right) / len(right)
    return {"mean": p, "stderr": math.sqrt(p * (1 - p) / n), "n": n}


def accuracies(detected: Mapping[str, Sequence[Attributes]], true: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Returns the measures of the table, and beside them all attributes of each split."""
    wanted = {split: [sample.attributes for sample in samples] for split, samples in true.items()}
    pairs = {split: list(zip(detected[split], wanted[split], strict=True)) for split in wanted}
    table = {
        "concept": accuracy([concept(d, w) for d, w in pairs["image_only"]]),
        "motion": accuracy([d.motion == w.motion for d, w in pairs["val"]]),
        "image": accuracy([dataclasses.replace(d, motion=None) == w for d, w in pairs["image"]]),
    }
    splits = {split: score(detected[split], wanted[split]) for split in wanted}
    splits["image"]["concept"] = _score_of([concept(d, w) for d, w in pairs["image"] if is_image_only(w)])
    return {"measures": table, "splits": splits}


def _score_of(right: Sequence[bool]) -> Cell:
    """Returns a cell of `evaluation.moving_shapes.score`; without samples, there is no accuracy."""
    if not right:
        return {"accuracy": math.nan, "stderr": math.nan, "n": 0}
    cell = accuracy(right)
    return {"accuracy": cell["mean"], "stderr": cell["stderr"], "n": cell["n"]}


def measure(weights: Weights, samples: int) -> dict[str, Any]:
    """Samples the captions of each split, sample i with seed i, and detects the attributes."""
    pipe, start = cascade.Cascade({"base": weights}), time.perf_counter()
    true = {split: true_samples(split, samples, weights.sampling) for split, _ in MEASURES.values()}
    detected = {}
    for split, own in true.items():
        videos = pipe(
            [sample.caption for sample in own],
            seed=list(range(samples)),
            frames=1 if own[0].attributes.motion is None else None,
            batch_size=BATCH,
            progress=True,
        )
        detected[split] = [detect(video, fps=weights.sampling["fps"]) for video in videos]
    return accuracies(detected, true) | {"samples": samples, "seconds": round(time.perf_counter() - start, 1)}


def at_the_start(folder: Path, config: str) -> Weights:
    """Returns the weights that every run starts from: temporal layers have no effect, as in `train.py`."""
    weights = load_folder(folder, stage="base", dtype=np.float32)
    unet = dataclasses.replace(weights.unet, params=image_as_video(weights.unet.params))
    return dataclasses.replace(weights, unet=unet, sampling=build.sampling_defaults(options.load(config)))


def kept(path: Path, samples: int, weights: Callable[[], Weights]) -> dict[str, Cell]:
    """Returns the measurement in `path`, which is made if it is missing or has another number of samples."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("samples") != samples:
        stored = {"kind": KIND, **measure(weights(), samples)}
        results.write(path, stored)
    return stored["measures"]


def measure_all(runs: Sequence[Run], args: argparse.Namespace) -> dict[str, dict[int, dict[str, Cell]]]:
    """Trains and measures every run, or with `--so-far` reads what is complete: {run: {step: measures}}."""

    def read(path: Path, weights: Callable[[], Weights]) -> dict[str, Cell] | None:
        if args.so_far:
            return json.loads(path.read_text())["measures"] if path.exists() else None
        return kept(path, args.samples, weights)

    start = read(args.out / "measured-0.json", lambda: at_the_start(args.weights, args.config))
    table: dict[str, dict[int, dict[str, Cell]]] = {}
    for run in runs:
        found = {0: start}
        for step in sorted({args.steps // 2, args.steps} - {0}):
            found[step] = read(args.out / run.name / f"measured-{step}.json", functools.partial(after, run, step, args))
        if any(cells for step, cells in found.items() if step):
            table[run.name] = {step: cells for step, cells in found.items() if cells}
    return table


def after(run: Run, step: int, args: argparse.Namespace) -> Weights:
    """Returns the weights of a run after `step`, which it is trained for if necessary."""
    print(f"{run.name}, step {step}", file=sys.stderr, flush=True)
    return load_folder(train(run, step, args), dtype=np.float32)


# ---- table and figure ----


def summary(runs: Sequence[Run], table: Mapping[str, Mapping[int, Mapping[str, Cell]]]) -> dict[str, dict]:
    """Returns {group: {step: {measure: {mean, stderr, n, runs}}}}.

    The standard error is that of the mean over runs. A single run, and the start, which all runs share, have the
    binomial one of its n samples.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.name in table:
            groups.setdefault(run.group, []).append(run)
    cells: dict[str, dict] = {}
    for group, own in groups.items():
        for step in sorted({step for run in own for step in table[run.name]}):
            done = [table[run.name][step] for run in own if step in table[run.name]]
            cells.setdefault(group, {})[step] = {
                name: _mean([one[name] for one in done], shared=step == 0) for name in MEASURES
            }
    return cells


def _mean(cells: Sequence[Cell], *, shared: bool) -> Cell:
    if shared or len(cells) == 1:
        return {**cells[0], "runs": len(cells)}
    means = [cell["mean"] for cell in cells]
    stderr = float(np.std(means, ddof=1) / math.sqrt(len(means)))
    return {"mean": float(np.mean(means)), "stderr": stderr, "n": sum(cell["n"] for cell in cells), "runs": len(cells)}


def markdown(groups: Mapping[str, Mapping[int, Mapping[str, Cell]]]) -> str:
    """Returns a table with the start and a row for each group and later step, in percent with standard errors."""

    def row(name: str, runs: str, step: int, cells: Mapping[str, Cell]) -> list[str]:
        percent = [f"{100 * cells[m]['mean']:.1f} ± {100 * cells[m]['stderr']:.1f}" for m in MEASURES]
        return [name, runs, str(step), *percent]

    starts = [steps[0] for steps in groups.values() if 0 in steps]
    rows = [row("start", "", 0, starts[0])] if starts else []
    for name, steps in groups.items():
        label = name.replace("-alpha", ", alpha = ").replace("-M", ", M = ").replace("_", " ")
        rows += [row(label, str(cells["motion"]["runs"]), step, cells) for step, cells in steps.items() if step]
    return results.markdown(["", "runs", "step", *(what for _, what in MEASURES.values())], rows)


def plot(groups: Mapping[str, Mapping[int, Mapping[str, Cell]]], path: Path) -> None:
    """Plots each measure over the steps of training, with a line for each group."""
    from matplotlib.figure import Figure  # extra `plots`

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (measure, (_, what)) in zip(figure.subplots(1, 3, sharey=True), MEASURES.items(), strict=True):
        for name, steps in groups.items():
            mean, error = ([100 * cells[measure][key] for cells in steps.values()] for key in ("mean", "stderr"))
            variant = name.startswith("joint") and name != next(iter(groups))
            style = {"linestyle": ":", "linewidth": 1} if variant else {"linewidth": 2}
            label = name.replace("-alpha", ", alpha = ").replace("-M", ", M = ").replace("_", " ")
            axes.errorbar(list(steps), mean, error, marker="o", markersize=4, capsize=3, label=label, **style)
        axes.set(title=what, xlabel="step", ylim=(-3, 103))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("percent right")
    figure.axes[1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# ---- the command ----


def numbers(kind: type) -> Callable[[str], tuple]:
    """Returns a parser of "1,8" to (1, 8), and of the empty text to ()."""

    def parse(text: str) -> tuple:
        values = tuple(kind(word) for word in text.split(",") if word)
        if not all(0 <= value < math.inf for value in values):
            raise ValueError
        return values

    parse.__name__ = "list of numbers"
    return parse


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and measurements")
    parser.add_argument("--weights", type=Path, help="a base model to start from (default: the included one)")
    parser.add_argument("--config", type=user_location, default=CONFIG, help="config file of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each regime (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of each run (default: the config's)")
    parser.add_argument("--samples", type=int, default=48, help="captions of each split (default: %(default)s)")
    parser.add_argument("--images", type=numbers(int), default=(1, 8), help="other M of joint (default: 1,8)")
    parser.add_argument("--alphas", type=numbers(float), default=(0.3, 3.0), help="other alpha (default: 0.3,3)")
    parser.add_argument("--so-far", action="store_true", help="train nothing: show what is complete in OUT")
    parser.add_argument("--json", type=Path, help="write the table and all measurements to this file")
    parser.add_argument("--plot", type=Path, help="plot the measures over training to this PNG")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> Any:
    """Checks everything that would otherwise fail after training, and returns the config of the runs."""
    config = options.load(args.config)
    if Path(args.config.partition(":")[0]).is_file():  # train.py runs in another folder
        args.config = os.fspath(Path(args.config).absolute())
    args.steps = config.steps if args.steps is None else args.steps
    for name in ("seeds", "steps", "samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1; given {getattr(args, name)}")
    if 0 in args.images:
        raise UserError("--images: joint training needs at least 1 image; given 0")
    results.check_plot(args.plot)
    results.check_path(args.json, KIND)
    check_folder(args.out, f"--out {args.out}")
    args.weights = cascade.stage_folder(args.weights, "base").absolute()
    args.out = user_path(args.out).absolute()
    _check_experiment(args)
    return config


def _check_experiment(args: argparse.Namespace) -> None:
    """Raises UserError if OUT has runs of other weights or of another config, which would be taken for these."""
    path, record = args.out / "experiment.json", {"config": Path(args.config).name}
    record |= {"kind": KIND, "weights_hash": folder_hash(args.weights)}
    stored = read_json(path) if path.exists() else record
    if other := [name for name in record if stored.get(name) != record[name]]:
        raise UserError(f"{args.out} has runs with another {' and '.join(other)}: give another --out")
    if not args.so_far:
        results.write(path, record)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        config = _check(args)
        parallel.keep_compiled_programs()
        runs = planned(args.seeds, config.data.images, args.images, args.alphas)
        table = measure_all(runs, args)
        if not table:
            raise UserError(f"--so-far: no measurement is complete in {args.out}")
    groups = summary(runs, table)
    print(markdown(groups))
    if args.json:
        result = {"kind": KIND, "weights_hash": folder_hash(args.weights), "samples": args.samples, "groups": groups}
        results.write(args.json, result | {"runs": table})
    if args.plot:
        plot(groups, args.plot)


if __name__ == "__main__":
    main()
