"""Flags of commands that make videos, and what was given with them; some are shared by several commands."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError, user_location
from lavie_jax.samples.prompt_syntax import CUT, LONG_PROMPTS, PLAIN, SYNTAXES
from lavie_jax.samples.prompts import check_unicode
from lavie_jax.samples.safety import SafetyFilter, check_open_nsfw, open_nsfw
from lavie_jax.samples.signing import Certificate
from lavie_jax.stages.settings import AUTO, DTYPES, STAGE_INFO


def add_prompts(add: Callable[..., object]) -> None:
    """Adds the flags of prompts and how they are read; `add` is the `add_argument` of a parser or of a group."""
    add("--prompt", action="append", default=[], metavar="TEXT", help="text prompt; may be repeated")
    add(
        "--prompts-at",
        action="append",
        default=[],
        metavar="TEXT",
        help='prompts over time instead of one, such as "0: a red circle | 32: a blue circle": the text changes '
        "linearly between these frames of the first stage's clip; may be repeated",
    )
    add(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="txt (one prompt per line), csv, tsv or jsonl (prompt or prompts_at, and optionally seed and "
        "negative_prompt)",
    )
    add(
        "--prompt-syntax",
        default=PLAIN,
        choices=SYNTAXES,
        help="weighted gives (word:1.3), ((word)) and [word] more or less weight, in negative prompts too "
        "(docs/prompts.md); plain takes brackets as text (default: plain)",
    )
    add(
        "--long-prompts",
        default=CUT,
        choices=LONG_PROMPTS,
        help="of prompts longer than CLIP's window, cut ignores the rest, chunk reads it in more windows (default cut)",
    )


def add_personal(add: Callable[..., object]) -> None:
    """Adds --lora and --embedding; `add` is the `add_argument` of a parser or of a group."""
    add(
        "--lora",
        action="append",
        default=[],
        type=user_location,
        metavar="FILE[:SCALE]",
        help="LoRA of Stable Diffusion 1.x (kohya, LyCORIS, diffusers or PEFT), or its folder, merged into every stage "
        "but vsr; may be repeated (default scale 1)",
    )
    add(
        "--embedding",
        action="append",
        default=[],
        type=user_location,
        metavar="FILE[:TOKEN]",
        help="textual inversion of Stable Diffusion 1.x, and the word for it in prompts; may be repeated (default: the "
        "file's own word)",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every setting of every stage, in groups."""
    for stage, info in STAGE_INFO.items():
        group = parser.add_argument_group(f"settings of {stage}")
        for name, flag, kind, metavar, text in info.flags():
            value = dict(action="store_const", const=True) if kind is bool else dict(type=kind, metavar=metavar)
            group.add_argument(flag, dest=setting_argument(stage, name), help=text, **value)


def add_weights(add: Callable[..., object]) -> None:
    """Adds --weights, and --STAGE-weights for every stage; `add` is the `add_argument` of a parser or of a group."""
    folders = "/, ".join(STAGE_INFO)
    add(
        "--weights",
        type=user_location,
        metavar="DIR",
        help=f"weights folder of a stage, a folder of {folders}/, or hub:OWNER/NAME[@REVISION] on the Hugging Face hub "
        "(default: the shipped models; film: for clips of real film, docs/film.md; base-distilled: half the work of "
        "base, docs/speed.md)",
    )
    for stage in STAGE_INFO:
        text = f"weights folder of {stage}, or hub:OWNER/NAME/FOLDER, if not inside --weights"
        add(f"--{stage}-weights", type=user_location, metavar="DIR", help=text)


def add_finishing(add: Callable[..., object]) -> None:
    """Adds the flags of signing and of the safety filter; `add` is the `add_argument` of a parser or of a group."""
    add("--c2pa-certificate", type=Path, metavar="FILE", help="sign the files (docs/provenance.md) with this PEM chain")
    add("--c2pa-key", type=Path, metavar="FILE", help="private key of --c2pa-certificate, PEM")
    add("--c2pa-algorithm", default="es256", metavar="NAME", help="algorithm of that key (default: es256)")
    add(
        "--safety-filter",
        action="store_true",
        help="replace videos that the classifier open_nsfw finds pornographic by black frames (docs/provenance.md)",
    )


def given_certificate(args: argparse.Namespace) -> Certificate | None:
    """Returns what files are signed with. Raises UserError if it cannot be used."""
    if (args.c2pa_certificate is None) != (args.c2pa_key is None):
        raise UserError("c2pa-certificate: give it together with --c2pa-key FILE, the private key")
    if args.c2pa_certificate is None:
        return None
    return Certificate.read(args.c2pa_certificate, args.c2pa_key, args.c2pa_algorithm)


def given_filter(args: argparse.Namespace) -> SafetyFilter | None:
    """Returns the filter of finished videos. Raises UserError if its package is missing."""
    if not args.safety_filter:
        return None
    check_open_nsfw()
    return open_nsfw


def add_dtype(add: Callable[..., object]) -> None:
    """Adds --dtype; `add` is the `add_argument` of a parser or of a group."""
    add(
        "--dtype",
        default=AUTO,
        choices=DTYPES,
        help="of weights and computation: auto is bfloat16 on accelerators, and on CPUs with AMX or AVX512-BF16 for "
        "models of full size, else float32 (default: auto)",
    )


def given_stage_weights(args: argparse.Namespace) -> dict[str, str]:
    """Returns {stage: folder} of the flags that were given."""
    return {stage: folder for stage in STAGE_INFO if (folder := getattr(args, f"{stage}_weights")) is not None}


def setting_argument(stage: str, name: str) -> str:
    """The attribute of the parsed command line that holds a stage's setting."""
    return f"setting {stage} {name}"


def given_settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns {stage: settings from the command line}, checked as far as is possible without the weights."""
    given = {}
    for stage, info in STAGE_INFO.items():
        names = [name for name, *_ in info.flags()]
        values = {name: getattr(args, setting_argument(stage, name)) for name in names}
        given[stage] = values = {name: value for name, value in values.items() if value is not None}
        if values and stage not in args.stages:
            hint = f"; settings of other stages start with their name: --{args.stages[-1]}-steps" if info.main else ""
            name, chosen = next(iter(values)), ",".join(args.stages)
            raise UserError(f"{name} is given for {stage}, which is not among the stages {chosen}{hint}")
        for name, value in values.items():
            if isinstance(value, str):
                check_unicode(value, name.replace("_", "-"))
        try:
            info.settings.check(values)
        except UserError as error:
            raise info.located(error) from None
    return given
