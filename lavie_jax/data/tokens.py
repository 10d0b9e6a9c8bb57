"""Converts captions to token ids: Stable Diffusion's CLIP tokenizers, T5's, and small ones of Moving Shapes.

The small CLIP tokenizer is an ordinary one (byte-pair encoding with an end-of-word suffix, lower case) whose merges
make every word of Moving Shapes one token; the small T5 tokenizer has a token for each word. `tokenizer_config.json`
lists those words, so that unknown words can be reported and removed before the text encoder.
"""

import collections
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from lavie_jax.errors import UserError, user_path
from lavie_jax.text_files import read_json
from lavie_jax.tokenizer_kinds import PIECES_FILE, is_t5, read_pieces

_START, _END = "<|startoftext|>", "<|endoftext|>"
_NEW_WORDS = "new_words"  # in the tokenizer's init_kwargs: {word: number of tokens}, see `load_tokenizer`
_CLIP_LENGTH = 77  # for tokenizer folders without a length
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class CLIPWords:
    """A tokenizer of `save_small_tokenizer`, with a token for each word, without transformers.

    Importing transformers takes longer than importing jax. The ids are the same.

    Attributes have the names of transformers:
        init_kwargs: the content of tokenizer_config.json.
        model_max_length: the context length, with start and end tokens.
        bos_token_id, eos_token_id, pad_token_id: ids of the start, the end and the padding.
    """

    def __init__(self, vocabulary: Mapping[str, int], config: Mapping[str, Any]):
        """Takes the contents of vocab.json and tokenizer_config.json. Raises KeyError if a token is missing."""
        if (config["bos_token"], config["eos_token"], config["pad_token"]) != (_START, _END, _END):
            raise KeyError("not a tokenizer of save_small_tokenizer")
        self.init_kwargs, self.model_max_length, self._size = config, config["model_max_length"], len(vocabulary)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (vocabulary[t] for t in (_START, _END, _END))
        self._ids = {word: vocabulary[f"{word}</w>"] for word in config["words"]}
        self._words = {number: word for word, number in self._ids.items()}

    def __len__(self) -> int:
        return self._size

    def num_special_tokens_to_add(self) -> int:
        """Returns the number of start and end tokens of a text."""
        return 2

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text of known words."""
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids of `encode`."""
        return " ".join(self._words[number] for number in ids)

    def framed(self, text: str) -> list[int]:
        """Returns the ids between those of start and end, truncated and padded to the context."""
        ids = self.encode(text)[: self.model_max_length - 2]
        return [self.bos_token_id, *ids] + [self.eos_token_id] * (self.model_max_length - 1 - len(ids))


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
    words = _checked_words(words)
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


def save_small_t5_tokenizer(folder: str | Path, words: Sequence[str], *, length: int = 16) -> Path:
    """Writes a tokenizer with a token for each of `words` and T5's special tokens that `load_tokenizer` reads.

    `length` is the context length, with the end token. Returns the folder.
    """
    words = _checked_words(words)
    special = ("<pad>", "</s>", "<unk>")  # T5's ids
    vocab = {token: i for i, token in enumerate((*special, *words))}
    end = {"id": "</s>", "ids": [vocab["</s>"]], "tokens": ["</s>"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": vocab[t], "content": t, **flags, "special": True} for t in special],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}, single[1]],
            "special_tokens": {"</s>": end},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": length,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "words": words,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(whole, indent=0) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _checked_words(words: Sequence[str]) -> list[str]:
    words = sorted(set(words))
    wrong = [word for word in words if not word or set(word) - set(_LETTERS)]
    if wrong:
        raise UserError(f"words of a small tokenizer may contain only the letters a to z; given {wrong}")
    return words


def load_tokenizer(folder: str | Path, new_words: Mapping[str, int] | None = None):
    """Loads the tokenizer of CLIP or T5 in a folder, by transformers or as `CLIPWords`.

    Args:
        folder: the tokenizer's.
        new_words: {word: number of tokens that it stands for}; their ids follow the vocabulary, in this order.

    Raises:
        UserError: files are missing or cannot be read, or a new word is in the vocabulary.
    """
    folder = user_path(folder)
    if is_t5(folder):
        if new_words:
            raise UserError(f"new words need a CLIP tokenizer; {os.fspath(folder)!r} has one of T5")
        return _load_t5(folder)
    # Without these files, CLIPTokenizer silently has an empty vocabulary.
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise UserError(f"no CLIP tokenizer in {os.fspath(folder)!r}: no {' and no '.join(missing)}")
        if not new_words and (small := _load_words(folder)) is not None:
            return small
    # Not AutoTokenizer, which imports torch. Imported here, so that the pipeline's workers load neither.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # otherwise transformers warns that PyTorch is missing
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions for malformed files
        raise UserError(f"cannot read the tokenizer in {os.fspath(folder)!r}: {error}") from error
    if new_words:
        _add_words(tokenizer, new_words)
    return tokenizer


def _load_words(folder: Path) -> CLIPWords | None:
    """Loads a tokenizer of `save_small_tokenizer`; None for other folders, and for damaged files."""
    try:
        return CLIPWords(*(json.loads((folder / name).read_text()) for name in ("vocab.json", "tokenizer_config.json")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _load_t5(folder: Path):
    """Loads T5's tokenizer from tokenizer.json, or from a SentencePiece model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as above
    from transformers import PreTrainedTokenizerFast, T5Tokenizer

    where = os.fspath(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(where, local_files_only=True)
        elif (folder / PIECES_FILE).is_file():
            pieces, config = read_pieces(folder / PIECES_FILE), folder / "tokenizer_config.json"
            own = read_json(config) if config.is_file() else {}
            tokenizer = T5Tokenizer(
                vocab=pieces.scores,
                _spm_precompiled_charsmap=pieces.characters or None,
                extra_ids=own.get("extra_ids", 100),
                **{name: own[name] for name in ("model_max_length",) if name in own},
            )
        else:
            raise UserError(f"no T5 tokenizer in {where!r}: no tokenizer.json and no {PIECES_FILE}")
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions for malformed files
        raise UserError(f"cannot read the tokenizer in {where!r}: {error}") from error
    if tokenizer.pad_token is None or tokenizer.eos_token is None:
        raise UserError(f"the tokenizer in {where!r} has no pad_token or no eos_token in its tokenizer_config.json")
    return tokenizer


def _add_words(tokenizer, new_words: Mapping[str, int]) -> None:
    """Adds a token for each vector of each word: `<cat>`, `<cat>_1`, `<cat>_2`, ... (diffusers' names)."""
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    for word in new_words:
        if taken := next((t for t in (word, word.lower(), f"{word.lower()}</w>") if t in vocabulary), None):
            raise UserError(f"the word {word!r} is in the vocabulary ({taken!r}): give the embedding another word.")
    names = [name for word, count in new_words.items() for name in _token_names(word, count)]
    if len({name.lower() for name in names}) < len(names):
        raise UserError(f"the words {', '.join(new_words)} are not distinct: give each embedding a word of its own.")
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken(name, normalized=False, single_word=name[0].isalnum()) for name in names])
    ids = tokenizer.convert_tokens_to_ids(names)
    if ids != list(range(first, first + len(names))):
        raise UserError(f"the tokenizer in {tokenizer.name_or_path} does not accept new words.")
    tokenizer.init_kwargs[_NEW_WORDS] = dict(new_words)


def _token_names(word: str, count: int) -> list[str]:
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def word_tokens(tokenizer) -> dict[int, int]:
    """Returns {id of the first token of a new word: number of its tokens}, which are consecutive."""
    new_words = tokenizer.init_kwargs.get(_NEW_WORDS, {})
    return {tokenizer.convert_tokens_to_ids(word): count for word, count in new_words.items()}


def _expand(tokenizer, text: str) -> list[tuple[str, bool]]:
    """Splits a text at its new words: [(piece, whether it is the tokens of a new word), ...].

    Words are found as CLIP finds its own: whatever their case, but not inside of another word.
    """
    new_words = tokenizer.init_kwargs.get(_NEW_WORDS, {})
    if not new_words:
        return [(text, False)]
    by_lower = {word.lower(): " ".join(_token_names(word, count)) for word, count in new_words.items()}
    longest = sorted(by_lower, key=len, reverse=True)
    edges = ((r"(?<!\w)" if w[0].isalnum() else "", r"(?!\w)" if w[-1].isalnum() else "") for w in longest)
    pattern = "|".join(f"{before}{re.escape(w)}{after}" for w, (before, after) in zip(longest, edges))
    pieces = re.split(f"({pattern})", text, flags=re.IGNORECASE)
    return [(by_lower.get(piece.lower(), piece), bool(i % 2)) for i, piece in enumerate(pieces) if piece.strip()]


def context_length(tokenizer) -> int:
    """Number of tokens of a text, with start and end; CLIP's 77 for a tokenizer without a length."""
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
    old = [word for piece, new in _expand(tokenizer, text) if not new for word in _split(piece)]
    return list(dict.fromkeys(w for w in old if w[0].isalnum() and w not in words))


def readable(tokenizer, text: str) -> str:
    """Returns the text that is tokenized: new words as their tokens; without a small tokenizer's unknown words."""
    # The pieces of an unknown word would be tokens that were never trained, so the word is left out.
    words, pieces = known_words(tokenizer), _expand(tokenizer, text)
    if words is not None:
        pieces = [(p if new else " ".join(word for word in _split(p) if word in words), new) for p, new in pieces]
    return pieces[0][0] if len(pieces) == 1 else " ".join(piece for piece, _ in pieces)


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
    if isinstance(tokenizer, CLIPWords):
        return np.array([tokenizer.framed(readable(tokenizer, text)) for text in texts], np.int32), None
    encoded = tokenizer(
        [readable(tokenizer, text) for text in texts],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="np",
    )
    return np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.attention_mask, bool) if masked else None


def lost_text(tokenizer, text: str) -> str:
    """The end of `text` that exceeds the context length; "" if all of it fits."""
    text = readable(tokenizer, text)
    kept = context_length(tokenizer) - tokenizer.num_special_tokens_to_add()
    return tokenizer.decode(token_ids(tokenizer, text)[kept:]).strip()


def token_ids(tokenizer, text: str) -> list[int]:
    """Returns the ids of a `readable` text, without start, end and padding."""
    if isinstance(tokenizer, CLIPWords):
        return tokenizer.encode(text)
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


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


def text_warnings(tokenizer, texts: Iterable[str], *, cut: bool = True) -> list[str]:
    """Returns warnings about parts of `texts` that the model ignores.

    These are the ends of texts longer than its context, if they are `cut` there, and words that are not in a small
    model's vocabulary.
    """
    texts = dict.fromkeys(texts)
    length = context_length(tokenizer)
    lines = [
        f"a prompt is longer than the model's {length} tokens and is truncated: {lost!r} is ignored"
        for text in (texts if cut else ())
        if (lost := lost_text(tokenizer, text))
    ]
    if unknown := dict.fromkeys(word for text in texts for word in unknown_words(tokenizer, text)):
        known = ", ".join(known_words(tokenizer))
        lines.append(
            f"not in this small model's vocabulary, and ignored: {', '.join(unknown)}. Its vocabulary: {known}"
        )
    return lines
