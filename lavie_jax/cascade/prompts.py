"""Prompts over time: which prompt each stage gets for which of its frames.

A stage with segments divides the prompt at "|" (`Settings.prompts`). The stages before it get the first of the prompts,
and the stages after it, which show the same moments, the prompt of most of the frames in each of their windows.
Prompts at given frames (`Request.prompts_at`) change linearly instead, in stages without segments.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.stages.settings import Settings

Parts = Sequence[tuple[str, int]]  # (prompt, number of frames), in the order of the frames


def stage_prompts(
    settings: Mapping[str, Settings], prompt: str, prompts_at: Mapping[int, str] | None = None
) -> dict[str, Parts]:
    """Returns the prompts of each stage's output; without segments, `prompt` as it is, or all of `prompts_at`.

    The numbers of frames of the stages after the one with segments are those of the latter.

    Raises:
        UserError: `prompt` does not fit the number of segments, or `prompts_at` are given for a stage with segments.
    """
    if prompts_at is not None:
        texts = list(prompts_at.values())
        if divider := next((stage for stage, own in settings.items() if own.prompts(texts[0]) is not None), None):
            raise UserError(
                f"prompts-at cannot be given to {divider}, which makes segments: give it one prompt per segment, "
                "separated by |"
            )
        return {stage: [(text, 1) for text in texts] for stage in settings}
    divided = {stage: parts for stage, own in settings.items() if (parts := own.prompts(prompt)) is not None}
    (parts,) = divided.values() or ([(prompt, 1)],)
    first = next(iter(divided), None)
    stages = list(settings)
    before = stages[: stages.index(first)] if first is not None else []
    return {stage: parts[:1] if stage in before else parts for stage in stages}


def prompt_of(frames: range, count: int, parts: Parts) -> str:
    """Returns the prompt that most of these frames belong to, of a clip of `count` frames."""
    texts, lengths = zip(*parts)
    owners = np.repeat(np.arange(len(texts)), lengths)
    moments = np.asarray(frames) / max(count - 1, 1)  # from 0 to 1
    return texts[np.bincount(owners[np.rint(moments * (len(owners) - 1)).astype(int)]).argmax()]
