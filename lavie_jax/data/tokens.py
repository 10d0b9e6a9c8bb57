"""Converts captions to token ids: Stable Diffusion's CLIP tokenizers, and the small one of Moving Shapes.

The small tokenizer is an ordinary CLIP tokenizer (byte-pair encoding with an end-of-word suffix, lower case) whose
merges make every word of Moving Shapes one token. Its `tokenizer_config.json` lists those words, so that unknown words
can be reported and removed before the text encoder.
"""

import collections
import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from lavie_jax.errors import UserError, user_path

_START, _END = "<|startoftext|>", "<|endoftext|>"
_CLIP_LENGTH = 77  # for tokenizer folders without a length
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is one token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(tokens) > 1 for tokens in spelled):
        pairs = collections.Counter(pair for t in spelled for pair in zip(t, t[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for tokens in spelled:
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == best:
                    tokens[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def save_small_tokenizer(folder: str | Path, words: Sequence[str], *, length: int = 16) -> Path:
    """Writes a CLIP tokenizer for `words` (lower-case letters only) that `load_tokenizer` reads.

    `length` is the context length, with start and end tokens. Returns the folder.
    """
    words = sorted(set(words))
    wrong = [word for word in words if not word or set(word) - set(_LETTERS)]
    if wrong:
        raise UserError(f"words of a small tokenizer may contain only the letters a to z; given {wrong}")
    merges = _merges(words)
    tokens = [*_LETTERS, *(c + "</w>" for c in _LETTERS), *map("".join, merges), _START, _END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
        "words": words,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merge_lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "vocab.json").write_text(json.dumps(vocab, indent=0) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + merge_lines)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def load_tokenizer(folder: str | Path):
    """Loads the CLIP tokenizer in a folder, by transformers.

    Raises:
        UserError: files are missing or cannot be read.
    """
    folder = user_path(folder)
    # Without these files, CLIPTokenizer silently has an empty vocabulary.
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise UserError(f"no CLIP tokenizer in {os.fspath(folder)!r}: no {' and no '.join(missing)}")
    # Not AutoTokenizer, which imports torch. Imported here, so that the pipeline's workers load neither.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # otherwise transformers warns that PyTorch is missing
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for malformed files
        raise UserError(f"cannot read the tokenizer in {os.fspath(folder)!r}: {error}") from error


def context_length(tokenizer) -> int:
    """Number of tokens of a text, with start and end; 77 for a tokenizer without a length."""
    length = tokenizer.model_max_length
    return length if length < 100_000 else _CLIP_LENGTH


def known_words(tokenizer) -> tuple[str, ...] | None:
    """Returns the words of a small tokenizer; None for a tokenizer without a list of words."""
    words = tokenizer.init_kwargs.get("words")
    return None if words is None else tuple(words)


def _split(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|[^\s\w]+|[\d_]+", text.lower())


def unknown_words(tokenizer, text: str) -> list[str]:
    """Words of `text` that are not in a small tokenizer's list, in order, without repetition or punctuation."""
    words = known_words(tokenizer)
    if words is None:
        return []
    return list(dict.fromkeys(w for w in _split(text) if w[0].isalnum() and w not in words))


def _readable(tokenizer, text: str) -> str:
    # The pieces of an unknown word would be tokens that were never trained, so the word is left out.
    words = known_words(tokenizer)
    return text if words is None else " ".join(word for word in _split(text) if word in words)


def tokenize(tokenizer, texts: Sequence[str]) -> Int32[np.ndarray, "n l"]:
    """Token ids, padded and truncated to the context length. A small tokenizer leaves unknown words out."""
    return tokenize_with_mask(tokenizer, texts)[0]


def uses_mask(tokenizer) -> bool:
    """Whether the tokenizer's text encoder has to ignore padding. CLIP was trained to attend to it."""
    return not type(tokenizer).__name__.startswith("CLIP")


def tokenize_with_mask(
    tokenizer, texts: Sequence[str]
) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, "n l"] | None]:
    """Returns the token ids of `tokenize`, and a mask that is True for real tokens; the mask is None for CLIP."""
    masked, length = uses_mask(tokenizer), context_length(tokenizer)
    if not texts:
        return np.zeros((0, length), np.int32), np.zeros((0, length), bool) if masked else None
    encoded = tokenizer(
        [_readable(tokenizer, text) for text in texts],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="np",
    )
    return np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.attention_mask, bool) if masked else None


def lost_text(tokenizer, text: str) -> str:
    """The end of `text` that exceeds the context length; "" if all of it fits."""
    text = _readable(tokenizer, text)
    kept = context_length(tokenizer) - 2  # without start and end
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return tokenizer.decode(ids[kept:]).strip()


class CachedTokens:
    """`tokenize_with_mask` with a cache, for training, where captions repeat."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._empty = tokenize_with_mask(tokenizer, [])
        self._one = functools.lru_cache(maxsize=1 << 16)(self._tokenize)

    def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray | None]:
        ids, mask = tokenize_with_mask(self._tokenizer, [text])
        return ids[0], None if mask is None else mask[0]

    def __call__(self, texts: Sequence[str]) -> tuple[Int32[np.ndarray, "n l"], Bool[np.ndarray, "n l"] | None]:
        if not texts:
            return self._empty
        ids, masks = zip(*(self._one(text) for text in texts))
        return np.stack(ids), None if masks[0] is None else np.stack(masks)
