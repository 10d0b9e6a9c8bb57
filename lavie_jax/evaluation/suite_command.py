"""Published benchmarks as commands: samples the videos, measures them or prints how to, and prints the table.

    python -m lavie_jax.evaluation ucf101 --weights DIR --classes classInd.txt --reference UCF-101 --out RUN
    python -m lavie_jax.evaluation vbench --weights DIR --prompts VBench/prompts/prompts_per_dimension --out RUN

Videos that exist are not sampled again. Several hosts share a run with --part I/N and the same --out.
"""

import argparse
import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging
from tqdm.auto import tqdm

from lavie_jax import cascade, results
from lavie_jax.cascade.running import Request
from lavie_jax.data.video_files import finished, save_video
from lavie_jax.errors import Parser, UserError, check_folder
from lavie_jax.evaluation import commands, result_files
from lavie_jax.evaluation.suites import (
    SUITES,
    Item,
    Suite,
    checked,
    read_vbench_results,
    temporal_flickering,
    vbench_scores,
)
from lavie_jax.evaluation.videos import batches, find_videos
from lavie_jax.samples.prompts import parse_part
from lavie_jax.stages.settings import MAIN_STAGE
from lavie_jax.text_files import read_json
from lavie_jax.weights import folder_hash

VIDEOS, SETTINGS, CAPTIONS, TABLE = "videos", "settings.json", "captions.json", "table.json"
SIZES = ("frames", "height", "width", "fps")
Measured = tuple[dict[str, float], Sequence[str]]  # {measure: value}, and lines to print


def suite_parser(name: str) -> Parser:
    """Returns the parser of a benchmark."""
    suite = SUITES[name]
    parser = Parser(prog=f"python -m lavie_jax.evaluation {name}", description=suite.about)
    add = parser.add_argument
    add(suite.source, dest="source", type=Path, required=True, help=(suite.items.__doc__ or "").split("\n\n")[0])
    add("--out", type=Path, required=True, metavar="DIR", help="the run's folder; its videos are in DIR/videos")
    add("--weights", type=Path, metavar="DIR", help="weights folder of a base stage (default: shipped)")
    add("--seed", type=int, default=0, help="seed of the first video; also draws captions (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="sample the first N videos only; the result is not the benchmark's")
    add("--batch-size", type=int, metavar="N", help="videos that are sampled at once (default: one per device)")
    add("--part", metavar="I/N", help="sample every N-th video from the I-th on, and measure nothing")
    add("--no-sampling", action="store_true", help="measure what is in DIR/videos, of whichever program")
    for size in SIZES:
        kind = float if size == "fps" else int
        add(f"--{size}", type=kind, help=f"default: that of the published values, {suite.settings[size]:g}")
    add("--steps", type=int, help="default: the weights' own, also for --guidance and --sampler")
    add("--guidance", type=float)
    add("--sampler")
    if name == "ucf101":
        add("--reference", required=True, metavar="DIR|FILE", help="the real videos, or their stored features")
        add("--i3d", type=Path, metavar="FILE", help="weights of FVD's network")
        add("--clips", type=int, metavar="N", help="clips of each set (default: all)")
    if name == "msrvtt":
        add("--clip", type=Path, required=True, metavar="DIR", help="weights folder of CLIP")
    if name == "vbench":
        add("--results", type=Path, metavar="DIR", help="results of VBench's tool (default: DIR/results of --out)")
    return parser


def run(name: str, argv: Sequence[str]) -> commands.Report:
    """Runs a benchmark."""
    suite, args = SUITES[name], suite_parser(name).parse_args(argv)
    if args.seed < 0 or (args.limit is not None and args.limit < 1):
        raise UserError(f"--seed must be at least 0 and --limit at least 1; given {args.seed} and {args.limit}")
    part = None if args.part is None else parse_part(args.part)
    check_folder(args.out, f"--out {args.out}")
    items = checked(suite.items(args.source, args.seed))[: args.limit]
    videos = args.out / VIDEOS
    if not args.no_sampling:
        sample(suite, items, args, part or (0, 1))
    if part is not None:
        line = f"sampled part {args.part} of {len(items)} videos in {videos}; run without --part to measure them"
        return commands.Report([line])
    if missing := [item.name for item in items if not _path(videos, item).is_file()]:
        raise UserError(f"{videos} lacks {len(missing)} of {len(items)} videos, such as {missing[0]}.mp4")
    values, lines = MEASURES.get(name, _nothing)(args, items)
    lines = [*lines, *(f"measure with: {line.format(videos=videos, out=args.out)}" for line in suite.tool)]
    result = {"metric": name, "knobs": _sampled_with(args.out), "numbers": {k: {"value": v} for k, v in values.items()},
              "published": dict(suite.published), "origin": suite.origin, "videos": len(items),
              "complete": args.limit is None}  # fmt: skip
    result_files.write(args.out / TABLE, result)
    return commands.Report([*lines, table(suite, values)])


def _path(videos: Path, item: Item) -> Path:
    return videos / f"{item.name}.mp4"


def _sampled_with(out: Path) -> dict[str, Any]:
    return read_json(out / SETTINGS) if (out / SETTINGS).is_file() else {}


# ---- sampling ----


def sample(suite: Suite, items: Sequence[Item], args: argparse.Namespace, part: tuple[int, int]) -> None:
    """Samples the videos that are missing, of this part; all of a run have the same settings."""
    given = {size: getattr(args, size) or suite.settings[size] for size in SIZES}
    given |= {name: getattr(args, name) for name in ("steps", "guidance", "sampler") if getattr(args, name) is not None}
    folder = cascade.stage_folder(args.weights, MAIN_STAGE)
    settings = {**given, "seed": args.seed, "weights_sha256": folder_hash(folder), "prompts": len(items)}
    facts = args.out / SETTINGS
    if facts.is_file() and (known := read_json(facts)) | {"prompts": len(items)} != settings:
        different = [key for key in settings if known.get(key) != settings[key]]
        raise UserError(
            f"{args.out} has videos of other settings ({', '.join(different)}): choose another --out, or give the same"
        )
    videos = args.out / VIDEOS
    index, parts = part
    todo = [(i, item) for i, item in enumerate(items) if i % parts == index and not _path(videos, item).is_file()]
    if not todo:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with finished(facts) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    pipe = cascade.load(folder, stages=(MAIN_STAGE,))
    resolved = cascade.resolve_settings(pipe.weights, (MAIN_STAGE,), {MAIN_STAGE: given})
    logging.info("%d of %d videos are to be sampled", len(todo), len(items))
    size = args.batch_size or len(pipe.devices)
    with tqdm(total=len(todo), desc="sampling", unit="video") as bar:
        for some in batches(todo, size):
            requests = [Request(prompt=item.prompt, seed=args.seed + i) for i, item in some]
            clips = pipe.videos(requests, resolved, batch_size=size)
            for (_, item), clip in zip(some, clips, strict=True):
                save_video(clip, _path(videos, item), fps=given["fps"])
                bar.update(1)


# ---- measuring ----


def _fvd(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    path = args.out / "fvd.json"
    flags = ["--samples", str(args.out / VIDEOS), "--reference", args.reference, "--protocol", "paper",
             "--out", str(args.out), "--json", str(path)]  # fmt: skip
    flags += ["--i3d", str(args.i3d)] if args.i3d else []
    flags += ["--clips", str(args.clips)] if args.clips else []
    report = commands.distance("fvd", flags)
    numbers = result_files.read(path)["numbers"]
    return {name: numbers[name]["value"] for name in commands.DISTANCES}, report.lines


def _clipsim(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    captions, path = args.out / CAPTIONS, args.out / "clipsim.json"
    captions.write_text(json.dumps({item.name: item.prompt for item in items}, indent=2) + "\n")
    flags = ["--samples", str(args.out / VIDEOS), "--captions", str(captions), "--clip", os.fspath(args.clip)]
    report = commands.clip_similarity("clipsim", [*flags, "--json", str(path)])
    return {"clipsim": result_files.read(path)["numbers"]["clipsim"]["value"]}, report.lines


def _vbench(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    """Reads the tool's results, if there are any; otherwise measures the dimension that needs no network."""
    folder = args.results or args.out / "results"
    if args.results is not None or folder.is_dir():
        values = read_vbench_results(folder)
        return {name: 100 * value for name, value in values.items()} | vbench_scores(values), []
    own = args.out / VIDEOS / "temporal_flickering"
    clips = find_videos(os.fspath(own if own.is_dir() else args.out / VIDEOS), "--out")
    values = [temporal_flickering(video.read()) for video in tqdm(clips, desc="flickering", unit="video")]
    return {"temporal_flickering": 100 * sum(values) / len(values)}, []


def _videophy(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    """Writes the table that VideoPhy's tool reads."""
    with finished(args.out / "videos.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["videopath", "caption"])
        rows.writerows([_path((args.out / VIDEOS).absolute(), item), item.prompt] for item in items)
    return {}, []


def _nothing(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    return {}, []


MEASURES = {"ucf101": _fvd, "msrvtt": _clipsim, "vbench": _vbench, "videophy": _videophy}


def table(suite: Suite, values: dict[str, float]) -> str:
    """Returns a table of our values beside the published ones."""
    names = list(dict.fromkeys([*values, *suite.published]))
    rows = [[n, *(f"{x[n]:.4g}" if n in x else "" for x in (values, suite.published))] for n in names]
    return results.markdown(["", "this run", f"published ({suite.origin or 'none'})"], rows)
