"""The files of a tokenizer's folder: which of them count, and whether they fit a text encoder.

Read without transformers, which takes seconds to import.
"""

import shutil
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError
from lavie_jax.text_files import read_json

COMPLETE = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either is a complete tokenizer
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


def check_tokenizer(folder: str | Path, *, vocab_size: int, length: int, owner: object) -> None:
    """Raises UserError when a tokenizer returns token ids or lengths that a text encoder does not have.

    Args:
        folder: the tokenizer's.
        vocab_size: number of tokens of the text encoder.
        length: its number of positions.
        owner: where the text encoder is, for the message.
    """
    folder = Path(folder)
    words, positions = _vocabulary_size(folder), _length(folder)
    if words > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {words} tokens, but the text encoder of {owner} has {vocab_size}: give "
            "its own tokenizer (words added later cannot be used)."
        )
    if positions > length:
        raise UserError(
            f"the tokenizer in {folder} makes texts of {positions} tokens, but the text encoder of {owner} has "
            f"{length} positions: give its own tokenizer, or set model_max_length in tokenizer_config.json."
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
    special = {_content(config.get(name) or default) for name, default in SPECIAL.items()}
    special |= {_content(token) for token in config.get("additional_special_tokens") or ()}
    return size + len(special - ids.keys())


def _content(token: Any) -> str:
    return str(token.get("content", token)) if isinstance(token, dict) else str(token)


def _length(folder: Path) -> int:
    length = _read(folder / "tokenizer_config.json").get("model_max_length")
    return int(length) if isinstance(length, int | float) and 0 < length < 100_000 else DEFAULT_LENGTH
