"""Text as other programs write it: byte order marks, JSON, tables with any usual delimiter. Standard library only."""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lavie_jax.errors import UserError

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def encoding_of(content: bytes) -> str:
    """The encoding that a byte order mark at the start of `content` announces; UTF-8 without one."""
    return next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")


def decode(content: bytes) -> str:
    """Decodes UTF-8, or UTF-16 with a byte order mark, and removes the mark. Raises UnicodeDecodeError."""
    return content.decode(encoding_of(content))


def read_text(path: Path) -> str:
    """Reads a text file with `decode`. Raises OSError and UnicodeDecodeError."""
    return decode(path.read_bytes())


def read_json(path: Path) -> dict:
    """Reads the object in a JSON file. Raises UserError when there is none."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object.")
    return value


def read_delimited(
    path: Path,
    name: str,
    *,
    delimiter: str,
    check: Callable[[Sequence[str]], str],
    merged: Callable[[Mapping[str, str]], bool] = lambda row: False,
) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yields (line number, {column: text}) of each row of a table that is not empty.

    Columns are lower case and without spaces around them. The delimiter is the one with which the header has the
    columns that are needed; where `delimiter` and another both have them, `delimiter`. Fields may be quoted as in CSV.
    Tables with tabs may also be unquoted: then quotes are ordinary characters.

    Args:
        path: the table, UTF-8, or UTF-16 with a byte order mark.
        name: of the table in messages.
        delimiter: the usual one of the file's ending.
        check: returns why a header cannot be used, or "".
        merged: whether a line inside a quoted field, read as a row of its own, must have been one.

    Raises:
        UserError: the header cannot be used, a row has more fields than it, or quotes are not closed.
        UnicodeDecodeError: the encoding is another.
    """
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    with path.open(encoding=encoding, newline="") as file:
        lines = _numbered(file)
        start, text = next(((n, line) for n, line in lines if line.strip() and not _SEP.fullmatch(line)), (0, ""))
    if not text:
        return
    delimiter, columns = _header(text, name, delimiter, check)
    literal = delimiter == "\t" and _is_unquoted(path, encoding, start, len(columns))
    with path.open(encoding=encoding, newline="") as file:
        rows = _literal_rows(file) if literal else _quoted_rows(file, name, delimiter)
        for number, cells in rows:
            if number <= start or not any(cell.strip() for cell in cells):
                continue
            if any(cell.strip() for cell in cells[len(columns) :]):
                raise UserError(
                    f"{name} line {number} has more fields than the {len(columns)} columns of its header: "
                    f'put texts with {DELIMITERS[delimiter]} in "quotes"'
                )
            for line in (line for cell in cells for line in cell.splitlines()[1:]):
                pieces = line.split(delimiter)
                if len(pieces) == len(columns) and merged(dict(zip(columns, pieces))):
                    raise UserError(f"{name}: a quote before line {number} is not closed, so that rows are merged")
            yield number, {column: cell for column, cell in zip(columns, cells) if column}


_SEP = re.compile(r"sep=.\s*")  # Excel's first line


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    return enumerate(lines, 1)


def _header(line: str, name: str, delimiter: str, check: Callable[[Sequence[str]], str]) -> tuple[str, list[str]]:
    """(delimiter, columns) of a header."""
    problems: dict[str, tuple[str, list[str]]] = {}
    for candidate in (delimiter, *(other for other in DELIMITERS if other != delimiter)):
        try:
            cells = next(csv.reader([line], delimiter=candidate))
        except (csv.Error, StopIteration):
            continue
        columns = [cell.strip().lower() for cell in cells]
        while columns and not columns[-1]:  # spreadsheets write empty columns at the end
            columns.pop()
        problem = check(columns)
        if not problem:
            if len(set(filter(None, columns))) < len(list(filter(None, columns))):
                raise UserError(f"{name}, header: a field is named twice")
            return candidate, columns
        problems[candidate] = problem, columns
    # Delimiters that divide the header say more about it than the ending of the file.
    best = max(problems, key=lambda candidate: (len(problems[candidate][1]), candidate == delimiter))
    raise UserError(problems[best][0])


def _is_unquoted(path: Path, encoding: str, start: int, columns: int) -> bool:
    """Whether every line of a table with tabs is a row, so that no quote encloses a tab or a line break."""
    with path.open(encoding=encoding, newline="") as file:
        for number, line in _numbered(file):
            if number > start and line.strip() and len(line.rstrip("\r\n\t").split("\t")) > columns:
                return False
            if number > start and line.strip() and line.count("\t") < columns - 1 and '"' in line:
                return False
    return True


def _literal_rows(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in _numbered(file):
        yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    """The text of a cell that is quoted as a whole; any other unchanged."""
    inner = cell[1:-1].replace('""', "")
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if whole else cell


def _quoted_rows(file: Iterable[str], name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        before = reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{name} after line {before} is not CSV: {error}") from error
        yield reader.line_num, row
