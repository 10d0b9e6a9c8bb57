"""Samples videos from prompts, pictures and clips, through one or more stages.

    python sample.py --prompt "a red circle moving left"
    python sample.py --prompt "a red circle moving left" --stages base,interpolation,vsr --weights weights
    python sample.py --prompt "a red circle moving left" --stages vsr --input clip.mp4 --weights weights/vsr
    python sample.py --prompt "a red circle moving left" --stages prediction --first-frame photo.png
    python sample.py --prompt "a red circle | a blue circle" --stages base,prediction --segments 4
    python sample.py --prompt-file prompts.txt --num-videos 4 --weights weights/base --out samples

Each sample is written to OUT/{index:04d}-{slug}-{seed}.mp4, where index counts the prompts, with a JSON file that
records everything needed to reproduce it. OUT/contact-sheet.png shows the samples of the last command. With several
stages, or with --input, OUT/stages contains the lossless frames of every stage (.npy), and the contact sheet has a row
for each stage, at the same points in time. Existing samples are skipped, and an interrupted run resumes at the same
prompt, stage, segment and denoising step. `--part I/N` splits the samples between machines that run the same command
with the same OUT; with --distributed, the devices of all hosts make each sample together. Omitted settings default to
those in the weights folder's config.json. Compiled programs are cached in ~/.cache/lavie_jax, or in
JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavie_jax.disk import file_hash
from lavie_jax.errors import Parser, UserError, check_folder
from lavie_jax.remote import Mirror
from lavie_jax.samples.flags import (
    add_dtype,
    add_finishing,
    add_personal,
    add_prompts,
    add_settings,
    add_weights,
    given_certificate,
    given_filter,
    given_settings,
    given_stage_weights,
)
from lavie_jax.samples.outputs import Output, check_formats, make_request, parse_formats
from lavie_jax.samples.pictures import PICTURES, Picture, by_frame, read_pictures
from lavie_jax.samples.prompt_syntax import Reading
from lavie_jax.samples.prompts import (
    Prompt,
    check_seed,
    check_unicode,
    check_within,
    one_line,
    parse_part,
    parse_prompts_at,
    read_prompts,
)
from lavie_jax.samples.safety import SafetyFilter, withheld
from lavie_jax.samples.sheets import ContactSheets
from lavie_jax.samples.stage_cache import STATE, MemoryCache, StageCache
from lavie_jax.stages.settings import MAIN_STAGE, OFFICIAL, PRESETS, STAGE_INFO, Settings, parse_stages


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Raises UserError when it is malformed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add_prompts(add)
    add(
        "--stages",
        default=MAIN_STAGE,
        metavar="LIST",
        help=f"stages to run, in order, separated by commas: {', '.join(STAGE_INFO)} (default: {MAIN_STAGE}); "
        f"a stage that needs a clip starts from the output of the one before, or from --input",
    )
    add(
        "--input",
        type=Path,
        metavar="FILE",
        help="clip for the first stage to start from: a video file, or an .npz with the arrays video, "
        "uint8 (T, H, W, 3), and optionally fps, a number (default 8)",
    )
    takers = ", ".join(stage for stage, info in STAGE_INFO.items() if info.takes_known)
    for name in PICTURES:
        text = f"picture of any size that is the {name} frame of the video, for {takers}"
        add(f"--{name}-frame", type=Path, metavar="FILE", help=text)
    add("--seed", default="0", metavar="S", help="seed of the first video of each prompt (default 0)")
    add("--num-videos", type=int, default=1, metavar="N", help="per prompt, with seeds S to S+N-1 (default 1)")
    add(
        "--format",
        metavar="LIST",
        help="any of mp4,gif,png,npz (default mp4; png for images and odd sides); png, a "
        "folder of frames, and npz, an array, are lossless",
    )
    add(
        "--no-metadata",
        action="store_true",
        help="write no prompt and settings into the videos, only that they are generated",
    )
    add_finishing(add)
    add("--no-contact-sheet", action="store_true", help="do not write contact-sheet.png")
    add(
        "--part",
        default="0/1",
        metavar="I/N",
        help="generate only every N-th sample, starting at index I: hosts 0 to N-1 with the same command and OUT share "
        "the work (default 0/1)",
    )
    add(
        "--distributed",
        action="store_true",
        help="make each sample on the devices of all hosts, which run this command at the same time with the same "
        "files and OUT; the first host writes",
    )
    add("--fsdp", type=int, default=1, metavar="N", help="split the weights over N of this host's devices (default 1)")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="videos that base and prediction denoise together (default: one per device)",
    )
    add_dtype(add)
    add_weights(add)
    add_personal(add)
    add(
        "--preset",
        default=OFFICIAL,
        choices=PRESETS,
        help="settings of all stages: official, the weights folders' own; balanced or fast, which save work "
        "(docs/speed.md); flags come before a preset (default: official)",
    )
    add("--out", type=Path, default=Path("samples"), metavar="DIR", help="output folder (default: samples)")
    add("--overwrite", action="store_true", help="generate existing samples again, and replace them")
    add_settings(parser)
    return parser.parse_args(argv)


def read_requests(args: argparse.Namespace) -> list[Prompt]:
    """Checks all arguments, parses those that are text in place, and returns the prompts: flags, then the file."""
    for name in ("num_videos", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')} must be at least 1, not {value}")
    args.reading = Reading(args.prompt_syntax, args.long_prompts)
    args.stages = parse_stages(args.stages, own_clip=args.input is not None)
    args.given = given_settings(args)
    args.pictures = {name: path for name in PICTURES if (path := getattr(args, f"{name}_frame")) is not None}
    args.mirror = Mirror.of(args.out)
    args.out = args.mirror.folder
    check_folder(args.out, f"--out {args.out}")
    args.format = args.format and parse_formats(args.format)
    args.certificate, args.unsafe = given_certificate(args), given_filter(args)
    args.seed = check_seed(args.seed, "seed")
    args.part = parse_part(args.part)
    if any(not text.strip() for text in args.prompt):
        raise UserError("prompt: an empty prompt was given")
    for text in args.prompt:
        check_unicode(text, "prompt")
    prompts = [Prompt(text=text.strip()) for text in args.prompt]
    prompts += [Prompt(text=one_line(at), at=at) for at in map(parse_prompts_at, args.prompts_at)]
    prompts += read_prompts(args.prompt_file) if args.prompt_file else []
    args.unprompted = not prompts and args.input is not None and MAIN_STAGE not in args.stages
    if args.unprompted:  # refused later, if the models read it
        prompts = [Prompt(text=" ".join(args.input.stem.split()) or "clip")]
    if not prompts:
        raise UserError('give a --prompt, e.g. --prompt "a red circle moving left", or a --prompt-file')
    for prompt in prompts:
        check_seed((args.seed if prompt.seed is None else prompt.seed) + args.num_videos - 1, "last seed")
        if prompt.negative is not None and MAIN_STAGE not in args.stages:
            raise UserError(
                f"prompt file: negative_prompt belongs to {MAIN_STAGE}, which is not among the stages; "
                f"use --{args.stages[0]}-negative-prompt"
            )
    return prompts


def read_input(path: Path) -> tuple:
    """Returns (frames, ClipInfo, SHA-256 of the file) of the user's clip."""
    from lavie_jax.data.video_files import read_clip
    from lavie_jax.stages.clips import ClipInfo, free_memory

    frames, fps = read_clip(path, max_bytes=free_memory() / 2, warn=lambda line: warn([line]))
    clip = ClipInfo(frames=len(frames), height=frames.shape[1], width=frames.shape[2], fps=fps, own=True)
    return frames, clip, file_hash(path)


def plan_outputs(
    args: argparse.Namespace,
    prompts: list[Prompt],
    settings: dict[str, Settings],
    hashes: dict[str, str],
    clip_hash: str | None,
    given: Mapping[int, Picture],
    personal: Mapping[str, Any],
) -> list[Output]:
    """Returns one output for each prompt and seed; `personal` records the LoRA files and embeddings."""
    last = settings[args.stages[-1]]
    odd = last.height % 2 or last.width % 2
    formats = args.format or (("png",) if last.output_frames == 1 or odd else ("mp4",))
    check_formats(formats, frames=last.output_frames, height=last.height, width=last.width)
    outputs = []
    for index, prompt in enumerate(prompts):
        if prompt.at is not None:
            check_within(prompt.at, settings[args.stages[0]].output_frames, "prompts-at")
        first = args.seed if prompt.seed is None else prompt.seed
        for seed in range(first, first + args.num_videos):
            request = make_request(
                prompt.text, seed, settings, hashes, negative_prompt=prompt.negative, clip_hash=clip_hash,
                known_hashes={frame: picture.sha256 for frame, picture in given.items()}, prompts_at=prompt.at,
                reading=args.reading,
            )  # fmt: skip
            request |= personal
            describe = not args.no_metadata
            outputs.append(
                Output(
                    folder=args.out, index=index, formats=formats, request=request, describe=describe,
                    certificate=args.certificate,
                )
            )  # fmt: skip
    return outputs


def written(
    outputs: Sequence[Output],
    formats: Sequence[Sequence[str]],
    videos: Iterator,
    caches: Sequence,
    made_with: dict,
    unsafe: SafetyFilter | None,
) -> Iterator[tuple[Output, Any]]:
    """Writes the files that each output lacks (`formats`). Yields each output with its video, None if it was complete.

    `videos` and `caches` belong to the incomplete outputs. Videos for which `unsafe` returns True are replaced.
    """
    caches = iter(caches)
    for output, missing in zip(outputs, formats):
        video = next(videos) if missing else None
        if missing:
            cache, record = next(caches), made_with
            if unsafe is not None and unsafe(video):
                warn([f"{output.path('json')}: the safety filter withholds this video: its frames are black"])
                video, record = withheld(video), {**made_with, "withheld": True}
                cache.remove()
            for path in output.write(video, missing, record):
                tqdm.write(str(path))
            cache.clear()
        yield output, video


def add_to_sheet(sheets: ContactSheets, output: Output, video, stages: Sequence[str], clips: dict, dtype: str) -> None:
    """Adds a row for each clip that the sample started from (`clips`) and for each of its stages.

    The rows show the same points in time, so stages before one that continues their clip are left out. If `video` is
    None, it is read from the sample's files.
    """
    cache = output.cache(dtype)
    first = max((i for i, stage in enumerate(stages) if STAGE_INFO[stage].takes_known), default=0)
    intermediate = {stage: frames for stage in stages[first:-1] if (frames := cache.get(stage)) is not None}
    try:
        video = output.read() if video is None else video
    except UserError as error:  # a damaged sample of an earlier run must not stop this one
        warn([str(error)])
    else:
        sheets.add({**clips, **intermediate, stages[-1]: video}, output.request["prompt"])


def warn(lines: list[str]) -> None:
    """Prints warnings to stderr."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def warn_of_existing(args: argparse.Namespace) -> None:
    """Warns that options for the files of new samples do not change those of existing samples."""
    options = {"no-metadata": args.no_metadata, "c2pa-certificate": args.certificate, "safety-filter": args.unsafe}
    if names := [name for name, given in options.items() if given]:
        warn([f"{', '.join(names)}: files of existing samples stay as they are; --overwrite makes them again"])


def given_files(
    args: argparse.Namespace, folders: Mapping[str, Path], pictures: Mapping[str, Picture]
) -> dict[str, str]:
    """Returns the weights, the preset and the files that samples are made with, for their JSON."""
    from lavie_jax.weights.locations import record

    made_with = {}
    for stage, folder in folders.items():
        made_with |= record(STAGE_INFO[stage].option("weights").replace("-", "_"), folder)
    made_with |= {} if args.preset == OFFICIAL else {"preset": args.preset}
    made_with |= {"input": str(args.input)} if args.input else {}
    return made_with | {f"{name}_frame": str(picture.path) for name, picture in pictures.items()}


def shared_caches(caches: Sequence[StageCache], first: bool) -> Sequence[MemoryCache]:
    """Returns this host's caches, of which only the first host's write. Checks that all hosts see the same contents."""
    from jax.experimental import multihost_utils

    from lavie_jax.parallel import check_hosts_are_consistent

    multihost_utils.sync_global_devices("what is overwritten is discarded")
    stored = [cache.in_memory() for cache in caches]
    check_hosts_are_consistent({"unfinished work in OUT": [cache.contents() for cache in stored]})
    return caches if first else stored


def run(args: argparse.Namespace) -> None:
    """Samples every request. Raises UserError before any weights are loaded if a request is wrong."""
    prompts = read_requests(args)
    pictures = read_pictures(args.pictures, args.stages, own_clip=args.input is not None)

    # Importing jax takes seconds, and reading weights longer: neither starts before all earlier checks have passed.
    from lavie_jax.parallel import check_hosts_are_consistent, keep_compiled_programs, local_devices, split_cpu

    keep_compiled_programs()
    import jax

    from lavie_jax import cascade
    from lavie_jax.cascade.personal import Personal, parse_embedding
    from lavie_jax.estimate import sampling_warnings
    from lavie_jax.weights import folder_hash, load_folder
    from lavie_jax.weights.lora import parse_lora

    split = not args.distributed and split_cpu()
    devices = local_devices()  # fails in one line, before weights are read
    first = jax.process_index() == 0  # the host that reads and writes OUT, and prints
    if args.distributed:
        devices = jax.devices()

    # ---- requested samples ----
    folders = cascade.stage_folders(args.weights, given_stage_weights(args), args.stages)
    available = [stage for stage in args.stages if stage in folders]
    weights = {stage: load_folder(folders[stage], stage=stage, params=False) for stage in available}
    if split:
        devices = cascade.without_copies(devices, weights.values())
    if args.unprompted and (readers := [name for name, one in weights.items() if one.unet.config.reads_text]):
        raise UserError(f"give a --prompt: {', '.join(readers)} of these weights reads it")
    personal = Personal.read(map(parse_lora, args.lora), map(parse_embedding, args.embedding))
    weights, notes = personal.apply(weights)
    frames, clip, clip_hash = read_input(args.input) if args.input else (None, None, None)
    settings = cascade.resolve_settings(weights, args.stages, args.given, clip, args.preset)
    taker = next((own for stage, own in settings.items() if STAGE_INFO[stage].takes_known), None)
    given = by_frame(pictures, taker.output_frames) if taker else {}
    known = {frame: picture.pixels for frame, picture in given.items()}
    cascade.check_known(settings, clip, known)
    texts_of = [cascade.stage_prompts(settings, prompt.text, prompt.at) for prompt in prompts]
    ignored = cascade.check_texts(weights, settings, texts_of, [prompt.negative for prompt in prompts], args.reading)
    hashes = {stage: folder_hash(folders[stage]) for stage in settings}
    part, parts = args.part
    outputs = plan_outputs(args, prompts, settings, hashes, clip_hash, given, personal.record())[part::parts]

    # ---- existing samples ----
    args.mirror.pull(output.stem for output in outputs)
    sheets = ContactSheets(args.out, "contact-sheet" if parts == 1 else f"contact-sheet-part-{part}")
    formats = [output.to_make(overwrite=args.overwrite) for output in outputs]
    todo = [output for output, missing in zip(outputs, formats) if missing]
    check_hosts_are_consistent({"samples": [output.request for output in outputs], "existing samples": formats})
    if len(todo) < len(outputs) and first:
        print(f"{len(outputs) - len(todo)} of {len(outputs)} samples exist in {args.mirror.url or args.out}")
        warn_of_existing(args)
    if not todo and (args.no_contact_sheet or not outputs or sheets.first.exists()):
        if first:
            args.mirror.push(leave_out=STATE)  # what an interrupted command did not upload
        return
    dtype = cascade.compute_dtype(args.dtype, devices, [weights[stage] for stage in settings])
    caches = [output.cache(dtype.name) for output in todo]
    for cache in caches if not args.overwrite else ():
        cache.check()
    names = {frame: str(picture.path) for frame, picture in given.items()}
    if first:
        warn(notes + cascade.padding_notes(weights, settings, clip))
        warn(cascade.fitting_notes(settings, clip, known, names))
        warn(sampling_warnings(weights, settings, devices[0].platform) + ignored if todo else [])

    # ---- sampling ----
    pipe = None
    if todo:
        loaded, _ = personal.apply({stage: load_folder(folders[stage], stage=stage) for stage in settings})
        pipe = cascade.Cascade(loaded, dtype=dtype, devices=devices, fsdp=args.fsdp)
    for cache in caches if args.overwrite and first else ():
        cache.prepare_overwrite()
    if args.distributed:
        caches = shared_caches(caches, first)
    requests = [cascade.Request.stored(output.request, known=known) for output in todo]
    made_with = {**given_files(args, {stage: folders[stage] for stage in settings}, pictures), **personal.files()}
    videos = iter(())
    if pipe is not None:
        made_with |= pipe.made_with()
        videos = pipe.videos(requests, settings, clip=frames, caches=caches, batch_size=args.batch_size, progress=first)
    clips = {} if frames is None else {"input": frames}
    if STAGE_INFO[args.stages[0]].takes_known:
        shown = cascade.given_frames(settings, frames, known)
        clips = {} if shown is None else {"given, white where generated": shown}
    if not first:
        for _ in videos:
            pass
        return
    for output, video in written(outputs, formats, videos, caches, made_with, args.unsafe):
        if not args.no_contact_sheet:
            add_to_sheet(sheets, output, video, args.stages, clips, dtype.name)
        args.mirror.push(leave_out=STATE)
    sheets.flush()
    args.mirror.push(leave_out=STATE)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        args = parse_args(argv)
        if not args.distributed:
            run(args)
            return 0
        from lavie_jax.parallel import initialise
        from lavie_jax.training.hosts import Hosts

        initialise(distributed=True)
        with Hosts().leave_together():
            run(args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
