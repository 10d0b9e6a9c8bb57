"""Videos from prompts, through one to three stages.

    python sample.py --prompt "a red circle moving left"
    python sample.py --prompt "a red circle moving left" --stages base,interpolation,vsr --weights weights
    python sample.py --prompt "a red circle moving left" --stages vsr --input clip.mp4 --weights weights/vsr
    python sample.py --prompt-file prompts.txt --num-videos 4 --weights weights/base --out samples

Each sample becomes OUT/{index:04d}-{slug}-{seed}.mp4, index being the prompt's, with a JSON beside it that
says how to make it again; OUT/contact-sheet.png shows those of the last command. Of several stages, and of a clip
of yours, every stage's frames are in OUT/stages, exact (.npy), and a row each on the contact sheet, at the same
moments. What is there already is skipped: a run that was stopped goes on at the prompt, the stage and the denoising
step where it was. `--part I/N` makes a part of the samples, for several machines with the same command and OUT.
What is not given is as in the weights' config.json.
Compiled programs are kept in ~/.cache/lavie_jax; JAX_COMPILATION_CACHE_DIR names another place.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

from tqdm import tqdm

from lavie_jax.errors import Parser, UserError, check_folder
from lavie_jax.samples.outputs import (
    Output,
    check_formats,
    make_request,
    of_stage,
    parse_formats,
)
from lavie_jax.samples.prompts import Prompt, check_seed, check_unicode, read_prompts
from lavie_jax.samples.settings import STAGES, Settings, Source, check_values, parse_stages
from lavie_jax.samples.sheets import ContactSheets

# What may be set of each stage, in the words of its settings: (name, type, metavar, help).
COMMON = (
    ("sampler", str, "NAME", "ddpm, ddim, euler, respaced_ddim or dpm++2m"),
    ("steps", int, "N", "denoising steps"),
    ("guidance", float, "X", "classifier-free guidance; 1 is without"),
    ("guidance_rescale", float, "X", "0 to 1: takes back the contrast that a large guidance adds; 0 is without"),
    ("fps", float, "X", "frames a second, written into the files"),
    ("negative_prompt", str, "TEXT", "what to stay away from"),
    ("prompt_suffix", str, "TEXT", "added to every prompt"),
)
FLAGS = {
    "base": (
        *COMMON,
        ("frames", int, "T", "1 makes images"),
        ("height", int, "H", "pixels"),
        ("width", int, "W", "pixels"),
    ),
    "interpolation": (
        *COMMON,
        ("key_latents", str, "NAME", "what the model sees of key frames: a draw of the VAE's posterior, or its mean"),
    ),
    "vsr": (
        *COMMON,
        ("noise_level", int, "N", "noise on the low-resolution frames, 0 to 350"),
        ("windows", str, "NAME", "blended (default), or official: LaVie's chunks, with a cut after each"),
        ("window_frames", int, "T", "frames of a window (default 8)"),
        ("overlap_frames", int, "T", "frames that blended windows share (default 2)"),
        ("tile", int, "P", "side of spatial windows in low-resolution pixels; 0 is whole frames (default: by size)"),
    ),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; UserError for what is wrong with it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to show; may be repeated")
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="txt (one prompt a line), csv or jsonl (prompt, and if wanted seed and negative_prompt)",
    )
    add(
        "--stages",
        default="base",
        metavar="LIST",
        help="base (default), base,interpolation, base,vsr, base,interpolation,vsr; without base: of --input",
    )
    add("--input", type=Path, metavar="FILE", help="a clip of yours, instead of the base stage's: a video, or an npz")
    add("--seed", default="0", metavar="S", help="of the first video of each prompt (default 0)")
    add("--num-videos", type=int, default=1, metavar="N", help="of each prompt, with seeds S to S+N-1 (default 1)")
    add(
        "--format",
        metavar="LIST",
        help="any of mp4,gif,png,npz (default mp4, for images and odd sides png); png, a "
        "folder of frames, and npz, an array, are exact",
    )
    add("--no-contact-sheet", action="store_true", help="leave out contact-sheet.png")
    add(
        "--part",
        default="0/1",
        metavar="I/N",
        help="make only every N-th sample, from number I on: hosts 0 to N-1 of "
        "a slice with the same command and OUT make all of them (default 0/1)",
    )
    add("--fsdp", type=int, default=1, metavar="N", help="split the weights over N of this host's devices (default 1)")
    add("--batch-size", type=int, metavar="N", help="videos that base denoises together (default one a device)")
    add(
        "--weights",
        type=Path,
        metavar="DIR",
        help="one stage's weights folder, or one with base/, interpolation/, vsr/ in it (default: shipped)",
    )
    for stage in STAGES:
        add(f"--{stage}-weights", type=Path, metavar="DIR", help=f"weights folder of {stage}, if elsewhere")
    add("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    add("--overwrite", action="store_true", help="make again what is there, and replace it")
    for stage, flags in FLAGS.items():
        group = parser.add_argument_group(f"settings of {stage}")
        for name, kind, metavar, text in flags:
            prefix = "" if stage == "base" else f"{stage}-"
            group.add_argument(f"--{prefix}{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
        if stage == "interpolation":
            group.add_argument("--keep-key-frames", action="store_const", const=True,
                               help="leave the key frames' pixels as they are")  # fmt: skip
    return parser.parse_args(argv)


def given_settings(args: argparse.Namespace) -> dict[str, dict]:
    """{stage: what the command line says of its settings}, checked as far as they can be without the weights."""
    given = {stage: {name: getattr(args, name if stage == "base" else f"{stage}_{name}") for name, *_ in flags}
             for stage, flags in FLAGS.items()}  # fmt: skip
    given["interpolation"]["keep_key_frames"] = args.keep_key_frames
    for stage, values in given.items():
        for name, value in values.items():
            if value is not None and stage not in args.stages:
                raise UserError(
                    f"{name} is given for {stage}, which is not among the stages {','.join(args.stages)}"
                    + ("; another stage's have its name before them: --vsr-steps" * (stage == "base"))
                )
            if isinstance(value, str):
                check_unicode(value, name.replace("_", "-"))
        try:
            check_values(values)
        except UserError as error:
            raise error if stage == "base" else UserError(f"{stage} stage: {error}") from None
    return given


def parse_part(text: str) -> tuple[int, int]:
    """`"1/4"` as (1, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"part: I/N with I from 0 to N-1 is needed, such as 0/4 to 3/4, given {text!r}")
    return int(found[1]), int(found[2])


def read_requests(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line, then those of the file; everything else about the arguments is checked, too."""
    for name in ("num_videos", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')}: at least 1 is needed, given {value}")
    args.stages = parse_stages(args.stages, own_clip=args.input is not None)
    args.given = given_settings(args)
    check_folder(args.out, f"--out {args.out}")
    args.format = args.format and parse_formats(args.format)
    args.seed = check_seed(args.seed, "seed")
    args.part = parse_part(args.part)
    if any(not text.strip() for text in args.prompt):
        raise UserError("prompt: an empty one was given")
    for text in args.prompt:
        check_unicode(text, "prompt")
    prompts = [Prompt(text=text.strip()) for text in args.prompt]
    prompts += read_prompts(args.prompt_file) if args.prompt_file else []
    if not prompts:
        raise UserError('give a --prompt, e.g. --prompt "a red circle moving left", or a --prompt-file')
    for prompt in prompts:
        check_seed((args.seed if prompt.seed is None else prompt.seed) + args.num_videos - 1, "last seed")
        if prompt.negative is not None and "base" not in args.stages:
            raise UserError(
                f"prompt file: negative_prompt is for base, which is not among the stages; "
                f"use --{args.stages[0]}-negative-prompt"
            )
    return prompts


def read_input(path: Path) -> tuple:
    """(frames, what they are, the file's hash) of the user's clip."""
    from lavie_jax.cascade.pixels import free_memory
    from lavie_jax.data.video_files import read_clip

    frames, fps = read_clip(path, max_bytes=free_memory() / 2)
    source = Source(frames=len(frames), height=frames.shape[1], width=frames.shape[2], fps=fps, own=True)
    with path.open("rb") as file:
        return frames, source, hashlib.file_digest(file, "sha256").hexdigest()


def plan(
    args: argparse.Namespace,
    prompts: list[Prompt],
    settings: dict[str, Settings],
    hashes: dict[str, str],
    clip_hash: str | None,
) -> list[Output]:
    """One output for each prompt and seed."""
    last = settings[args.stages[-1]]
    odd = last.height % 2 or last.width % 2
    formats = args.format or (("png",) if last.frames == 1 or odd else ("mp4",))
    check_formats(formats, frames=last.frames, height=last.height, width=last.width)
    outputs = []
    for index, prompt in enumerate(prompts):
        first = args.seed if prompt.seed is None else prompt.seed
        for seed in range(first, first + args.num_videos):
            request = make_request(
                prompt.text, seed, settings, hashes, negative_prompt=prompt.negative, clip_hash=clip_hash
            )
            outputs.append(Output(folder=args.out, index=index, formats=formats, request=request))
    return outputs


def add_to_sheet(
    sheets: ContactSheets, output: Output, video, stages: tuple[str, ...], clips: dict, dtype: str
) -> None:
    """A row each for what the sample started from (`clips`) and for its stages; `video` None is read from its files."""
    shelf = output.shelf(dtype)
    before = {stage: made for stage in stages[:-1] if (made := shelf.get(stage)) is not None}
    try:
        video = output.read() if video is None else video
    except UserError as error:  # of an older run, damaged since: no reason to lose this one
        warn([str(error)])
    else:
        sheets.add({**clips, **before, stages[-1]: video}, output.request["prompt"])


def warn(lines: list[str]) -> None:
    """One line each, on stderr."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Samples every request; UserError before anything is loaded where a request is wrong."""
    prompts = read_requests(args)

    # Only a request that may be right pays for importing jax, and only one that is right for reading weights.
    from lavie_jax.parallel import keep_compiled_programs

    keep_compiled_programs()
    import jax

    from lavie_jax import cascade
    from lavie_jax.data.tokens import load_tokenizer
    from lavie_jax.weights import folder_hash, load_folder

    named = {stage: folder for stage in STAGES if (folder := getattr(args, f"{stage}_weights")) is not None}
    folders = cascade.stage_folders(args.weights, named, args.stages)
    weights = {stage: load_folder(folders[stage], stage=stage, params=False) for stage in args.stages
               if stage in folders}  # fmt: skip
    frames, source, clip_hash = read_input(args.input) if args.input else (None, None, None)
    settings = cascade.plan(weights, args.stages, args.given, source)
    outputs = plan(args, prompts, settings, {stage: folder_hash(folders[stage]) for stage in settings}, clip_hash)
    part, parts = args.part
    outputs = outputs[part::parts]
    sheets = ContactSheets(args.out, "contact-sheet" if parts == 1 else f"contact-sheet-part-{part}")
    formats = [output.to_make(overwrite=args.overwrite) for output in outputs]
    todo = [output for output, missing in zip(outputs, formats) if missing]
    if len(todo) < len(outputs):
        print(f"{len(outputs) - len(todo)} of {len(outputs)} samples are in {args.out} already")
    if not todo and (args.no_contact_sheet or not outputs or sheets.first.exists()):
        return
    dtype = jax.numpy.dtype(cascade.default_dtype(jax.local_devices()))
    shelves = [output.shelf(dtype.name) for output in todo]
    for shelf in shelves if not args.overwrite else ():
        shelf.check()
    warn(cascade.notes(weights, settings, source))
    for stage in settings:
        asked = [(output.request["prompt"], of_stage(output.request, stage)) for output in todo]
        texts = [text for prompt, made in asked for text in (prompt + made["prompt_suffix"], made["negative_prompt"])]
        warn(cascade.text_warnings(load_tokenizer(weights[stage].tokenizer_dir), texts))

    pipe = cascade.load(stages=args.stages, folders=folders, dtype=dtype, fsdp=args.fsdp) if todo else None
    for shelf in shelves if args.overwrite else ():
        shelf.renew()
    requests = [
        cascade.Request(
            prompt=output.request["prompt"], seed=output.request["seed"],
            negative_prompt=output.request.get("negative_prompt"),
        )
        for output in todo
    ]  # fmt: skip
    where = {"weights" if stage == "base" else f"{stage}_weights": str(folders[stage]) for stage in settings}
    made_with, videos = {**where, **({"input": str(args.input)} if args.input else {})}, iter(())
    if pipe is not None:
        made_with |= pipe.made_with()
        videos = pipe.videos(
            requests, settings, clip=frames, shelves=shelves, batch_size=args.batch_size, progress=True
        )
    shelves = iter(shelves)
    for output, missing in zip(outputs, formats):
        video = next(videos) if missing else None
        for path in output.write(video, missing, made_with) if missing else ():
            tqdm.write(str(path))
        if missing:
            next(shelves).clear()
        if not args.no_contact_sheet:
            add_to_sheet(sheets, output, video, args.stages, {} if frames is None else {"input": frames}, dtype.name)
    sheets.flush()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        run(parse_args(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
