"""Videos from prompts.

    python sample.py --prompt "a red circle moving left"
    python sample.py --prompt-file prompts.txt --num-videos 4 --weights weights/base --out samples

Each sample becomes OUT/{index:04d}-{slug}-{seed}.mp4, index being the prompt's, with a JSON beside it that
says how to make it again; OUT/contact-sheet.png shows them all. What is there already is skipped: a run that
was stopped goes on where it was. What is not given is as in the weights' config.json. Compiled programs are
kept in ~/.cache/lavie_jax; JAX_COMPILATION_CACHE_DIR names another place.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from lavie_jax.errors import UserError
from lavie_jax.samples.outputs import ContactSheets, Output, check_folder, check_formats, parse_formats
from lavie_jax.samples.prompts import Prompt, check_seed, check_unicode, read_prompts
from lavie_jax.samples.settings import Settings, check_values

SETTINGS = ("sampler", "steps", "guidance", "frames", "height", "width", "fps", "negative_prompt")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to show; may be repeated")
    add("--prompt-file", type=Path, metavar="FILE",
        help="txt (one prompt a line), csv or jsonl (prompt, and if wanted seed and negative_prompt)")
    add("--negative-prompt", metavar="TEXT", help="what to stay away from")
    add("--seed", default="0", metavar="S", help="of the first video of each prompt (default 0)")
    add("--num-videos", type=int, default=1, metavar="N", help="of each prompt, with seeds S to S+N-1 (default 1)")
    add("--sampler", metavar="NAME", help="ddpm, ddim, euler, respaced_ddim or dpm++2m")
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance; 1 is without")
    add("--frames", type=int, metavar="T", help="1 makes images")
    add("--height", type=int, metavar="H", help="pixels")
    add("--width", type=int, metavar="W", help="pixels")
    add("--fps", type=float, metavar="X", help="frames a second, written into the files")
    add("--format", metavar="LIST", help="any of mp4,gif,png,npz (default mp4, for images png); png, a folder "
        "of frames, and npz, an array, are exact")
    add("--no-contact-sheet", action="store_true", help="leave out contact-sheet.png")
    add("--batch-size", type=int, metavar="N", help="videos denoised together (default one a device)")
    add("--weights", type=Path, metavar="DIR", help="weights folder, or one with base/ in it (default: shipped)")
    add("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    add("--overwrite", action="store_true", help="make again what is there, and replace it")
    return parser.parse_args(argv)


def read_requests(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line, then those of the file; everything else about the arguments is checked, too."""
    for name in ("num_videos", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')}: at least 1 is needed, given {value}")
    check_values({name: getattr(args, name) for name in SETTINGS})
    check_folder(args.out)
    args.format = args.format and parse_formats(args.format)
    args.seed = check_seed(args.seed, "seed")
    if any(not text.strip() for text in args.prompt):
        raise UserError("prompt: an empty one was given")
    for text in (*args.prompt, args.negative_prompt or ""):
        check_unicode(text, "prompt")
    prompts = [Prompt(text=text.strip()) for text in args.prompt]
    prompts += read_prompts(args.prompt_file) if args.prompt_file else []
    if not prompts:
        raise UserError('give a --prompt, e.g. --prompt "a red circle moving left", or a --prompt-file')
    for prompt in prompts:
        check_seed((args.seed if prompt.seed is None else prompt.seed) + args.num_videos - 1, "last seed")
    return prompts


def keep_compiled_programs() -> None:
    """Turn on jax's persistent compilation cache, unless the environment says where it is or that it is off."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "lavie_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def plan(args: argparse.Namespace, prompts: list[Prompt], settings: Settings, weights_hash: str) -> list[Output]:
    """One output for each prompt and seed."""
    formats = args.format or (("png",) if settings.frames == 1 else ("mp4",))
    check_formats(formats, frames=settings.frames, height=settings.height, width=settings.width)
    outputs = []
    for index, prompt in enumerate(prompts):
        first = args.seed if prompt.seed is None else prompt.seed
        for seed in range(first, first + args.num_videos):
            request = {
                "prompt": prompt.text,
                "seed": seed,
                "stages": ["base"],
                **settings.to_dict(),
                "weights_sha256": weights_hash,
            }
            if prompt.negative is not None:
                request["negative_prompt"] = prompt.negative
            outputs.append(Output(folder=args.out, index=index, formats=formats, request=request))
    return outputs


def run(args: argparse.Namespace) -> None:
    prompts = read_requests(args)

    # Only a request that may be right pays for importing jax, and only one that is right for reading weights.
    keep_compiled_programs()
    from lavie_jax import cascade
    from lavie_jax.data.tokens import load_tokenizer
    from lavie_jax.weights import folder_hash, load_folder

    folder = cascade.base_folder(args.weights or cascade.SHIPPED)
    weights = load_folder(folder, stage="base", params=False)
    settings = Settings.make(weights.sampling, {name: getattr(args, name) for name in SETTINGS})
    cascade.sampler_for(weights, settings)
    outputs = plan(args, prompts, settings, folder_hash(folder))
    formats = [output.to_make(overwrite=args.overwrite) for output in outputs]
    todo = [output.request for output, missing in zip(outputs, formats) if missing]
    if len(todo) < len(outputs):
        print(f"{len(outputs) - len(todo)} of {len(outputs)} samples are in {args.out} already")
    if not todo:
        return
    texts = [text for r in todo for text in (r["prompt"] + settings.prompt_suffix, r["negative_prompt"])]
    for line in cascade.text_warnings(load_tokenizer(weights.tokenizer_dir), texts):
        print(f"warning: {line}", file=sys.stderr)

    pipe = cascade.load(folder)
    requests = [
        cascade.Request(prompt=r["prompt"], seed=r["seed"], negative_prompt=r["negative_prompt"]) for r in todo
    ]
    made_with = {"weights": str(folder), **pipe.made_with()}
    videos = pipe.samples(requests, settings, batch_size=args.batch_size, progress=True)
    sheets = ContactSheets(args.out)
    for output, missing in zip(outputs, formats):
        video = next(videos) if missing else None
        for path in output.write(video, missing, made_with) if missing else ():
            tqdm.write(str(path))
        if not args.no_contact_sheet:
            sheets.add(output.read() if video is None else video, output.request["prompt"])
    sheets.flush()


def main(argv: list[str] | None = None) -> int:
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
