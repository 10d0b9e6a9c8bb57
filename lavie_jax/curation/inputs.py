"""The videos of a folder, and the captions that come with them: sidecars, or a table."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from lavie_jax.data.folders import read_table
from lavie_jax.data.records import VIDEO_SUFFIXES, one_line
from lavie_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Caption:
    """What is said of a video from `start` to `end` seconds."""

    text: str
    category: str = ""
    start: float = 0.0
    end: float = math.inf


@dataclasses.dataclass(frozen=True)
class Video:
    """A file with its captions. `name` is its path below the input folder, with slashes, always UTF-8."""

    path: Path
    name: str
    size: int
    captions: tuple[Caption, ...]
    key: str  # a digest of name, size, time of change and captions: another one, when the file is another


def find_videos(folder: Path, table: Path | None) -> list[Video]:
    """The videos of `folder`, searched to its depths, in the order of their names.

    Args:
      table: names files and captions, like those of `data.source=video_folder`; columns that may stand beside:
        `category`, and `start` and `end` in seconds, for captions of parts of a video. None = `clip.txt` beside
        `clip.mp4`.

    Raises:
      UserError: there is no such folder or no video in it, or the table cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"--input {os.fspath(folder)!r} is no folder")
    paths = [p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()]
    if not paths:
        raise UserError(f"no {', '.join(VIDEO_SUFFIXES)} in {os.fspath(folder)!r} or below it")
    told = None if table is None else _read_captions(table, {p.resolve() for p in paths})
    videos = [
        _video(path, folder, _beside(path) if told is None else tuple(told.get(path.resolve(), ()))) for path in paths
    ]
    return sorted(videos, key=lambda video: video.name)


def caption_of(captions: Sequence[Caption], *, start: float, end: float) -> Caption | None:
    """The caption that covers most of the time from `start` to `end`, and at least half of it."""

    def covered(caption: Caption) -> float:
        return min(end, caption.end) - max(start, caption.start)

    best = max(captions, key=covered, default=None)
    return best if best is not None and 2 * covered(best) >= end - start else None


def _video(path: Path, folder: Path, captions: tuple[Caption, ...]) -> Video:
    name = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
    stat = path.stat()
    told = [dataclasses.astuple(caption) for caption in captions]
    digest = hashlib.blake2b(repr((name, stat.st_size, stat.st_mtime_ns, told)).encode(), digest_size=16)
    return Video(path, name, stat.st_size, captions, digest.hexdigest())


def _beside(path: Path) -> tuple[Caption, ...]:
    """The caption of the sidecar; none where it is missing, empty or not UTF-8."""
    sidecar = path.with_suffix(".txt")
    try:
        text = one_line(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else ""
    except UnicodeDecodeError:
        logging.warning("%s is not UTF-8 and is not used", sidecar)
        text = ""
    return (Caption(text),) if text else ()


def _read_captions(table: Path, known: set[Path]) -> dict[Path, list[Caption]]:
    """The captions of each file of `known`, in the order of the rows."""
    found: dict[Path, list[Caption]] = {}
    unused = []
    for where, file, text, row in read_table(table, "video"):
        if file is None or file.resolve() not in known:
            unused.append(where)
        elif text:
            start, end = (_seconds(row.get(name), name, where) for name in ("start", "end"))
            times = (0.0 if start is None else start, math.inf if end is None else end)
            if not 0 <= times[0] < times[1]:
                raise UserError(f"{where}: a caption's start is at least 0 and before its end; given {start} and {end}")
            found.setdefault(file.resolve(), []).append(Caption(text, one_line(str(row.get("category") or "")), *times))
    if unused:
        logging.warning("%d rows name no video of the input, the first: %s", len(unused), unused[0])
    if not found:
        raise UserError(f"no row of {os.fspath(table)!r} has a caption for a video of the input")
    return found


def _seconds(value: object, name: str, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name} is in seconds; given {value!r}") from error
