"""Files with captions: `clip.mp4` beside `clip.txt`, or a CSV or JSONL table of files and captions.

WebVid's CSV (`videoid`, `page_dir`, `name`) is read unchanged. Unusable files are left out, counted and logged.
"""

import concurrent.futures
import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from absl import logging
from tqdm import tqdm

from lavie_jax.data.records import SUFFIXES, VAL_FRACTION, Medium, Record, empty_split, of_split, one_line
from lavie_jax.errors import UserError

TABLES = (".csv", ".tsv", ".jsonl")
FILE_COLUMNS = ("path", "file", "file_name", "filename", "video", "image")
CAPTION_COLUMNS = ("caption", "text", "name")
_NAMED = 5  # files that are logged per reason


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """Files with captions, sorted by path."""

    rows: tuple[tuple[Path, str], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        path, caption = self.rows[index]
        return Record(os.fspath(path), caption, path)


class _Dropped:
    """Files that are left out, by reason."""

    def __init__(self):
        self.reasons: dict[str, list[str]] = {}

    def add(self, reason: str, name: str | Path) -> None:
        self.reasons.setdefault(reason, []).append(os.fspath(name))

    def __str__(self) -> str:
        return ", ".join(f"{len(names)} {reason}" for reason, names in self.reasons.items())

    def warn(self, total: int) -> None:
        for reason, names in self.reasons.items():
            some = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            logging.warning("left out, %d of %d %s: %s", len(names), total, reason, some)


def open_folder(
    path: str | Path,
    *,
    medium: Medium,
    split: str,
    val_fraction: float = VAL_FRACTION,
    check: Callable[[Path], None] | None = None,
) -> FolderRecords:
    """Opens the records of a split.

    Args:
        path: a folder, searched recursively, of files with a `.txt` of the same name beside each; or a table, whose
            file names are relative to its own folder.
        medium: kind of the files.
        split: "train" or "val".
        val_fraction: fraction of the files in `val`.
        check: raises UserError for a file to leave out; its message starts with the reason and a colon.

    Raises:
        UserError: there is no such folder, a table cannot be read or lacks a column, or no record is left.
    """
    path, dropped = Path(path), _Dropped()
    if path.suffix.lower() in TABLES:
        root, files = path.parent, list(_table(path, medium, dropped))
    elif path.is_dir():
        root, files = path, list(_sidecars(path, medium, dropped))
    else:
        raise UserError(f"no folder {os.fspath(path)!r}; a table of captions ends in {', '.join(TABLES)}")
    total = len(files) + sum(map(len, dropped.reasons.values()))
    rows = files if check is None else _checked(files, check, dropped)
    dropped.warn(total)
    names = [os.path.relpath(file, root).replace(os.sep, "/") for file, _ in rows]
    indices = of_split(names, split, val_fraction)
    if not len(indices):
        why = f"{str(dropped) or '0 are left out'}; the rest are in the other split"
        raise empty_split(path, medium, split, total, why)
    return FolderRecords(tuple(rows[i] for i in indices))


def _sidecars(folder: Path, medium: Medium, dropped: _Dropped) -> Iterator[tuple[Path, str]]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES[medium] and p.is_file()):
        text = path.with_suffix(".txt")
        try:
            caption = one_line(text.read_text(encoding="utf-8")) if text.is_file() else ""
        except UnicodeDecodeError:
            dropped.add("have a caption that is not UTF-8", text)
            continue
        if caption:
            yield path, caption
        else:
            dropped.add(f"have no caption (clip{path.suffix} needs clip.txt beside it)", path)


def _checked(rows: list[tuple[Path, str]], check: Callable[[Path], None], dropped: _Dropped) -> list[tuple[Path, str]]:
    def problem(row: tuple[Path, str]) -> str:
        try:
            check(row[0])
        except UserError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        problems = list(tqdm(pool.map(problem, rows), "videos", len(rows), disable=len(rows) < 500, leave=False))
    for (path, _), text in zip(rows, problems):
        if text:
            dropped.add(text.partition(":")[0], path)
    return [row for row, text in zip(rows, problems) if not text]


# ---- tables ----


def read_table(path: Path, medium: Medium) -> Iterator[tuple[str, Path | None, str, Mapping[str, object]]]:
    """Yields (location, file or None if it does not exist, caption or "", all fields) of every row of a table.

    Raises:
        UserError: the file is not a table, lacks a column or has no rows.
    """
    if not path.is_file():
        raise UserError(f"no table {os.fspath(path)!r}")
    seen = False
    for where, row in _rows(path):
        seen = True
        text = row[_column(path, row, CAPTION_COLUMNS)]
        yield where, _file(path, row, medium), one_line(text) if isinstance(text, str) else "", row
    if not seen:
        raise UserError(f"the table {os.fspath(path)!r} has no rows")


def _table(path: Path, medium: Medium, dropped: _Dropped) -> Iterator[tuple[Path, str]]:
    """Yields (file, caption) of every row that has both."""
    for where, file, caption, _ in read_table(path, medium):
        if file is None:
            dropped.add("name no file that exists", where)
        elif not caption:
            dropped.add("have no caption", where)
        else:
            yield file, caption


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yields (location, fields) of every row."""
    name = os.fspath(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name} line {number}", _object(line, f"{name} line {number}")
                return
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            for row in reader:
                if None in row:
                    raise UserError(f"{name} line {reader.line_num} has more fields than the {len(row) - 1} columns")
                yield f"{name} line {reader.line_num}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: byte {error.start} of a block. Save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{name} after line {reader.line_num} is not CSV: {error}") from error


def _object(line: str, where: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object with a file and a caption")
    return row


def _column(path: Path, row: Mapping[str, object], allowed: tuple[str, ...]) -> str:
    for name in allowed:
        if name in row:
            return name
    raise UserError(
        f"{os.fspath(path)!r} has the columns {', '.join(map(str, row))}; it needs a file, one of "
        f"{', '.join(FILE_COLUMNS)} (or WebVid's videoid with page_dir), and a caption, one of "
        f"{', '.join(CAPTION_COLUMNS)}"
    )


def _file(path: Path, row: Mapping[str, object], medium: Medium) -> Path | None:
    """The file of a row; None if it does not exist."""
    if "videoid" in row and not set(FILE_COLUMNS) & set(row):
        page, stem = str(row.get("page_dir") or ""), str(row["videoid"])
        folders = [path.parent / "videos" / page, path.parent / page, path.parent]
        files = [folder / f"{stem}{suffix}" for folder in folders for suffix in SUFFIXES[medium]]
    else:
        name = row[_column(path, row, (medium, *FILE_COLUMNS))]  # a table may list a clip and an image
        files = [path.parent / name] if isinstance(name, str) and name else []
    return next((file for file in files if file.is_file()), None)
