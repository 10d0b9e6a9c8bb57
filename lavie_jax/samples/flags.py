"""Flags that several commands share: where the weights are, the dtype, and what is done with finished videos."""

import argparse
from collections.abc import Callable
from pathlib import Path

from lavie_jax.errors import UserError, user_location
from lavie_jax.samples.safety import SafetyFilter, check_open_nsfw, open_nsfw
from lavie_jax.samples.signing import Certificate
from lavie_jax.stages.settings import AUTO, DTYPES, STAGE_INFO


def add_weights(add: Callable[..., object]) -> None:
    """Adds --weights, and --STAGE-weights for every stage; `add` is the `add_argument` of a parser or of a group."""
    folders = "/, ".join(STAGE_INFO)
    add(
        "--weights",
        type=user_location,
        metavar="DIR",
        help=f"weights folder of a stage, a folder of {folders}/, or hub:OWNER/NAME[@REVISION] on the Hugging Face hub "
        "(default: the shipped models; film: those for clips of real film, docs/film.md)",
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
