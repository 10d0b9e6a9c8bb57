"""Measures the prediction stage on Moving Shapes: image to video, transitions, and long video by segments.

    python -m lavie_jax.evaluation.prediction --weights DIR [--samples 64] [--segments 8] [--json FILE] [--plot FILE]

The clips are 0, 1, ... of a split (`--split`, val by default), sample i has seed `--seed` + i.

* image to video: the first frame of each clip and its caption are given. A picture and a caption determine the whole
  clip, so all frames are compared with the true ones; the first frame's PSNR with that of the VAE's reconstruction.
* transition: the first and the last frame are given. The object arrives if its centre in the last frame is where it is
  in the true one, within `ARRIVED`.
* long video: from the first frame, segment after segment. Every second one has the opposite direction in its prompt,
  because a path through the whole frame takes little more than two segments. Attributes are detected in each.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import UInt8

from lavie_jax import cascade, results
from lavie_jax.cascade.running import Request
from lavie_jax.data import moving_shapes
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.data.moving_shapes import MOTIONS, Attributes, Sample
from lavie_jax.errors import Parser, UserError, check_folder, one_line_errors, suggest
from lavie_jax.evaluation.cascade import moving_samples, through_vae
from lavie_jax.evaluation.detectors import detect, object_centres
from lavie_jax.evaluation.fidelity import psnr
from lavie_jax.evaluation.moving_shapes import (
    ROWS,
    SHEET_ROWS,
    Table,
    add_sampling_flags,
    check_sampling_flags,
    given_sampling,
    score,
    true_samples,
)
from lavie_jax.stages import STAGES
from lavie_jax.weights import folder_hash

KIND = "prediction"  # of the result file
STAGE = "prediction"
SPLITS = ("val", "held_out")
MEASURES = ("image_to_video", "transition", "segments")
ARRIVED = 1 / 16  # of the shorter side, from the object's true centre

Clip = UInt8[np.ndarray, "t h w 3"]


def opposite(attributes: Attributes) -> Attributes:
    """Returns the attributes with the motion in the opposite direction."""
    x, y = MOTIONS[attributes.motion]
    back = next(name for name, direction in MOTIONS.items() if np.allclose(direction, (-x, -y)))
    return moving_shapes.Attributes(**{**vars(attributes), "motion": back})


def there_and_back(sample: Sample, segments: int) -> list[Attributes]:
    """Returns the attributes of each segment of a long video."""
    return [opposite(sample.attributes) if index % 2 else sample.attributes for index in range(segments)]


class Model:
    """The stage with settings from the command line."""

    def __init__(self, pipe: cascade.Cascade, args: argparse.Namespace):
        self.pipe, self.seed, self.batch_size = pipe, args.seed, args.batch_size
        self.given = given_sampling(args)
        self.settings = self._resolve()[STAGE]
        self.vae = through_vae(pipe, STAGE)

    def _resolve(self, **more):
        return cascade.resolve_settings(self.pipe.weights, (STAGE,), {STAGE: {**self.given, **more}})

    def sample(
        self, prompts: Sequence[str], known: Sequence[Mapping[int, np.ndarray]], segments: int = 1
    ) -> list[Clip]:
        """Samples a clip for each prompt and its known frames."""
        requests = [
            Request(prompt=text, seed=self.seed + i, known=dict(frames))
            for i, (text, frames) in enumerate(zip(prompts, known, strict=True))
        ]
        settings = self._resolve(segments=segments)
        return list(self.pipe.videos(requests, settings, batch_size=self.batch_size, progress=True))

    def parts(self, video: Clip, segments: int) -> list[UInt8[np.ndarray, "_part h w 3"]]:
        """Returns the segments of a long video, each with the frames that it was given."""
        settings = self._resolve(segments=segments)[STAGE]
        return [video[s.start : s.start + settings.frames] for s in STAGES[STAGE].segments(settings)]


# ---- measurements ----


def _mean(values: Sequence[float]) -> dict[str, float]:
    """Returns {mean, stderr, n}."""
    n = len(values)
    return {"mean": float(np.mean(values)), "stderr": float(np.std(values, ddof=n > 1) / n**0.5), "n": n}


def image_to_video(model: Model, samples: Sequence[Sample]) -> tuple[dict, list[Clip]]:
    """Returns the accuracy of the attributes, and PSNRs of the first frame and of all, beside the VAE's own."""
    clips = model.sample([s.caption for s in samples], [{0: s.pixels[0]} for s in samples])
    through = [model.vae(s.pixels) for s in samples]
    result = {"accuracy": score([detect(c, fps=model.settings.fps) for c in clips], [s.attributes for s in samples])}
    for name, part in (("first_frame", slice(1)), ("all_frames", slice(None))):
        pairs = {"psnr": clips, "psnr_of_vae": through}
        result[name] = {
            key: _mean([psnr(clip[part], s.pixels[part]) for clip, s in zip(each, samples)])
            for key, each in pairs.items()
        }
    return result, clips


def transition(model: Model, samples: Sequence[Sample]) -> tuple[dict, list[Clip]]:
    """Returns how often the object arrives, and its distance from the true path at the end and half way."""
    last = model.settings.frames - 1
    clips = model.sample([s.caption for s in samples], [{0: s.pixels[0], last: s.pixels[last]} for s in samples])
    through = [model.vae(s.pixels) for s in samples]
    distances = np.array([_distances(clip, s.pixels) for clip, s in zip(clips, samples)])
    return {
        "accuracy": score([detect(c, fps=model.settings.fps) for c in clips], [s.attributes for s in samples]),
        "arrives": _mean((distances[:, last] < ARRIVED).astype(float).tolist()),
        "distance_at_end": _mean(np.minimum(distances[:, last], 1).tolist()),
        "distance_half_way": _mean(np.minimum(distances[:, last // 2], 1).tolist()),
        "last_frame": {
            key: _mean([psnr(clip[last:], s.pixels[last:]) for clip, s in zip(each, samples)])
            for key, each in {"psnr": clips, "psnr_of_vae": through}.items()
        },
    }, clips


def _distances(clip: Clip, true: Clip) -> np.ndarray:
    """Returns the distance of the object from its true centre in each frame, in shorter sides; inf without one."""
    ours, theirs = object_centres(clip), object_centres(true)
    if ours is None or theirs is None:
        return np.full(len(true), np.inf)
    return np.linalg.norm(ours - theirs, axis=-1)


def segments(model: Model, samples: Sequence[Sample], count: int) -> tuple[dict, list[Clip]]:
    """Returns the accuracy of the attributes in each segment of long videos."""
    wanted = [there_and_back(sample, count) for sample in samples]
    prompts = [" | ".join(moving_shapes.caption(a) for a in each) for each in wanted]
    videos = model.sample(prompts, [{0: s.pixels[0]} for s in samples], count)
    parts = [model.parts(video, count) for video in videos]
    tables = [
        score([detect(own[i], fps=model.settings.fps) for own in parts], [each[i] for each in wanted])
        for i in range(count)
    ]
    return {"accuracy": {str(i + 1): table for i, table in enumerate(tables)}}, videos


# ---- the command ----


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.prediction",
        description="Measures image to video, transitions and long video on Moving Shapes.",
    )
    parser.add_argument("--weights", type=Path, help="a weights folder (default: the shipped model)")
    parser.add_argument("--measure", action="append", help=f"one of {', '.join(MEASURES)}; may be repeated")
    parser.add_argument("--split", default="val", help=f"one of {', '.join(SPLITS)} (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="clips of each measurement (default: %(default)s)")
    parser.add_argument("--segments", type=int, default=8, help="segments of a long video (default: %(default)s)")
    add_sampling_flags(parser)
    parser.add_argument("--sheets", type=Path, help="write a contact sheet per measurement to this folder")
    parser.add_argument("--plot", type=Path, help="plot the attributes against the segment; needs matplotlib")
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Checks everything that would otherwise fail, or replace a file, after sampling."""
    for name in args.measure or ():
        if name not in MEASURES:
            raise UserError(f"--measure: unknown {name!r}{suggest(name, MEASURES)}")
    if args.split not in SPLITS:
        raise UserError(f"--split: unknown split {args.split!r}{suggest(args.split, SPLITS)}")
    check_sampling_flags(args, "segments")
    results.check_plot(args.plot)
    if args.plot is not None and "segments" not in (args.measure or MEASURES):
        raise UserError(f"--plot shows the measure segments: add --measure segments, or leave out --plot {args.plot}")
    results.check_path(args.json, KIND)
    if args.sheets is not None:
        check_folder(args.sheets, f"--sheets {args.sheets}")


def _measure(args: argparse.Namespace) -> dict:
    folder, start = cascade.stage_folder(args.weights, STAGE), time.perf_counter()
    model = Model(cascade.load(folder, stages=(STAGE,), dtype=args.dtype), args)
    sampling = model.settings.to_dict()
    shape = {name: sampling[name] for name in ("height", "width", "frames", "fps")}
    samples, moving = (
        true_samples(args.split, args.samples, sampling),
        moving_samples(args.split, args.samples, **shape),
    )
    run = {
        "image_to_video": lambda: image_to_video(model, samples),
        "transition": lambda: transition(model, moving),
        "segments": lambda: segments(model, samples, args.segments),
    }
    tables = {}
    for name in dict.fromkeys(args.measure or MEASURES):
        logging.info("%s", name)
        tables[name], clips = run[name]()
        if args.sheets:
            captions = [sample.caption for sample in (moving if name == "transition" else samples)[:SHEET_ROWS]]
            contact_sheet(clips[:SHEET_ROWS], captions, args.sheets / f"{name}.png")
    return {
        "kind": KIND, "split": args.split, "seed": args.seed, "seconds": round(time.perf_counter() - start, 1),
        "weights": os.fspath(folder), "weights_hash": folder_hash(folder), "sampling": sampling, "tables": tables,
    }  # fmt: skip


def plot(table: Mapping[str, Table], path: Path) -> None:
    """Plots the accuracy of each attribute against the number of the segment."""
    from matplotlib.figure import Figure  # extra `plots`

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes, numbers = figure.subplots(), [int(number) for number in table]
    for row in ROWS:
        cells = [table[str(number)][row] for number in numbers]
        accuracy, error = ([100 * cell[key] for cell in cells] for key in ("accuracy", "stderr"))
        axes.errorbar(numbers, accuracy, error, marker="o", capsize=3, label=row)
    axes.set(xlabel="segment", ylabel="percent right", ylim=(0, 103), xticks=numbers)
    axes.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def markdown(tables: Mapping[str, dict]) -> str:
    """Returns a table of attributes, one row for each measurement and segment, and one of the other measures."""
    header = ["", "n", *ROWS, "all"]
    rows, others = [], []
    for name, table in tables.items():
        accuracy = table["accuracy"] if name == "segments" else {"": table["accuracy"]}
        for number, cells in accuracy.items():
            percent = [
                f"{100 * cells[row]['accuracy']:.1f} ± {100 * cells[row]['stderr']:.1f}" for row in (*ROWS, "all")
            ]
            rows.append([f"{name} {number}".strip().replace("_", " "), str(cells["all"]["n"]), *percent])
        for key, value in table.items():
            for inner, cell in (value if "mean" not in value else {"": value}).items() if key != "accuracy" else ():
                what = f"{name}: {key} {inner}".strip().replace("_", " ")
                others.append([what, f"{cell['mean']:.3f} ± {cell['stderr']:.3f}", str(cell["n"])])
    parts = [results.markdown(header, rows)]
    return "\n\n".join([*parts, results.markdown(["", "mean", "n"], others)] if others else parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        _check(args)
        result = _measure(args)
    print(markdown(result["tables"]))
    if args.json:
        results.write(args.json, result)
    if args.plot:
        plot(result["tables"]["segments"]["accuracy"], args.plot)


if __name__ == "__main__":
    main()
