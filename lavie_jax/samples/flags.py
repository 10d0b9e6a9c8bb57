"""Flags that `sample.py` and the page share: where the weights are."""

import argparse
from collections.abc import Callable

from lavie_jax.errors import user_location
from lavie_jax.stages.settings import STAGE_INFO


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


def given_stage_weights(args: argparse.Namespace) -> dict[str, str]:
    """Returns {stage: folder} of the flags that were given."""
    return {stage: folder for stage in STAGE_INFO if (folder := getattr(args, f"{stage}_weights")) is not None}
