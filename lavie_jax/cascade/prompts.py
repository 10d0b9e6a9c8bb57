"""Prompts over time: which prompt each stage gets for which of its frames.

A stage with segments divides the prompt at "|" (`Settings.prompts`). The stages before it get the first of the prompts,
and the stages after it, which show the same moments, the prompt of most of the frames in each of their windows.
Prompts at given frames (`Request.prompts_at`) change linearly instead, in stages without segments.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lavie_jax.data import tokens
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.samples.prompt_syntax import Reading, words_of
from lavie_jax.stages.settings import STAGE_INFO, Settings
from lavie_jax.weights import Weights

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


def check_texts(
    weights: Mapping[str, Weights],
    settings: Mapping[str, Settings],
    prompts: Iterable[Mapping[str, Parts]],
    negatives: Iterable[str | None],
    reading: Reading,
) -> list[str]:
    """Returns warnings about words, or negative prompts, that a stage ignores.

    Args:
        weights: {stage: weights folder}; parameters are not needed.
        settings: {stage: settings} of the stages to run.
        prompts: those of each sample (`stage_prompts`).
        negatives: negative prompts of the samples for the main stage; None is the one of its settings.
        reading: how prompts are read.

    Raises:
        UserError: a weighted prompt is malformed, or a text encoder cannot read prompts in chunks.
    """
    lines, prompts, negatives = [], list(prompts), list(negatives)
    for stage, own in settings.items():
        loaded = weights[stage]
        tokenizer = tokens.load_tokenizer(loaded.tokenizer_dir, loaded.new_words)
        if reading.chunked and tokens.uses_mask(tokenizer):
            raise UserError(
                f"long_prompts = {reading.long_prompts} is for CLIP; the text encoder of {stage}, "
                f"{registry.network_name(loaded.text_encoder.config)}, has no windows to chunk a prompt into: it reads "
                f"{tokens.context_length(tokenizer)} tokens at once"
            )
        texts = [
            reading.parse(text, own.prompt_suffix, closed=len(parts[stage]) > 1)
            for parts in prompts
            for text, _ in parts[stage]
        ]
        other, main = own.negative_prompt, STAGE_INFO[stage].main
        against = [other if one is None or not main else one for one in negatives]
        texts += map(reading.parse, against)
        default = loaded.sampling.get("negative_prompt", "")
        if own.guidance == 1 and any(text not in ("", default) for text in against):
            lines.append(f"stage {stage} ignores the negative prompt, which only guidance reads: its scale is 1")
        if loaded.unet.config.reads_text:
            lines += tokens.text_warnings(tokenizer, map(words_of, texts), cut=not reading.chunked)
    return lines
