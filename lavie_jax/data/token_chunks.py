"""Token ids of weighted and long prompts: chunks as long as the text encoder's window, with a weight for each token."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from lavie_jax.data.tokens import context_length, readable, token_ids, uses_mask, word_tokens

Unit = tuple[Sequence[int], float]  # ids that belong together, and their weight


class Chunk(NamedTuple):
    """Token ids of one window of the text encoder, with start, end and padding, which have weight 1.

    The mask is True for real tokens; None for CLIP, as in `tokens.tokenize_with_mask`.
    """

    ids: Int32[np.ndarray, " l"]
    weights: Float32[np.ndarray, " l"]
    mask: Bool[np.ndarray, " l"] | None


def tokenize_chunks(tokenizer, parts: Sequence[Sequence[tuple[str, float]]], *, several: bool) -> list[Chunk]:
    """Returns the chunks of a prompt, at least one.

    Args:
        tokenizer: CLIP's or T5's.
        parts: (text, weight) of the runs of a prompt, each of which is tokenized by itself. A part begins a chunk.
        several: whether words that exceed a chunk begin another one, in which all vectors of an embedding stay
            together. Otherwise they are ignored, as by `tokens.tokenize`.
    """
    room = context_length(tokenizer) - tokenizer.num_special_tokens_to_add()
    packed: list[list[tuple[int, float]]] = []
    for part in parts:
        packed.append([])
        for ids, weight in _units(tokenizer, part):
            if several and packed[-1] and len(packed[-1]) + len(ids) > room:
                packed.append([])
            packed[-1] += [(token, weight) for token in ids]
    if len(packed) > 1 and not packed[-1]:  # BREAK at the end, as in A1111
        packed.pop()
    chunks = [chunk[i : i + room] for chunk in packed for i in range(0, max(len(chunk), 1), room)]
    return [_framed(tokenizer, chunk) for chunk in (chunks if several else chunks[:1])]


def _units(tokenizer, part: Sequence[tuple[str, float]]) -> Iterator[Unit]:
    """Yields single tokens, and the tokens of an embedding together."""
    lengths = word_tokens(tokenizer)
    for text, weight in part:
        ids, i = token_ids(tokenizer, readable(tokenizer, text)), 0
        while i < len(ids):
            count = lengths.get(ids[i], 1)
            yield ids[i : i + count], weight
            i += count


def _framed(tokenizer, tokens: Sequence[tuple[int, float]]) -> Chunk:
    """Adds start, end and padding."""
    length, masked = context_length(tokenizer), uses_mask(tokenizer)
    ids = np.full(length, tokenizer.pad_token_id, np.int32)
    weights = np.ones(length, np.float32)
    start = [] if masked else [tokenizer.bos_token_id]  # T5 has no start token
    real = [*start, *(token for token, _ in tokens), tokenizer.eos_token_id]
    ids[: len(real)] = real
    weights[len(start) : len(start) + len(tokens)] = [weight for _, weight in tokens]
    return Chunk(ids, weights, np.arange(length) < len(real) if masked else None)
