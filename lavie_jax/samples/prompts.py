"""Prompts from the command line and from txt, csv and jsonl files. Standard library only, for a fast start."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import MAX_SEED
from lavie_jax.text_files import read_delimited, read_text

FIELDS = ("prompt", "prompts_at", "seed", "negative_prompt")
_QUOTE = 'put a prompt with commas in "quotes"'
_WHOLE = re.compile(r"\d+\.0*")
_AT = re.compile(r"\s*([0-9]{1,9})\s*:(.*)", re.DOTALL)
_FRAME = re.compile("0|[1-9][0-9]{0,8}")


def parse_part(text: str) -> tuple[int, int]:
    """Parses the `--part` of a command that hosts share, `"1/4"`, to (1, 4)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"part must be I/N with I from 0 to N-1, such as 0/4 to 3/4, not {text!r}")
    return int(match[1]), int(match[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to sample; None means the run's seed or negative prompt.

    `at` has prompts over time, {frame: prompt}; `text` is then the same in one line.
    """

    text: str
    at: Mapping[int, str] | None = None
    seed: int | None = None
    negative: str | None = None


def check_seed(seed: Any, where: str = "seed") -> int:
    """Returns `seed` as an int. Raises UserError unless it is a whole number from 0 to 2^32 - 1."""
    try:
        if isinstance(seed, str) and _WHOLE.fullmatch(seed.strip()):
            seed = seed.strip().partition(".")[0]  # spreadsheets write 42.0
        value = int(seed)
        exact = not isinstance(seed, bool) and value == (float(seed) if isinstance(seed, float) else value)
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or not 0 <= value <= MAX_SEED:
        raise UserError(f"{where} must be a whole number from 0 to {MAX_SEED}, not {seed!r}")
    return value


def check_unicode(text: Any, where: str) -> None:
    """Raises UserError for anything but text without NUL that UTF-8 can encode; a command line may have other bytes."""
    if not isinstance(text, str):
        raise UserError(f"{where} must be text, not {text!r}")
    if "\0" in text:
        raise UserError(f"{where}: {text!r} contains the character NUL, which ends texts in files: leave it out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: not valid Unicode text: {text!r}") from None


def parse_prompts_at(text: str, where: str = "prompts-at") -> dict[int, str]:
    """Parses `"0: a red circle | 32: a blue circle"` to {frame: prompt}. Raises UserError for any other form."""
    pairs = []
    for part in text.split("|"):
        match = _AT.fullmatch(part)
        if match is None:
            raise UserError(
                f'{where}: {part.strip()!r} is not FRAME: PROMPT; write "0: a red circle | 32: a blue circle"'
            )
        pairs.append((int(match[1]), match[2]))
    return _in_order(pairs, where)


def check_prompts_at(prompts: Any, where: str = "prompts_at") -> dict[int, str]:
    """Returns prompts over time, {frame: prompt}. Raises UserError if they are anything else, or in disorder."""
    if not isinstance(prompts, Mapping) or not prompts:
        raise UserError(f'{where} must be like {{0: "a red circle", 32: "a blue circle"}}, not {prompts!r}')
    return _in_order(list(prompts.items()), where)


def prompts_at_of_json(prompts: Any, where: str = "prompts_at") -> dict[int, str]:
    """Returns prompts over time in JSON, {"0": prompt}, whose entries may be in any order.

    Raises:
        UserError: they are anything else, or a prompt contains "|", which divides them in one line.
    """
    if not isinstance(prompts, Mapping) or not all(isinstance(f, str) and _FRAME.fullmatch(f) for f in prompts):
        raise UserError(f'{where} must be like {{"0": "a red circle", "32": "a blue circle"}}, not {prompts!r}')
    checked = check_prompts_at({int(frame): prompts[frame] for frame in sorted(prompts, key=int)}, where)
    if divided := next((text for text in checked.values() if "|" in text), None):
        raise UserError(f"{where}: {divided!r} contains |, which divides prompts: leave it out")
    return checked


def _in_order(pairs: Sequence[tuple[Any, Any]], where: str) -> dict[int, str]:
    for frame, text in pairs:
        if not isinstance(frame, Integral) or isinstance(frame, bool) or frame < 0:
            raise UserError(f"{where}: frames are whole numbers from 0, not {frame!r}")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: the prompt of frame {frame} is empty or not text: {text!r}")
        check_unicode(text, where)
    for (frame, _), (after, _) in itertools.pairwise(pairs):
        if after == frame:
            raise UserError(f"{where}: frame {frame} is given twice")
        if after < frame:
            raise UserError(f"{where}: frames must ascend, but {after} follows {frame}")
    return {int(frame): " ".join(text.split()) for frame, text in pairs}


def one_line(prompts: Mapping[int, str]) -> str:
    """Returns prompts over time as `parse_prompts_at` reads them."""
    return " | ".join(f"{frame}: {text}" for frame, text in prompts.items())


def check_within(prompts: Mapping[int, str], frames: int, where: str = "prompts_at") -> None:
    """Raises UserError for a prompt at a frame beyond a clip of `frames`."""
    if (last := max(prompts)) >= frames:
        raise UserError(f"{where}: frame {last} is beyond the clip, whose frames are 0 to {frames - 1}")


def read_prompts(path: Path) -> list[Prompt]:
    """Returns the prompts of a file, at least one.

    - `.txt`: one prompt per line; empty lines are skipped.
    - `.csv` and `.tsv`: a header with `prompt`, and optionally `seed` and `negative_prompt`; divided by commas, tabs,
      semicolons or vertical bars. `prompts_at` replaces `prompt` in rows with several prompts over time.
    - `.jsonl`: one object per line with the same names.

    Raises UserError for a file that is missing, empty, not UTF-8 or of another type, and for an invalid line, with its
    number.
    """
    readers = {".txt": _from_txt, ".csv": _from_table, ".tsv": _from_table, ".jsonl": _from_jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"prompt file {path}: unknown ending {path.suffix!r}; use {', '.join(readers)}")
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"prompt file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read: {error.strerror}") from None
    # Concatenated files contain byte order marks, which editors do not show.
    prompts = list(reader(path, text.replace("\ufeff", "")))
    if not prompts:
        raise UserError(f"prompt file {path} contains no prompts")
    return prompts


def _from_txt(path: Path, text: str) -> Iterator[Prompt]:
    for line in text.split("\n"):  # splitlines() would split at rarer characters too
        if line.strip():
            yield Prompt(text=" ".join(line.split()))


def _from_table(path: Path, text: str) -> Iterator[Prompt]:
    named: list[str] = []

    def check(columns: Sequence[str]) -> str:
        """Stores the names of the columns. Returns what is wrong with them, or ""."""
        named[:] = [column for column in columns if column]
        try:
            _check_fields(f"{path}, header", named)
        except UserError as error:
            return str(error)
        return ""

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    for number, row in read_delimited(path, str(path), delimiter=delimiter, check=check, merged=_has_seed):
        where = f"{path}, line {number}"
        if len(row) < len(named):
            raise UserError(f"{where}: {len(named)} columns are needed, as in the header; {_QUOTE}")
        # an empty cell counts as absent
        yield _prompt(where, {n: v for n, v in row.items() if v.strip()})


def _has_seed(row: Mapping[str, str]) -> bool:
    return row.get("seed", "").strip().isdigit()


def _from_jsonl(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg} (column {error.colno})") from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f'{where} must be an object like {{"prompt": "..."}}, not {line.strip()[:60]}')
        _check_fields(where, values)
        yield _prompt(where, {n: v for n, v in values.items() if v is not None})


def _check_fields(where: str, names: Iterable[str]) -> None:
    for name in names:
        if name not in FIELDS:
            raise UserError(f"{where}: unknown field {name!r}{suggest(str(name), FIELDS)}")
    if not {"prompt", "prompts_at"}.intersection(names):
        raise UserError(f"{where}: the field 'prompt' is missing")


def _prompt(where: str, values: Mapping[str, Any]) -> Prompt:
    text, negative, at = values.get("prompt", ""), values.get("negative_prompt"), values.get("prompts_at")
    if at is not None:
        if text:
            raise UserError(f"{where}: give a text as either prompt or prompts_at")
        if not isinstance(at, str):
            raise UserError(f'{where}: prompts_at is a text, "0: a red circle | 32: a blue circle", not {at!r}')
        at = parse_prompts_at(at, f"{where}, prompts_at")
        text = one_line(at)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the prompt is empty or not text: {text!r}")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{where}: the negative prompt is not text: {negative!r}")
    for part in (text, negative or ""):
        check_unicode(part, where)
    seed = check_seed(values["seed"], f"{where}, seed") if "seed" in values else None
    return Prompt(text=" ".join(text.split()), at=at, seed=seed, negative=negative)
