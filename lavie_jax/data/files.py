"""Finds the files of a data set: linked folders are followed, hidden files left out, and what is left out counted."""

import os
from collections.abc import Iterator
from pathlib import Path

from absl import logging

_NAMED = 5  # files that are logged per reason
HIDDEN = "are hidden copies or previews of other programs (their name or folder starts with a dot, or is __MACOSX)"


class LeftOut:
    """Files that are left out, by reason."""

    def __init__(self):
        self.reasons: dict[str, list[str]] = {}

    def add(self, reason: str, name: str | Path) -> None:
        """Counts a file, for a reason that continues "3 of 7 ...", such as "are hidden copies"."""
        self.reasons.setdefault(reason, []).append(os.fspath(name))

    def __len__(self) -> int:
        return sum(map(len, self.reasons.values()))

    def __str__(self) -> str:
        return ", ".join(f"{len(names)} {reason}" for reason, names in self.reasons.items())

    def warn(self, total: int) -> None:
        """Logs the number of files and the first names of each reason."""
        for reason, names in self.reasons.items():
            some = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            logging.warning("left out, %d of %d %s: %s", len(names), total, reason, some)


def is_hidden(name: str) -> bool:
    """Whether a name, of a file or folder, is one that people do not mean to be data."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def walk(folder: Path, left_out: LeftOut, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yields all files below a folder, sorted by folder and name.

    Links to folders are followed, after all real folders, and each folder is visited once: loops end, and no file gets
    another name because a link to its folder was added.

    Args:
        folder: where to start.
        left_out: gets hidden files, broken links and folders that cannot be opened.
        suffixes: endings, in lower case, for which a hidden file or a broken link counts.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for start in sorted(waiting):
            yield from _walk_real(start, seen, links, left_out, suffixes)
        waiting = links


def _walk_real(
    folder: Path, seen: set[tuple[int, int]], links: list[Path], left_out: LeftOut, suffixes: tuple[str, ...]
) -> Iterator[Path]:
    """Yields the files below a folder, but for those behind links to folders, which are appended to `links`."""
    try:
        stat = folder.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            return
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        left_out.add(f"cannot be opened ({error.strerror})", folder)
        return
    folders: list[Path] = []
    for entry in entries:
        path = folder / entry.name
        counts = path.suffix.lower() in suffixes
        is_folder, is_file = _kind(entry)
        if is_folder:
            if is_hidden(entry.name):
                for name in _names_below(path):
                    if Path(name).suffix.lower() in suffixes:
                        left_out.add(HIDDEN, name)
            else:
                (links if entry.is_symlink() else folders).append(path)
        elif is_hidden(entry.name):
            if counts:
                left_out.add(HIDDEN, path)
        elif is_file:
            yield path
        elif counts:
            left_out.add("are links to a file that does not exist" if entry.is_symlink() else "are not files", path)
    for below in folders:
        yield from _walk_real(below, seen, links, left_out, suffixes)


def _kind(entry: os.DirEntry) -> tuple[bool, bool]:
    """Whether an entry, or what it links to, is a folder, and whether it is a file; neither for links in a circle."""
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:
        return False, False


def _names_below(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from (os.path.join(root, name) for name in sorted(names))
