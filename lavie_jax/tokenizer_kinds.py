"""Tokenizers of other programs: which kind a folder has, and the vocabulary of a SentencePiece model."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lavie_jax.errors import UserError
from lavie_jax.text_files import read_json

PIECES_FILE = "spiece.model"
T5_CLASSES = ("T5", "MT5")  # first letters of the classes in tokenizer_config.json


class Pieces(NamedTuple):
    """The vocabulary of a SentencePiece model, [(piece, log probability), ...], and its table of replacements."""

    scores: list[tuple[str, float]]
    characters: bytes


def is_t5(folder: Path) -> bool:
    """Whether a folder has a tokenizer of T5. Damaged JSON files do not count: what reads them reports them."""
    kind = _object(folder / "tokenizer_config.json").get("tokenizer_class")
    if isinstance(kind, str):
        return kind.startswith(T5_CLASSES)
    if (folder / "tokenizer.json").is_file():
        model = _object(folder / "tokenizer.json").get("model")
        return isinstance(model, dict) and model.get("type") == "Unigram"
    return (folder / PIECES_FILE).is_file()


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_json(file) if file.is_file() else {}
    except UserError:
        return {}


def read_pieces(path: Path) -> Pieces:
    """Reads a SentencePiece model, which transformers reads only together with the package sentencepiece.

    Of the protocol buffer, it reads the pieces (field 1: text 1, score 2) and, in the normalizer (field 3), the
    precompiled table of characters (2).

    Raises:
        UserError: the file is damaged or of another kind.
    """
    scores, characters = [], b""
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                scores.append((piece[1].decode(), piece.get(2, 0.0)))
            elif number == 3:
                characters = dict(_fields(value)).get(2, b"")
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, struct.error) as error:
        raise UserError(f"{path} is not a SentencePiece model, or is damaged.") from error
    if not scores:
        raise UserError(f"{path} has no vocabulary.")
    return Pieces(scores, characters)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (field number, value) of a protocol buffer: whole numbers, floats, and bytes for all else."""
    at = 0

    def number() -> int:
        """Reads a whole number: seven bits in a byte, the lowest first, until a byte below 128."""
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        field, kind = divmod(number(), 8)
        if kind == 0:
            yield field, number()
            continue
        size = {1: 8, 5: 4, 2: None}[kind]
        size = number() if size is None else size
        value = message[at : at + size]
        if len(value) < size:
            raise ValueError("truncated")
        at += size
        yield field, struct.unpack("<f", value)[0] if kind == 5 else value
