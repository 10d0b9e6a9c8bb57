"""Frames that a user gives: pictures, and the end of a clip that is continued. Their checks, notes and overview."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from lavie_jax.errors import UserError
from lavie_jax.samples.sheets import EMPTY
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo, fitting_note
from lavie_jax.stages.settings import STAGE_INFO, Settings
from lavie_jax.stages.stage import Known


def check_known(settings: Mapping[str, Settings], clip: ClipInfo | None, known: Known) -> None:
    """Raises UserError for pictures (`Request.known`) that cannot be frames of the output.

    `settings` are those of the stages to run, `clip` is the user's.
    """
    if not isinstance(known, Mapping):
        raise UserError(
            f"known must be pictures by the index of their frame, {{0: picture}}, not a {type(known).__name__}"
        )
    takers = [stage for stage in settings if STAGE_INFO[stage].takes_known]
    if known and not takers:
        able = ", ".join(stage for stage, info in STAGE_INFO.items() if info.takes_known)
        raise UserError(f"frames are given, which {','.join(settings)} cannot take: put {able} among the stages")
    for index, picture in known.items():
        if not isinstance(index, int | np.integer) or isinstance(index, bool):
            raise UserError(f"known frames are given by their index, a whole number, not {index!r}")
        if getattr(picture, "dtype", None) != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise UserError(f"known frame {index} must be an array of uint8 (H, W, 3)")
        if not picture.size:
            raise UserError(f"known frame {index} is empty: {picture.shape}")
    for stage in takers:
        STAGES[stage].check_known(settings[stage], clip, known)


def fitting_notes(
    settings: Mapping[str, Settings], clip: ClipInfo | None, known: Known, names: Mapping[int, str] | None = None
) -> list[str]:
    """Returns warnings about given frames that are cropped or scaled to the size of the output.

    `names` are those of the pictures, by their frame.
    """
    lines = []
    for stage, own in settings.items():
        if STAGE_INFO[stage].fits_clip:
            sizes = {(names or {}).get(i, f"known frame {i}"): picture.shape[:2] for i, picture in known.items()}
            if clip is not None:
                sizes["the clip"] = clip.height, clip.width
            lines += [fitting_note(what, size, own.height, own.width) for what, size in sizes.items()]
    return [line for line in lines if line]


def given_frames(
    settings: Mapping[str, Settings], clip: UInt8[np.ndarray, "_t _h _w 3"] | None, known: Known
) -> UInt8[np.ndarray, "t H W 3"] | None:
    """Returns the given frames of an output, white elsewhere, for contact sheets.

    None if there are none, or if the output has several segments.
    """
    for stage, own in settings.items():
        segments = STAGES[stage].segments(own)
        if STAGE_INFO[stage].takes_known and len(segments) == 1 and not segments[0].repeated:
            given = STAGES[stage].segment_input(own, segments[0], clip, known).known
            frames = np.full((own.output_frames, own.height, own.width, 3), EMPTY, np.uint8)
            for index, frame in given.items():
                frames[index] = frame
            return frames if given else None
    return None
