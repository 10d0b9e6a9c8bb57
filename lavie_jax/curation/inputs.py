"""Finds the videos of a folder and the captions that come with them, in sidecar files or a table."""

import dataclasses
import fnmatch
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from lavie_jax.data import folders
from lavie_jax.data.files import LeftOut
from lavie_jax.data.folders import find_files, read_table
from lavie_jax.data.records import VIDEO_SUFFIXES, one_line
from lavie_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption of a video from `start` to `end` seconds."""

    text: str
    category: str = ""
    start: float = 0.0
    end: float = math.inf


@dataclasses.dataclass(frozen=True)
class Video:
    """A file with its captions.

    Attributes:
        name: path relative to the input folder, with forward slashes, always valid UTF-8.
        size: in bytes.
        key: a digest of name, size, modification time and captions, which names the result of this video.
    """

    path: Path
    name: str
    size: int
    captions: tuple[Caption, ...]
    key: str


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Clips for the split `val`: of videos whose name matches `pattern`, from `start` to `end` seconds."""

    pattern: str
    start: float = 0.0
    end: float = math.inf

    @classmethod
    def parse(cls, text: str) -> "HeldOut":
        """Returns what "NAME" or "NAME:START-END" means; NAME may have the wildcards * and ?."""
        match = re.fullmatch(r"(?P<pattern>.+?)(:(?P<start>[\d.]+)-(?P<end>[\d.]+))?", text)
        try:
            if match is None:
                raise ValueError
            start, end = (
                float(match[name]) if match[name] else default for name, default in (("start", 0.0), ("end", math.inf))
            )
        except ValueError as error:
            raise UserError(f"--hold-out takes NAME or NAME:START-END in seconds; given {text!r}") from error
        if start >= end:
            raise UserError(f"--hold-out {text!r}: the start must be before the end")
        return cls(match["pattern"], start, end)

    def covers(self, name: str, start: float, end: float) -> bool:
        """Returns whether a clip shares any time with what is held out."""
        return fnmatch.fnmatchcase(name, self.pattern) and start < self.end and end > self.start

    def __str__(self) -> str:
        times = "" if self.end == math.inf else f":{self.start:g}-{self.end:g}"
        return f"{self.pattern}{times}"


def find_videos(folder: Path, table: Path | None) -> list[Video]:
    """Returns the videos of `folder` and its subfolders, sorted by name.

    Args:
        table: lists files and captions like those of `data.source=video_folder`. Optional columns: `category`, and
            `start` and `end` in seconds for captions of parts of a video. None = `clip.txt` beside `clip.mp4`.

    Raises:
        UserError: the folder is missing or has no videos, or the table cannot be used.
    """
    if not folder.is_dir():
        raise UserError(f"--input {os.fspath(folder)!r} is not a folder")
    left_out = LeftOut()
    paths, beside = find_files(folder, "video", left_out)
    left_out.warn(len(paths) + len(left_out))
    folders.warn_unindexed(paths)
    if not paths:
        raise UserError(f"no video ({', '.join(VIDEO_SUFFIXES[:5])}, ...) in {os.fspath(folder)!r} or its subfolders")
    if table is None:
        videos = [_video(path, folder, _sidecar_caption(beside.get(path.with_suffix(""), {}))) for path in paths]
    else:
        captions = _read_captions(table, {path.resolve() for path in paths})
        videos = [_video(path, folder, tuple(captions.get(path.resolve(), ()))) for path in paths]
    return sorted(videos, key=lambda video: video.name)


def caption_of(captions: Sequence[Caption], *, start: float, end: float) -> Caption | None:
    """Returns the caption that covers most of the time from `start` to `end`, if it covers at least half of it."""

    def covered(caption: Caption) -> float:
        return min(end, caption.end) - max(start, caption.start)

    best = max(captions, key=covered, default=None)
    return best if best is not None and 2 * covered(best) >= end - start else None


def _video(path: Path, folder: Path, captions: tuple[Caption, ...]) -> Video:
    name = os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")
    stat = path.stat()
    rows = [dataclasses.astuple(caption) for caption in captions]
    digest = hashlib.blake2b(repr((name, stat.st_size, stat.st_mtime_ns, rows)).encode(), digest_size=16)
    return Video(path, name, stat.st_size, captions, digest.hexdigest())


def _sidecar_caption(beside: Mapping[str, Path]) -> tuple[Caption, ...]:
    """Returns the caption in the files beside a video; none if they are missing, empty or not UTF-8."""
    texts = {suffix: file.read_bytes() for suffix, file in beside.items()}
    text, problem = folders.caption_of(texts.get(".txt"), texts.get(".json"))
    if "UTF-8" in problem:
        logging.warning("%s is not UTF-8 and is ignored", beside[".txt"])
    return (Caption(text),) if text else ()


def _read_captions(table: Path, known: set[Path]) -> dict[Path, list[Caption]]:
    """Returns the captions of each file in `known`, in the order of the rows."""
    captions: dict[Path, list[Caption]] = {}
    unused = []
    for where, file, text, row in read_table(table, "video"):
        if file is None or file.resolve() not in known:
            unused.append(where)
        elif text:
            start, end = (_seconds(row.get(name), name, where) for name in ("start", "end"))
            times = (0.0 if start is None else start, math.inf if end is None else end)
            if not 0 <= times[0] < times[1]:
                raise UserError(
                    f"{where}: a caption must start at 0 or later and before its end; given {start} and {end}"
                )
            category = one_line(str(row.get("category") or ""))
            captions.setdefault(file.resolve(), []).append(Caption(text, category, *times))
    if unused:
        logging.warning("%d rows do not name a video of the input, the first: %s", len(unused), unused[0])
    if not captions:
        raise UserError(f"no row of {os.fspath(table)!r} has a caption for a video of the input")
    return captions


def _seconds(value: object, name: str, where: str) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name} must be a number of seconds; given {value!r}") from error
