"""The files of a tokenizer's folder: which of them count, and whether they fit a text encoder.

Read without transformers, which takes seconds to import.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError
from lavie_jax.models.registry import TextConfig, network_name
from lavie_jax.models.t5_text import T5TextConfig
from lavie_jax.text_files import read_json
from lavie_jax.tokenizer_kinds import PIECES_FILE, is_t5, read_pieces

COMPLETE = (("tokenizer.json",), ("vocab.json", "merges.txt"), (PIECES_FILE,))  # each is a complete tokenizer
FILES = {
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
DEFAULT_LENGTH = 77  # of CLIP, for a tokenizer without a length


def tokenizer_folder(path: Path) -> Path:
    """Returns the folder with the tokenizer's files: `path`, or `path/tokenizer` of a whole model's folder.

    Raises:
        UserError: there is no complete tokenizer.
    """
    for folder in (path, path / "tokenizer"):
        if any(all((folder / name).is_file() for name in names) for names in COMPLETE):
            return folder
    needed = ", or ".join(" and ".join(names) for names in COMPLETE)
    raise UserError(f"{path} is not a tokenizer folder: it needs {needed}.")


def copy_tokenizer(source: str | Path, target: Path) -> Path:
    """Copies the tokenizer's files, and nothing else of the folder (it may be a whole repository)."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(source).iterdir()):
        if file.name in FILES and file.is_file():
            shutil.copyfile(file, target / file.name)
    return target


def limit_length(folder: str | Path, length: int) -> None:
    """Makes the T5 tokenizer in a folder cut texts to `length` tokens, if its own limit is higher; T5 has none."""
    folder = Path(folder)
    if is_t5(folder) and _length(folder) > length:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(_read(file) | {"model_max_length": length}, indent=2) + "\n")


def check_tokenizer(folder: str | Path, text: TextConfig, *, owner: object) -> None:
    """Raises UserError when a tokenizer returns token ids or lengths that a text encoder does not have.

    Args:
        folder: the tokenizer's.
        text: config of the text encoder.
        owner: where the text encoder is, for the message.
    """
    folder = Path(folder)
    words, positions = _vocabulary_size(folder), _length(folder)
    if is_t5(folder) != isinstance(text, T5TextConfig):
        raise UserError(
            f"the tokenizer in {folder} is {'T5' if is_t5(folder) else 'CLIP'}'s, but {owner} has a "
            f"{network_name(text)}: give its own tokenizer."
        )
    if words > text.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {words} tokens, but the text encoder of {owner} has {text.vocab_size}: "
            "give its own tokenizer (words added later cannot be used)."
        )
    if positions > text.length and not is_t5(folder):  # T5's are cut, see `limit_length`
        raise UserError(
            f"the tokenizer in {folder} makes texts of {positions} tokens, but the text encoder of {owner} has "
            f"{text.length} positions: give its own tokenizer, or set model_max_length in tokenizer_config.json."
        )


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _vocabulary_size(folder: Path) -> int:
    """Returns one more than the largest token id, counting special tokens that the files name but do not number."""
    whole, config = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json")
    ids = dict(_read(folder / "vocab.json"))
    model = whole.get("model")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict):
        ids |= model["vocab"]
    elif isinstance(model, dict) and isinstance(model.get("vocab"), list):  # T5's: [[piece, score], ...]
        ids |= {str(piece[0]): i for i, piece in enumerate(model["vocab"])}
    elif not whole and (folder / PIECES_FILE).is_file():
        ids |= {piece: i for i, (piece, _) in enumerate(read_pieces(folder / PIECES_FILE).scores)}
    ids |= _read(folder / "added_tokens.json")
    for token in whole.get("added_tokens") or ():
        if isinstance(token, dict) and "content" in token and "id" in token:
            ids[token["content"]] = token["id"]
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        ids[_content(token)] = number
    try:
        size = 1 + max((int(number) for number in ids.values()), default=-1)
    except (TypeError, ValueError) as error:
        raise UserError(f"the tokenizer in {folder} has token ids that are not whole numbers: {error}") from error
    defaults = {} if is_t5(folder) else SPECIAL
    special = {_content(config.get(name) or default) for name, default in defaults.items()}
    special |= {_content(token) for token in config.get("additional_special_tokens") or ()}
    return size + len(special - ids.keys())


def _content(token: Any) -> str:
    return str(token.get("content", token)) if isinstance(token, dict) else str(token)


def _length(folder: Path) -> float:
    length = _read(folder / "tokenizer_config.json").get("model_max_length")
    if isinstance(length, int | float) and 0 < length < 100_000:
        return int(length)
    return math.inf if is_t5(folder) else DEFAULT_LENGTH
