"""Published benchmarks as commands: samples the videos, measures them or prints how to, and prints the table.

    python -m lavie_jax.evaluation ucf101 --weights DIR --classes classInd.txt --reference UCF-101 --out RUN
    python -m lavie_jax.evaluation vbench --weights DIR --prompts VBench/prompts/prompts_per_dimension --out RUN

Videos that exist are not sampled again. Several hosts share a run with --part I/N and the same --out.
"""

import argparse
import csv
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from tqdm.auto import tqdm

from lavie_jax import cascade, results
from lavie_jax.cascade.running import Request
from lavie_jax.data.video_files import save_video
from lavie_jax.disk import new_file
from lavie_jax.errors import Parser, UserError, check_folder, user_location
from lavie_jax.evaluation import commands, fvd, result_files
from lavie_jax.evaluation.frame_measures import summary
from lavie_jax.evaluation.protocols import FVDKnobs, make_knobs
from lavie_jax.evaluation.suites import (
    SUITES,
    Item,
    Suite,
    checked,
    prompts_hash,
    read_vbench_results,
    temporal_flickering,
    vbench_commands,
    vbench_scores,
)
from lavie_jax.evaluation.videos import batches, check_clips, find_videos, too_few
from lavie_jax.fields import MAX_SEED
from lavie_jax.samples.prompts import parse_part
from lavie_jax.stages.settings import MAIN_STAGE
from lavie_jax.text_files import read_json
from lavie_jax.weights import folder_hash

VIDEOS, SETTINGS, CAPTIONS, TABLE = "videos", "settings.json", "captions.json", "table.json"
TOOL_TABLE = "videos.csv"
RESULTS = FVD, CLIPSIM = "fvd.json", "clipsim.json"
SIZES = ("frames", "height", "width", "fps")
PROTOCOL = "paper"  # of the FVD of ucf101


class Measured(NamedTuple):
    """What a benchmark measured.

    Attributes:
        numbers: {measure: its cell of the result file}.
        lines: to print.
        facts: what makes results comparable: knobs and hashes.
    """

    numbers: Mapping[str, Mapping[str, Any]] = {}
    lines: Sequence[str] = ()
    facts: Mapping[str, Any] = {}


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
        about = "the real videos, or their stored features"
        add("--reference", type=user_location, required=True, metavar="DIR|FILE", help=about)
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
    part = _check(args)
    every = checked(suite.items(args.source, args.seed))
    items = every[: args.limit]
    if args.seed + len(items) - 1 > MAX_SEED:
        raise UserError(f"--seed {args.seed} is too large: video {len(items)} would have a seed above {MAX_SEED}")
    _check_prompts(args.out, prompts_hash(every))
    if part is None and not args.no_sampling and name in CHECKS:
        CHECKS[name](args, items)
    videos = args.out / VIDEOS
    if not args.no_sampling:
        sample(suite, items, args, part or (0, 1), prompts_hash(every))
    if part is not None:
        line = f"sampled part {args.part} of {len(items)} videos in {videos}; run without --part to measure them"
        return commands.Report([line])
    if missing := [item.name for item in items if not _path(videos, item).is_file()]:
        raise UserError(f"{videos} lacks {len(missing)} of {len(items)} videos, such as {missing[0]}.mp4")
    numbers, lines, facts = MEASURES.get(name, _nothing)(args, items)
    where = {"videos": shlex.quote(str(videos.resolve())), "out": shlex.quote(str(args.out.resolve()))}
    lines = [*lines, *(f"measure with: {line.format(**where)}" for line in suite.tool)]
    result = {"metric": name, "knobs": {}, **facts, "numbers": numbers, "prompts_sha256": prompts_hash(items),
              "sampling": _settings(args.out), "published": dict(suite.published), "origin": suite.origin,
              "videos": len(items), "complete": len(items) == len(every)}  # fmt: skip
    result_files.write(args.out / TABLE, result)
    return commands.Report([*lines, table(suite, {name: cell["value"] for name, cell in numbers.items()})])


def _check(args: argparse.Namespace) -> tuple[int, int] | None:
    """Checks the flags, and that nothing of the user would be overwritten; returns --part."""
    for flag, low in (("seed", 0), ("limit", 1), ("batch_size", 1), ("clips", 2)):
        value = getattr(args, flag, None)
        if value is not None and value < low:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {low}; given {value}")
    if args.part is not None and args.no_sampling:
        raise UserError("--part divides the sampling, and --no-sampling leaves it out: give one of them")
    check_folder(args.out, f"--out {args.out}")
    for name in (TABLE, *RESULTS):
        results.check_path(args.out / name, result_files.KIND)
    for name in (CAPTIONS, TOOL_TABLE, SETTINGS, TABLE):
        if (args.out / name).exists() and args.source.exists() and args.source.samefile(args.out / name):
            raise UserError(f"{args.source} would be overwritten by this run: choose another --out")
    return None if args.part is None else parse_part(args.part)


def _path(videos: Path, item: Item) -> Path:
    return videos / f"{item.name}.mp4"


def _settings(out: Path) -> dict[str, Any]:
    """Returns the settings with which the videos were sampled; none for those of another program."""
    return read_json(out / SETTINGS) if (out / SETTINGS).is_file() else {}


def _check_prompts(out: Path, prompts: str) -> None:
    """Raises UserError if the videos of a run were sampled from other prompts."""
    if _settings(out).get("prompts_sha256", prompts) != prompts:
        raise UserError(f"{out} has videos of other prompts: choose another --out, or give the same prompts and seed")


# ---- sampling ----


def sample(suite: Suite, items: Sequence[Item], args: argparse.Namespace, part: tuple[int, int], prompts: str) -> None:
    """Samples the videos that are missing, of this part; all of a run have the same settings."""
    given = {size: suite.settings[size] if getattr(args, size) is None else getattr(args, size) for size in SIZES}
    given |= {name: getattr(args, name) for name in ("steps", "guidance", "sampler") if getattr(args, name) is not None}
    folder = cascade.stage_folder(args.weights, MAIN_STAGE)
    settings = {**given, "seed": args.seed, "weights_sha256": folder_hash(folder), "prompts_sha256": prompts}
    known, videos = _settings(args.out), args.out / VIDEOS
    if different := [key for key in {**known, **settings} if known and known.get(key) != settings.get(key)]:
        raise UserError(
            f"{args.out} has videos of other settings ({', '.join(different)}): choose another --out, or give the same"
        )
    index, parts = part
    there = [_path(videos, item).is_file() for item in items]
    todo = [(i, item) for i, item in enumerate(items) if i % parts == index and not there[i]]
    if not todo:
        return
    if any(there) and not known:
        raise UserError(
            f"{videos} has {sum(there)} videos that were not sampled here: choose another --out, or measure them "
            "with --no-sampling"
        )
    pipe = cascade.load(folder, stages=(MAIN_STAGE,))
    resolved = cascade.resolve_settings(pipe.weights, (MAIN_STAGE,), {MAIN_STAGE: given})
    if not known:
        with new_file(args.out / SETTINGS) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
    logging.info("%d of %d videos are to be sampled", len(todo), len(items))
    size = args.batch_size or len(pipe.devices)
    with tqdm(total=len(todo), desc="sampling", unit="video") as bar:
        for some in batches(todo, size):
            requests = [Request(prompt=item.prompt, seed=args.seed + i) for i, item in some]
            clips = pipe.videos(requests, resolved, batch_size=size)
            for (_, item), clip in zip(some, clips, strict=True):
                save_video(clip, _path(videos, item), fps=given["fps"])
                bar.update(1)


# ---- checks of what is measured, before hours of sampling ----


def _check_fvd(args: argparse.Namespace, items: Sequence[Item]) -> None:
    _, weights = commands.load_i3d(args.i3d)
    knobs = make_knobs(FVDKnobs, {"clips": args.clips}, PROTOCOL)
    stored = fvd.stored_kind(args.reference)
    if stored:
        count = len(fvd.read_features(Path(args.reference), knobs, weights).features.logits)
    else:
        reference = find_videos(args.reference, "--reference")
        check_clips([(video, 0) for video in reference], knobs)
        count = len(reference)
    for flag, clips in ((SUITES["ucf101"].source, len(items)), ("--reference", count)):
        if clips < (knobs.clips or 2):
            raise too_few(flag, clips, knobs.clips or 2)


def _check_clip(args: argparse.Namespace, items: Sequence[Item]) -> None:
    commands.Scorer(args.clip)


def _check_results(args: argparse.Namespace, items: Sequence[Item]) -> None:
    if args.results is not None:
        read_vbench_results(args.results)


CHECKS = {"ucf101": _check_fvd, "msrvtt": _check_clip, "vbench": _check_results}

# ---- measuring ----


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `compare` needs of the result of a metric."""
    names = ("knobs", "weights_sha256", "samples_sha256", "reference_sha256", "captions_sha256")
    return {name: result[name] for name in names if name in result}


def _check_no_others(args: argparse.Namespace, items: Sequence[Item]) -> None:
    """Raises UserError for videos in the folder that are not among the items: a metric measures all of a folder."""
    videos = args.out / VIDEOS
    if more := {video.name for video in find_videos(os.fspath(videos), "--out")} - {item.name for item in items}:
        raise UserError(
            f"{videos} has {len(more)} videos besides the {len(items)} to be measured, such as {min(more)}: move them, "
            "or give the --limit that they were sampled with"
        )


def _fvd(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    _check_no_others(args, items)
    path = args.out / FVD
    flags = ["--samples", str(args.out / VIDEOS), "--reference", args.reference, "--protocol", PROTOCOL,
             "--out", str(args.out), "--json", str(path)]  # fmt: skip
    flags += ["--i3d", str(args.i3d)] if args.i3d else []
    flags += ["--clips", str(args.clips)] if args.clips else []
    report = commands.distance("fvd", flags)
    result = result_files.read(path)
    numbers = {name: result["numbers"][name] for name in commands.DISTANCES}
    return Measured(numbers, report.lines, _facts(result))


def _clipsim(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    _check_no_others(args, items)
    captions, path = args.out / CAPTIONS, args.out / CLIPSIM
    with new_file(captions) as temporary:
        temporary.write_text(json.dumps({item.name: item.prompt for item in items}, indent=2) + "\n")
    flags = ["--samples", str(args.out / VIDEOS), "--captions", str(captions), "--clip", os.fspath(args.clip)]
    report = commands.clip_similarity("clipsim", [*flags, "--json", str(path)])
    result = result_files.read(path)
    return Measured(result["numbers"], report.lines, _facts(result))


def _vbench(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    """Reads the tool's results, if there are any; otherwise measures the dimension that needs no network."""
    folder = args.results or args.out / "results"
    folders = list(dict.fromkeys(item.name.partition("/")[0] for item in items))
    values = read_vbench_results(folder) if args.results is not None or folder.is_dir() else {}
    lines = [f"measure with: {line}" for line in vbench_commands(folders, args.out / VIDEOS, args.out, values)]
    if values:
        percent = {name: 100 * value for name, value in values.items()} | vbench_scores(values)
        numbers = {name: {"value": value} for name, value in percent.items()}
        return Measured(numbers, lines, {"knobs": {"measured_by": "VBench's tool"}})
    own = [item for item in items if item.name.startswith("temporal_flickering/")] or items
    found = {video.name: video for video in find_videos(os.fspath(args.out / VIDEOS), "--out")}
    clips = {item.name: found[item.name] for item in own}
    each = {
        name: 100 * temporal_flickering(video.read())
        for name, video in tqdm(clips.items(), desc="flickering", unit="video")
    }
    cell = summary(each, resamples=1000, seed=0)
    return Measured({"temporal_flickering": cell}, lines, {"knobs": {"measured_by": "lavie_jax"}})


def _videophy(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    """Writes the table that VideoPhy's tool reads."""
    with new_file(args.out / TOOL_TABLE) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["videopath", "caption"])
        rows.writerows([_path((args.out / VIDEOS).absolute(), item), item.prompt] for item in items)
    return Measured()


def _nothing(args: argparse.Namespace, items: Sequence[Item]) -> Measured:
    return Measured()


MEASURES = {"ucf101": _fvd, "msrvtt": _clipsim, "vbench": _vbench, "videophy": _videophy}


def table(suite: Suite, values: Mapping[str, float | None]) -> str:
    """Returns a table of our values beside the published ones."""
    names = list(dict.fromkeys([*values, *suite.published]))
    rows = [[n, *(f"{x[n]:.4g}" if x.get(n) is not None else "" for x in (values, suite.published))] for n in names]
    return results.markdown(["", "this run", f"published ({suite.origin or 'none'})"], rows)
