"""Turns raw videos into training shards.

    python -m lavie_jax.curation --input videos --out shards
    python -m lavie_jax.curation --input videos --out shards --captions videos.csv --min-height 480 --workers 16
    python -m lavie_jax.curation --input videos --out latents --latents weights/base
    python -m lavie_jax.curation --images webdataset:data/laion --out images --latents weights/base

Cuts videos into scenes, drops scenes that are unsuitable for training, and writes the rest with their captions as
ArrayRecord shards, with lists, a manifest and report.html. With --latents, the shards hold the outputs of a stage's
frozen models for the clips, or for images (--images). If interrupted, the same command resumes. docs/data.md describes
the filters. Needs PySceneDetect and matplotlib: pip install "lavie_jax[curation]".
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lavie_jax.curation import beam
from lavie_jax.curation.beam import STAGES
from lavie_jax.curation.filters import LETTERBOX, Thresholds
from lavie_jax.curation.inputs import HeldOut
from lavie_jax.curation.job import CurationJob, LatentJob, Outcome
from lavie_jax.curation.pipeline import TIME_LIMIT, curate
from lavie_jax.data.buckets import parse_sizes
from lavie_jax.errors import Parser, UserError, one_line_errors, user_location


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.curation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, metavar="FOLDER", help="folder of videos, searched recursively")
    add(
        "--images",
        type=user_location,
        metavar="KIND:PATH",
        help="encode all images of this source instead of videos; needs --latents",
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder, or the folder of an interrupted run")
    add("--captions", type=Path, metavar="TABLE", help=".csv, .tsv or .jsonl (default: clip.txt beside clip.mp4)")
    add(
        "--captioner",
        type=user_location,
        metavar="FOLDER|MODULE:FUNCTION",
        help="model or function that captions scenes without a given caption",
    )
    add("--aesthetic-clip", type=user_location, metavar="FOLDER", help="CLIP model for aesthetic scores")
    add(
        "--aesthetic-head",
        type=user_location,
        metavar="FILE",
        help="linear layers that map CLIP's image embedding to the score",
    )
    add(
        "--latents",
        type=user_location,
        metavar="WEIGHTS",
        help="write latents and encoded captions, computed with this weights folder",
    )
    add("--latent-sizes", metavar="HxW,...", help="frame sizes, such as 320x512,512x320 (default: from WEIGHTS)")
    add("--latent-fps", type=float, metavar="N", help="frames per second to keep (default: from WEIGHTS)")
    add(
        "--hold-out",
        nargs="+",
        default=[],
        metavar="NAME[:START-END]",
        help="clips for the held-out split, by name of the video, with * and ?, and seconds (default: a twentieth of "
        "the videos, by hash)",
    )
    add("--workers", type=int, help="number of processes, here or of DirectRunner (default: one per core)")
    add("--shard-clips", type=int, default=1000, help="clips per shard (default: %(default)s)")
    add(
        "--time-limit",
        type=float,
        default=TIME_LIMIT,
        metavar="SECONDS",
        help="drop a video as unreadable if a part of it, about a minute, takes a worker longer; 0: no limit "
        "(default: %(default)g)",
    )
    engine = parser.add_argument_group("Apache Beam")
    engine.add_argument("--runner", metavar="NAME", help="run on this runner of Apache Beam, such as DirectRunner")
    engine.add_argument(
        "--until",
        choices=STAGES,
        default=STAGES[-1],
        help="end after this stage; the same command, on the same or other machines, runs the others later",
    )
    engine.add_argument("runner_options", nargs="*", metavar="-- OPTIONS", help="options of the runner, after --")
    filters = parser.add_argument_group("filters")
    for field in dataclasses.fields(Thresholds):
        flag, text = f"--{field.name.replace('_', '-')}", f"{field.metadata['help']} (default: %(default)s)"
        metavar = "|".join(LETTERBOX) if field.name == "letterbox" else "N"
        filters.add_argument(flag, type=field.type, default=field.default, help=text, metavar=metavar)
    return parser.parse_args(argv)


def _job(args: argparse.Namespace) -> CurationJob:
    if (args.aesthetic_clip is None) != (args.aesthetic_head is None):
        raise UserError("--aesthetic-clip and --aesthetic-head must be given together")
    if args.min_aesthetic and not args.aesthetic_clip:
        raise UserError("--min-aesthetic needs --aesthetic-clip and --aesthetic-head")
    thresholds = Thresholds(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Thresholds)})
    aesthetic = (args.aesthetic_clip, args.aesthetic_head) if args.aesthetic_clip else None
    return CurationJob(
        thresholds=thresholds, captioner=args.captioner, aesthetic=aesthetic,
        hold_out=tuple(map(HeldOut.parse, args.hold_out)), latents=_latent_job(args),
    )  # fmt: skip


def _latent_job(args: argparse.Namespace) -> LatentJob | None:
    if args.latents is None:
        if args.latent_sizes is not None or args.latent_fps is not None:
            raise UserError("--latent-sizes and --latent-fps need --latents WEIGHTS")
        return None
    sizes = () if args.latent_sizes is None else parse_sizes(args.latent_sizes)
    if args.latent_fps is not None and not 0 < args.latent_fps < math.inf:
        raise UserError(f"--latent-fps must be above 0 and finite; given {args.latent_fps:g}")
    return LatentJob(weights=args.latents, sizes=sizes, fps=args.latent_fps or 0.0)


def _encode_images(args: argparse.Namespace) -> Outcome:
    if args.latents is None:
        raise UserError("--images needs --latents; training can read unencoded images directly (data.image_source)")
    from lavie_jax.curation.images import encode_images  # loads jax, which worker processes do not need

    return encode_images(args.images, args.out, _latent_job(args), shard_clips=args.shard_clips)


def _summary(outcome: Outcome, out: Path) -> str:
    lines = [f"{outcome.clips} clips from {outcome.videos} videos are in {out}; see {out / 'report.html'}"]
    if not (out / "report.html").exists():
        lines = [f"{outcome.clips} of {outcome.videos} images are in {out}"]
    lines += [f"  dropped {number:6d}  {reason}" for reason, number in outcome.dropped.items()]
    if outcome.core_seconds:
        speed = outcome.video_seconds / outcome.core_seconds
        lines.append(f"{outcome.video_seconds / 3600:.3f} hours of video, {speed:.2f} hours per core-hour")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        if args.runner is None and (args.runner_options or args.until != STAGES[-1]):
            raise UserError("--until and options of a runner need --runner NAME")
        if args.runner is not None and args.images is not None:
            raise UserError("--runner is for --input; --images runs on all devices of this machine")
        if (args.input is None) == (args.images is None):
            raise UserError("give either --input, a folder of videos, or --images, captioned images")
        if args.images is None:
            job, table, workers = _job(args), args.captions, args.workers
            if workers is None and (args.runner is None or beam.is_direct(args.runner)):
                workers = os.cpu_count() or 1
            options = {"table": table, "workers": workers, "shard_clips": args.shard_clips,
                       "time_limit": args.time_limit}  # fmt: skip
            if args.runner is None:
                outcome = curate(args.input, args.out, job, **options)
            else:
                outcome = beam.curate(
                    args.input, args.out, job, runner=args.runner, options=args.runner_options, until=args.until,
                    **options,
                )  # fmt: skip
        else:
            outcome = _encode_images(args)
    print(_summary(outcome, args.out) if outcome else f"finished stage {args.until}; run the others without --until")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(130)
