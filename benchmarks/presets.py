"""Measures what saved work costs on the included cascade: presets, and each trick alone.

    python benchmarks/presets.py --json presets.json                                    # measures missing rows
    python benchmarks/presets.py --json presets.json --docs docs/speed.md --plot docs/images/presets.png

Every row of a stage makes the same clips with the same seeds. The base stage gets the captions of split val, and
attributes are detected in its pixels (`evaluation.moving_shapes`). Interpolation and super-resolution start from true
clips of the split and are compared with the true frames: PSNR, and LPIPS if its weights are there
(`python -m lavie_jax.evaluation lpips --help`). Work is counted in FLOPs of the UNet (benchmarks/work.py), relative to
the official preset. `--stages` and `--rows` choose what to measure; rows that FILE has already are kept unless the
number of clips differs, so that a long measurement can be made in pieces. `--weights STAGE:DIR` adds a row for another
model, such as a distilled one, with its default settings, or with `--rows` those rows for it.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from lavie_jax import cascade, parallel, results
from lavie_jax.errors import Parser, UserError, one_line_errors, suggest, user_location
from lavie_jax.evaluation.cascade import downscaled, moving_samples
from lavie_jax.evaluation.detectors import detect
from lavie_jax.evaluation.fidelity import psnr
from lavie_jax.evaluation.frame_measures import Lpips
from lavie_jax.evaluation.moving_shapes import ROWS as ATTRIBUTES
from lavie_jax.evaluation.moving_shapes import score, true_samples
from lavie_jax.stages.interpolation import KEY_FRAME_SPACING
from lavie_jax.stages.settings import OFFICIAL, PRESETS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.work import stage_work  # noqa: E402

KIND = "presets"
SPLIT = "val"
CONFIGS = {stage: f"{ROOT}/configs/moving_shapes/{stage}.py:cpu" for stage in ("base", "interpolation", "vsr")}
DEFAULT_CLIPS = {"base": 256, "interpolation": 32, "vsr": 8}
VSR_FRAMES = 17
BATCH = 16
BUNDLES: dict[str, dict[str, Any]] = {preset: {"preset": preset} for preset in PRESETS}
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "base": BUNDLES
    | {
        "guidance from 300": {"guidance_low": 300},
        "guidance from 500": {"guidance_low": 500},
        "guidance every 2": {"guidance_every": 2},
        "guidance every 3": {"guidance_every": 3},
        "cache every 2": {"cache_every": 2},
        "cache every 3": {"cache_every": 3},
        "cache every 2, depth 2": {"cache_every": 2, "cache_depth": 2},
        "cache every 2, depth 3": {"cache_every": 2, "cache_depth": 3},
        "ddim, 10 steps": {"steps": 10},
        "dpm++2m, 10 steps": {"sampler": "dpm++2m", "steps": 10},
        "dpm++2m, 12 steps": {"sampler": "dpm++2m", "steps": 12},
        "dpm++2m, 10 steps, guidance from 200": {"sampler": "dpm++2m", "steps": 10, "guidance_low": 200},
        "dpm++2m, 10 steps, guidance every 2": {"sampler": "dpm++2m", "steps": 10, "guidance_every": 2},
        "dpm++2m, 10 steps, karras": {"sampler": "dpm++2m", "steps": 10, "spacing": "karras"},
        "dpm++2m, 10 steps, ays": {"sampler": "dpm++2m", "steps": 10, "spacing": "ays"},
        "unipc, 10 steps": {"sampler": "unipc", "steps": 10},
        "unipc, 10 steps, ays": {"sampler": "unipc", "steps": 10, "spacing": "ays"},
        "unipc, 7 steps": {"sampler": "unipc", "steps": 7},
    },
    "interpolation": BUNDLES
    | {
        "cache every 2": {"cache_every": 2},
        "cache every 2, depth 3": {"cache_every": 2, "cache_depth": 3},
        "respaced_ddim, 2 steps": {"steps": 2},
        "dpm++2m, 2 steps": {"sampler": "dpm++2m", "steps": 2},
        "unipc, 3 steps": {"sampler": "unipc", "steps": 3},
    },
    "vsr": BUNDLES
    | {
        "cache every 2": {"cache_every": 2},
        "cache every 2, depth 3": {"cache_every": 2, "cache_depth": 3},
        "dpm++2m, 1 step": {"sampler": "dpm++2m", "steps": 1},
    },
}


def work(pipe: cascade.Cascade, stage: str, given: Mapping[str, Any]) -> float:
    """Returns the FLOPs of a clip of the default size with the settings of a row."""
    settings = dict(given)
    preset, weights = settings.pop("preset", OFFICIAL), pipe.weights[stage]
    clip = None if stage == "base" else cascade.STAGES[stage].default_clip(weights)
    resolved = cascade.resolve_settings(pipe.weights, [stage], {stage: settings}, clip, preset)[stage]
    return stage_work(CONFIGS[stage], weights, resolved)["flops"]


def follow_prompts(pipe: cascade.Cascade, given: Mapping[str, Any], count: int) -> dict[str, dict[str, float]]:
    """Returns {attribute: value and standard error}, in percent of clips that show what their caption says."""
    samples = true_samples(SPLIT, count, pipe.weights["base"].sampling)
    videos = pipe(
        [sample.caption for sample in samples], seed=list(range(count)), batch_size=BATCH, progress=True, **given
    )
    table = score([detect(video) for video in videos], [sample.attributes for sample in samples])
    return {name: {"value": 100 * table[name]["accuracy"], "error": 100 * table[name]["stderr"]} for name in ATTRIBUTES}


def restore(
    pipe: cascade.Cascade, stage: str, given: Mapping[str, Any], count: int, lpips: Lpips | None
) -> dict[str, dict[str, float]]:
    """Returns {measure: mean and standard error} of clips that a stage makes from true ones, against the latter."""
    settings = dict(given)
    preset, sampling = settings.pop("preset", OFFICIAL), pipe.weights[stage].sampling
    shape = {"fps": sampling["fps"], "height": sampling["height"], "width": sampling["width"]}
    shape["frames"] = VSR_FRAMES if stage == "vsr" else sampling["frames"]
    values: dict[str, list[float]] = {}
    for i, sample in enumerate(moving_samples(SPLIT, count, **shape)):
        true = sample.pixels
        clip = downscaled(true) if stage == "vsr" else true[::KEY_FRAME_SPACING]
        made = pipe(sample.caption, stages=(stage,), clip=clip, seed=i, preset=preset, **{stage: settings})[0]
        if stage == "interpolation":
            between = np.arange(len(true)) % KEY_FRAME_SPACING != 0
            made, true = made[between], true[between]
        values.setdefault("PSNR", []).append(psnr(made, true))
        if lpips is not None:
            values.setdefault("LPIPS", []).append(lpips(made, true))
    spread = {name: np.std(each, ddof=1) / count**0.5 if count > 1 else float("nan") for name, each in values.items()}
    return {name: {"value": float(np.mean(each)), "error": float(spread[name])} for name, each in values.items()}


def measure(pipe: cascade.Cascade, stage: str, given: Mapping[str, Any], count: int, lpips: Lpips | None) -> dict:
    """Returns a row of the result."""
    if stage == "base":
        measured = follow_prompts(pipe, given, count)
    else:
        measured = restore(pipe, stage, given, count, lpips)
    return {"clips": count, "flops": work(pipe, stage, given), "measures": measured}


def load_lpips(weights: Path | None) -> Lpips | None:
    """Returns the metric, or None with a warning if its weights are not there and not named."""
    try:
        return Lpips(weights, spatial=False)
    except UserError as error:
        if weights is not None:
            raise
        logging.warning("without LPIPS: %s", error)
        return None


def table(stage: str, rows: Mapping[str, Mapping]) -> str:
    """Returns the table of a stage in Markdown, in the order of `ROWS`."""
    ordered = [name for name in ROWS[stage] if name in rows] + [name for name in rows if name not in ROWS[stage]]
    first = rows[ordered[0]]
    digits = {"PSNR": 2, "LPIPS": 4}

    def cell(name: str, measure: str) -> str:
        one = rows[name]["measures"].get(measure)
        return "" if one is None else "{value:.{d}f} ± {error:.{d}f}".format(**one, d=digits.get(measure, 1))

    lines = [
        [name, f"{rows[name]['flops'] / first['flops']:.2f}", *(cell(name, m) for m in first["measures"])]
        for name in ordered
    ]
    return results.markdown([f"{stage} ({first['clips']} clips)", "work", *first["measures"]], lines)


def plot(done: Mapping[str, Mapping], path: Path) -> None:
    """Draws the first measure of each stage, of base the mean of the attributes, by row. Needs matplotlib.

    Rows are sorted by their work, which is beside their names; presets have another colour.
    """
    from matplotlib.figure import Figure  # extra `plots`

    figure = Figure(figsize=(5.5 * len(done), 0.28 * max(map(len, done.values())) + 1), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(done)))
    for ax, (stage, rows) in zip(axes, done.items()):
        ordered = sorted(rows, key=lambda name: rows[name]["flops"], reverse=True)
        for y, name in enumerate(ordered):
            cells = list(rows[name]["measures"].values())[: len(ATTRIBUTES) if stage == "base" else 1]
            mean, error = (np.array([cell[key] for cell in cells]) for key in ("value", "error"))
            bar = np.linalg.norm(error) / len(cells)
            ax.errorbar(mean.mean(), y, xerr=bar, fmt="o", color="C1" if name in PRESETS else "C0", markersize=5)
        works = [rows[name]["flops"] / rows[OFFICIAL]["flops"] for name in ordered]
        labels = [f"{name}   {work:.2f}" for name, work in zip(ordered, works)]
        ax.set_yticks(range(len(ordered)), labels, fontsize=7)
        ax.invert_yaxis()
        ax.grid(axis="x", linewidth=0.4)
        ax.set(title=f"{stage}; work", xlabel="attributes, %" if stage == "base" else "PSNR, dB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_docs(path: Path, text: str) -> None:
    """Replaces the part of a document between two lines, `<!-- presets -->` and `<!-- end of presets -->`."""
    begin, end = "<!-- presets -->\n", "<!-- end of presets -->"
    before, found, rest = path.read_text().partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise UserError(f"--docs {path}: it has no lines {begin.strip()} and {end}")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")


def parse_args() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stages", default=",".join(ROWS), help="default: %(default)s")
    parser.add_argument("--rows", help="names of rows, separated by ; (default: all)")
    parser.add_argument("--samples", type=int, help=f"clips of each stage (default: {DEFAULT_CLIPS})")
    parser.add_argument("--lpips", type=Path, help="weights of LPIPS, as for lavie_jax.evaluation")
    parser.add_argument(
        "--weights", type=user_location, metavar="STAGE:DIR", help="measure this model instead, as row DIR of its stage"
    )
    parser.add_argument("--docs", type=Path, help="write the tables into this document")
    parser.add_argument("--plot", type=Path, help="draw work and quality into this file")
    args = parser.parse_args()
    results.check_path(args.json, KIND)
    args.stages = args.stages.split(",")
    for stage in args.stages:
        if stage not in ROWS:
            raise UserError(f"--stages: unknown {stage!r}{suggest(stage, ROWS)}")
    known = [name for stage in args.stages for name in ROWS[stage]]
    args.rows = None if args.rows is None else args.rows.split(";")
    for name in args.rows or ():
        if name not in known:
            raise UserError(f"--rows: unknown {name!r}{suggest(name, known)}")
    return args


def main() -> None:
    """Measures the rows that are missing, and prints the tables."""
    args = parse_args()
    parallel.keep_compiled_programs()
    done: dict[str, dict] = json.loads(args.json.read_text())["stages"] if args.json.exists() else {}
    wanted = {
        stage: {name: given for name, given in ROWS[stage].items() if args.rows is None or name in args.rows}
        for stage in args.stages
    }
    folders: dict[str, str] = {}
    if args.weights:
        stage, _, folder = args.weights.partition(":")
        if stage not in ROWS:
            raise UserError(f"--weights: unknown stage {stage!r}{suggest(stage, ROWS)}")
        rows = {folder: {}} if args.rows is None else {f"{folder}, {name}": ROWS[stage][name] for name in args.rows}
        wanted, folders = {stage: rows}, {stage: folder}
    lpips = load_lpips(args.lpips) if set(wanted) != {"base"} else None
    for stage, rows in wanted.items():
        pipe = cascade.load(folders=folders or None, stages=(stage,))
        count = args.samples or DEFAULT_CLIPS[stage]
        for name, given in rows.items():
            if done.get(stage, {}).get(name, {}).get("clips") != count:
                done.setdefault(stage, {})[name] = measure(pipe, stage, given, count, lpips)
                results.write(args.json, {"kind": KIND, "split": SPLIT, "stages": done})
    text = "\n\n".join(table(stage, rows) for stage, rows in done.items())
    print(text)
    if args.docs:
        write_docs(args.docs, text)
    if args.plot:
        plot(done, args.plot)


if __name__ == "__main__":
    with one_line_errors():
        main()
