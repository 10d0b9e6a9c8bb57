"""Pictures from the command line that are frames of the video. This module does not import jax."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lavie_jax.disk import file_hash
from lavie_jax.errors import UserError
from lavie_jax.stages.settings import STAGE_INFO

PICTURES = ("first", "last")  # the frames that can be given, as --first-frame and --last-frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as it is shown, of any size, and the SHA-256 of its file."""

    path: Path
    pixels: UInt8[np.ndarray, "h w 3"]
    sha256: str


def read_pictures(paths: Mapping[str, Path], stages: Sequence[str], *, own_clip: bool) -> dict[str, Picture]:
    """Reads pictures, {one of `PICTURES`: file}.

    Raises:
        UserError: a picture cannot be read, no stage takes one, or the video begins with something else.
    """
    from lavie_jax.data.sources import read_picture  # imports the readers of all kinds of data

    takers = [stage for stage, info in STAGE_INFO.items() if info.takes_known]
    pictures = {}
    for name, path in paths.items():
        if not set(takers) & set(stages):
            raise UserError(f"{name}-frame: {','.join(stages)} cannot start from pictures; use --stages {takers[0]}")
        if name == "first" and own_clip:
            raise UserError("first-frame: the first frames are the last ones of the input clip; give one of the two")
        if name == "first" and stages[0] not in takers:
            raise UserError(f"first-frame: it is the first frame of {stages[0]}; begin with --stages {takers[0]}")
        try:
            pictures[name] = Picture(path=path, pixels=read_picture(path), sha256=file_hash(path))
        except UserError as error:
            raise UserError(f"{name}-frame: {error}") from None
    return pictures


def by_frame(pictures: Mapping[str, Picture], count: int) -> dict[int, Picture]:
    """Returns the pictures by the index of their frame in a video of `count` frames."""
    frames = {name: 0 if name == "first" else count - 1 for name in pictures}
    if len(set(frames.values())) < len(frames):
        raise UserError("first-frame and last-frame are the same frame of a video of one frame; give one of them")
    return {frames[name]: picture for name, picture in pictures.items()}
