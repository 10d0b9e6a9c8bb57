"""Flags that several commands share: where the weights are, and the dtype of sampling."""

import argparse
from collections.abc import Callable

from lavie_jax.errors import user_location
from lavie_jax.stages.settings import AUTO, DTYPES, STAGE_INFO


def add_weights(add: Callable[..., object]) -> None:
    """Adds --weights, and --STAGE-weights for every stage; `add` is the `add_argument` of a parser or of a group."""
    folders = "/, ".join(STAGE_INFO)
    add(
        "--weights",
        type=user_location,
        metavar="DIR",
        help=f"weights folder of a stage, a folder of {folders}/, or hub:OWNER/NAME[@REVISION] on the Hugging Face hub "
        "(default: the shipped models)",
    )
    for stage in STAGE_INFO:
        text = f"weights folder of {stage}, or hub:OWNER/NAME/FOLDER, if not inside --weights"
        add(f"--{stage}-weights", type=user_location, metavar="DIR", help=text)


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
