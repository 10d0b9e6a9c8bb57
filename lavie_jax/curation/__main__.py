"""Raw videos to training shards.

    python -m lavie_jax.curation --input videos --out shards
    python -m lavie_jax.curation --input videos --out shards --captions videos.csv --min-height 480 --workers 16
    python -m lavie_jax.curation --input videos --out latents --latents weights/base
    python -m lavie_jax.curation --stills webdataset:data/laion --out stills --latents weights/base

Cuts videos into scenes, drops those that do not serve training, and writes the rest with their captions as ArrayRecord
shards, with lists, a manifest and report.html. With --latents the shards hold what the frozen models of a stage see of
the clips, or of pictures. Stopped at any moment, the same command goes on. docs/data.md tells what each filter does.
Needs PySceneDetect and matplotlib: pip install "lavie_jax[curation]".
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lavie_jax.curation.filters import LETTERBOX, Thresholds
from lavie_jax.curation.pipeline import Job, LatentJob, Outcome, curate
from lavie_jax.data.buckets import parse_sizes
from lavie_jax.errors import Parser, UserError, one_line_errors


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.curation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, metavar="FOLDER", help="videos, searched to its depths")
    add("--stills", metavar="KIND:PATH", help="captioned pictures instead, all of them, with --latents")
    add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder, or one where a run was stopped")
    add("--captions", type=Path, metavar="TABLE", help=".csv, .tsv or .jsonl; default: clip.txt beside clip.mp4")
    add("--captioner", metavar="FOLDER|MODULE:FUNCTION", help="captions the scenes that no given caption covers")
    add("--aesthetic-clip", metavar="FOLDER", help="CLIP model that scores are computed with")
    add("--aesthetic-head", metavar="FILE", help="linear layers on CLIP's image embedding")
    add("--latents", metavar="WEIGHTS", help="write latents and encoded captions, by this weights folder, not clips")
    add("--latent-sizes", metavar="HxW,...", help="of frames, such as 320x512,512x320 (default: what WEIGHTS samples)")
    add("--latent-fps", type=float, metavar="N", help="frames a second that are kept (default: what WEIGHTS samples)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--shard-clips", type=int, default=1000, help="clips a shard (default: %(default)s)")
    filters = parser.add_argument_group("filters")
    for field in dataclasses.fields(Thresholds):
        text = f"{field.metadata['help']} (default: %(default)s)"
        shown = "|".join(LETTERBOX) if field.name == "letterbox" else "N"
        filters.add_argument(_flag(field.name), type=field.type, default=field.default, help=text, metavar=shown)
    return parser.parse_args(argv)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _job(args: argparse.Namespace) -> Job:
    if (args.aesthetic_clip is None) != (args.aesthetic_head is None):
        raise UserError("--aesthetic-clip and --aesthetic-head belong together")
    if args.min_aesthetic and not args.aesthetic_clip:
        raise UserError("--min-aesthetic needs --aesthetic-clip and --aesthetic-head")
    thresholds = Thresholds(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Thresholds)})
    aesthetic = (args.aesthetic_clip, args.aesthetic_head) if args.aesthetic_clip else None
    return Job(thresholds=thresholds, captioner=args.captioner, aesthetic=aesthetic, latents=_latent_job(args))


def _latent_job(args: argparse.Namespace) -> LatentJob | None:
    if args.latents is None:
        if args.latent_sizes is not None or args.latent_fps is not None:
            raise UserError("--latent-sizes and --latent-fps need --latents, the weights that make latents")
        return None
    sizes = () if args.latent_sizes is None else parse_sizes(args.latent_sizes)
    if args.latent_fps is not None and not args.latent_fps > 0:
        raise UserError(f"--latent-fps must be above 0; given {args.latent_fps:g}")
    return LatentJob(weights=args.latents, sizes=sizes, fps=args.latent_fps or 0.0)


def _told(outcome: Outcome, out: Path) -> str:
    lines = [f"{outcome.clips} clips of {outcome.videos} videos are in {out}; see {out / 'report.html'}"]
    if not (out / "report.html").exists():
        lines = [f"{outcome.clips} of {outcome.videos} pictures are in {out}"]
    lines += [f"  dropped {number:6d}  {reason}" for reason, number in outcome.dropped.items()]
    if outcome.core_seconds:
        speed = outcome.video_seconds / outcome.core_seconds
        lines.append(f"{outcome.video_seconds / 3600:.3f} hours of video at {speed:.2f} hours a core-hour")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this package."""
    with one_line_errors():
        args = _parse(argv)
        if (args.input is None) == (args.stills is None):
            raise UserError("one of --input, a folder of videos, and --stills, captioned pictures, is needed")
        if args.stills is None:
            job, table = _job(args), args.captions
            outcome = curate(args.input, args.out, job, table=table, workers=args.workers, shard_clips=args.shard_clips)
        else:
            outcome = _stills(args)
    print(_told(outcome, args.out))


def _stills(args: argparse.Namespace) -> Outcome:
    if args.latents is None:
        raise UserError("--stills needs --latents: training reads encoded pictures as they are (data.image_source)")
    from lavie_jax.curation.stills import encode_stills  # loads jax, which the workers of clips do without

    return encode_stills(args.stills, args.out, _latent_job(args), shard_clips=args.shard_clips)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
