"""Files with captions: `clip.mp4` beside `clip.txt`, or a CSV or JSONL table of files and captions.

WebVid's CSV (`videoid`, `page_dir`, `name`) is read unchanged. Unusable files are left out, counted and logged.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from absl import logging
from tqdm import tqdm

from lavie_jax.data.files import LeftOut, walk
from lavie_jax.data.records import SUFFIXES, UNINDEXED, VAL_FRACTION, Medium, Record, empty_split, of_split, one_line
from lavie_jax.errors import UserError
from lavie_jax.text_files import decode, encoding_of, read_delimited

TABLES = (".csv", ".tsv", ".jsonl")
FILE_COLUMNS = ("path", "file", "file_name", "filename", "video", "image")
CAPTION_COLUMNS = ("caption", "text", "name")
NOT_CLIPS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".srt", ".vtt", ".parquet", ".tar", ".html", ".log", "")


@dataclasses.dataclass(frozen=True)
class FolderRecords:
    """Files with captions, sorted by path."""

    rows: tuple[tuple[Path, str], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        path, caption = self.rows[index]
        return Record(os.fspath(path), caption, path)


def open_folder(
    path: str | Path,
    *,
    medium: Medium,
    split: str,
    val_fraction: float = VAL_FRACTION,
    caption: str = "",
    check: Callable[[Path], None] | None = None,
) -> FolderRecords:
    """Opens the records of a split.

    Args:
        path: a folder, searched recursively, of files with a `.txt` of the same name for each, or a `.json` with
            "caption"; or a table, whose file names are relative to its own folder.
        medium: kind of the files.
        split: "train" or "val".
        val_fraction: fraction of the files in `val`.
        caption: of files in a folder without one of their own; "" leaves them out.
        check: raises UserError for a file to leave out; its message starts with the reason and a colon.

    Raises:
        UserError: there is no such folder, a table cannot be read or lacks a column, or no record is left.
    """
    path, dropped = Path(path), LeftOut()
    if path.suffix.lower() in TABLES:
        root, files = path.parent, list(_table(path, medium, dropped))
    elif path.is_dir():
        root, files = path, list(_sidecars(path, medium, dropped, one_line(caption)))
    else:
        raise UserError(f"no folder {os.fspath(path)!r}; a table of captions ends in {', '.join(TABLES)}")
    total = len(files) + len(dropped)
    warn_unindexed([file for file, _ in files])
    rows = files if check is None else _checked(files, check, dropped)
    dropped.warn(total)
    names = [os.path.relpath(file, root).replace(os.sep, "/") for file, _ in rows]
    indices = of_split(names, split, val_fraction)
    if not len(indices):
        why = f"{str(dropped) or '0 are left out'}; the rest are in the other split"
        raise empty_split(path, medium, split, total, why)
    return FolderRecords(tuple(rows[i] for i in indices))


def find_files(folder: Path, medium: Medium, dropped: LeftOut) -> tuple[list[Path], dict[Path, dict[str, Path]]]:
    """Finds the files of a medium below a folder.

    Returns:
        The files, sorted; and for each path without ending, {ending: file} of the captions beside them.
    """
    every, captions = [], {}
    for path in walk(folder, dropped, SUFFIXES[medium]):
        suffix = path.suffix.lower()
        if suffix in SUFFIXES[medium]:
            every.append(path)
        elif suffix in (".txt", ".json"):
            captions.setdefault(path.with_suffix(""), {})[suffix] = path
        elif suffix not in NOT_CLIPS and not any(suffix in known for known in SUFFIXES.values()):
            dropped.add(f"end in {path.suffix}, which is not read", path)
    return sorted(every), captions


def warn_unindexed(files: Sequence[Path]) -> None:
    """Logs how many files are slow to read at random times."""
    slow = [file for file in files if file.suffix.lower() in UNINDEXED]
    if slow:
        logging.warning(
            "%d of %d files do not seek (%s), so reading is slow (ffmpeg -i a.ts -c copy a.mp4 converts): %s, ...",
            len(slow), len(files), ", ".join(sorted({file.suffix.lower() for file in slow})), slow[0],
        )  # fmt: skip


def _sidecars(folder: Path, medium: Medium, dropped: LeftOut, default: str) -> Iterator[tuple[Path, str]]:
    files, captions = find_files(folder, medium, dropped)
    for path in files:
        beside = captions.get(path.with_suffix(""), {})
        try:
            texts = {suffix: file.read_bytes() for suffix, file in beside.items()}
        except OSError as error:
            dropped.add(f"have a caption that cannot be read ({error.strerror})", path)
            continue
        caption, problem = caption_of(texts.get(".txt"), texts.get(".json"))
        if caption or default:
            yield path, caption or default
        else:
            hint = "" if beside else f" (clip{path.suffix} needs clip.txt beside it)"
            dropped.add(f"{problem}{hint}", beside.get(".txt", path))


def caption_of(text: bytes | None, fields: bytes | None) -> tuple[str, str]:
    """Reads the caption of a clip from the files beside it.

    Args:
        text: the content of the `.txt`, which comes first.
        fields: the content of the `.json`, whose "caption" is used if the text is missing, empty or not UTF-8.

    Returns:
        (caption, ""), or ("", the reason why there is none).
    """
    problem = "have no caption"
    if text is not None:
        try:
            caption = one_line(decode(text))
        except UnicodeDecodeError:
            caption, problem = "", "have a caption that is not UTF-8"
        if caption:
            return caption, ""
    if fields is not None:
        try:
            value = json.loads(decode(fields))
            value = value.get("caption") if isinstance(value, dict) else None
        except (ValueError, RecursionError):
            return "", "have a .json that is not JSON" if text is None else problem
        if isinstance(value, str) and one_line(value):
            return one_line(value), ""
    return "", problem


def _checked(rows: list[tuple[Path, str]], check: Callable[[Path], None], dropped: LeftOut) -> list[tuple[Path, str]]:
    def problem(row: tuple[Path, str]) -> str:
        """Returns what `check` raises for a file, or ""."""
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
    seen, find = False, _Finder(path, medium)
    for where, row in _rows(path, medium):
        seen = True
        text = row[_column(path, row, CAPTION_COLUMNS)]
        yield where, find(row), one_line(text) if isinstance(text, str) else "", row
    if not seen:
        raise UserError(f"the table {os.fspath(path)!r} has no rows")


def _table(path: Path, medium: Medium, dropped: LeftOut) -> Iterator[tuple[Path, str]]:
    """Yields (file, caption) of every row that has both."""
    for where, file, caption, _ in read_table(path, medium):
        if file is None:
            dropped.add("name no file that exists", where)
        elif not caption:
            dropped.add("have no caption", where)
        else:
            yield file, caption


def _rows(path: Path, medium: Medium) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yields (location, fields) of every row; columns in lower case."""
    name = os.fspath(path)

    def check(columns: Sequence[str]) -> str:
        """Returns what is wrong with the header of the table, or ""."""
        row = dict.fromkeys(columns, "")
        try:
            _column(path, row, CAPTION_COLUMNS)
            if "videoid" not in row:
                _column(path, row, (medium, *FILE_COLUMNS))
        except UserError as error:
            return str(error)
        return ""

    def merged(row: Mapping[str, str]) -> bool:
        return any(Path(row.get(c, "").strip()).suffix.lower() in SUFFIXES[medium] for c in (medium, *FILE_COLUMNS))

    try:
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as file:
                encoding = encoding_of(file.read(4))
            with path.open(encoding=encoding) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        row = _object(line, f"{name} line {number}")
                        yield f"{name} line {number}", {key.strip().lower(): value for key, value in row.items()}
            return
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        for number, row in read_delimited(path, name, delimiter=delimiter, check=check, merged=merged):
            yield f"{name} line {number}", row
    except UnicodeError as error:
        position = f": byte {error.start} of a block" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"{name} is not UTF-8{position}. Save it as UTF-8.") from error


def _object(line: str, where: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
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


class _Finder:
    """Finds the file of each row of a table. Endings may differ in case, and folders be divided by backslashes."""

    def __init__(self, table: Path, medium: Medium):
        self.table, self.medium = table, medium
        self.listed = functools.lru_cache(maxsize=4096)(_names)

    def __call__(self, row: Mapping[str, object]) -> Path | None:
        """The file of a row; None if it does not exist."""
        folder = self.table.parent
        if "videoid" in row and not set(FILE_COLUMNS) & set(row):
            page, stem = str(row.get("page_dir") or "").strip(), str(row["videoid"]).strip()
            names = [Path(stem + suffix) for suffix in SUFFIXES[self.medium]]
            folders = [folder / "videos" / page, folder / page, folder]
            return next((file for candidate in folders if (file := self._any(candidate, names))), None)
        name = row[_column(self.table, row, (self.medium, *FILE_COLUMNS))]  # a table may list a clip and an image
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            return None
        for spelled in (name, name.strip(), name.strip().replace("\\", "/")):
            if (folder / spelled).is_file():
                return folder / spelled
        file = folder / Path(spelled).expanduser()
        return self._any(file.parent, [Path(file.name)])

    def _any(self, folder: Path, names: Sequence[Path]) -> Path | None:
        """The first of `names` in a folder, whatever the case of its ending."""
        if not names[0].name:
            return None
        listed = self.listed(folder)
        found = (listed.get((name.stem, name.suffix.lower())) for name in names)
        return next((folder / name for name in found if name is not None), None)


def _names(folder: Path) -> dict[tuple[str, str], str]:
    """{(stem, ending in lower case): name} of the files in a folder."""
    try:
        names = sorted((entry.name for entry in os.scandir(folder) if entry.is_file()), reverse=True)
    except OSError:
        return {}
    return {(Path(name).stem, Path(name).suffix.lower()): name for name in names}
