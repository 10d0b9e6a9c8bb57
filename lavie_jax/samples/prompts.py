"""Prompts from the command line and from txt, csv and jsonl files. Standard library only: errors come at once."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError, suggest

MAX_SEED = 2**32 - 1  # a seed is the one 32-bit word that keys a sample's noise
FIELDS = ("prompt", "seed", "negative_prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A caption to sample; None where the run's own seed or negative prompt holds."""

    text: str
    seed: int | None = None
    negative: str | None = None


def check_seed(seed: Any, where: str = "seed") -> int:
    """`seed` as an int from 0 to 2^32 - 1; UserError otherwise."""
    try:
        value = int(seed)
        exact = not isinstance(seed, bool) and value == (float(seed) if isinstance(seed, float) else value)
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or not 0 <= value <= MAX_SEED:
        raise UserError(f"{where}: a whole number from 0 to {MAX_SEED} is needed, given {seed!r}")
    return value


def check_unicode(text: str, where: str) -> None:
    """UserError for text that UTF-8 cannot hold: a command line's bytes that were none, or half a pair in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid Unicode text: {text!r}") from None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, at least one.

    - `.txt`: one prompt a line; empty lines are skipped.
    - `.csv`: a header with `prompt` and, if wanted, `seed` and `negative_prompt`.
    - `.jsonl`: one object a line with the same names.

    Raises UserError for a file that is missing, empty, not UTF-8 or of another kind, and for a line that is
    wrong, with its number.
    """
    readers = {".txt": _from_txt, ".csv": _from_csv, ".jsonl": _from_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompt file {path}: its kind is told by its ending; use {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompt file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read: {error.strerror}") from None
    prompts = list(reader(path, text))
    if not prompts:
        raise UserError(f"prompt file {path} has no prompts in it")
    return prompts


def _from_txt(path: Path, text: str) -> Iterator[Prompt]:
    for line in text.split("\n"):  # splitlines() would cut at rarer characters too
        if line.strip():
            yield Prompt(text=" ".join(line.split()))


def _from_csv(path: Path, text: str) -> Iterator[Prompt]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_fields(f"{path}, header", rows.fieldnames or ())
        if len(set(rows.fieldnames)) < len(rows.fieldnames):
            raise UserError(f"{path}, header: a field is named twice")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{where}: {len(rows.fieldnames)} columns are needed, as in the header; "
                    'a prompt with commas stands in "quotes"'
                )
            # An empty cell means: not given.
            yield _prompt(where, {n: v for n, v in row.items() if v.strip()})
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.reader.line_num}: {error}") from None


def _from_jsonl(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(values, dict):
            raise UserError(f'{where}: an object like {{"prompt": "..."}} is needed, given {line.strip()[:60]}')
        _check_fields(where, values)
        yield _prompt(where, {n: v for n, v in values.items() if v is not None})


def _check_fields(where: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in FIELDS:
            raise UserError(f"{where}: unknown field {name!r}{suggest(str(name), FIELDS)}")
    if "prompt" not in names:
        raise UserError(f"{where}: there is no field 'prompt'")


def _prompt(where: str, values: Mapping[str, Any]) -> Prompt:
    text, negative = values.get("prompt", ""), values.get("negative_prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the prompt is empty or not a text: {text!r}")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: the negative prompt is not a text: {negative!r}")
    for part in (text, negative or ""):
        check_unicode(part, where)
    seed = check_seed(values["seed"], f"{where}, seed") if "seed" in values else None
    return Prompt(text=" ".join(text.split()), seed=seed, negative=negative)
