"""Webdataset tars, as img2dataset and video2dataset write them: `00012.mp4`, `00012.txt`, `00012.json` side by side.

The headers and captions of each tar are read once, and the result is stored as an index (`tar_index.py`); afterwards a
record takes two reads at known offsets. Only the offsets are kept in memory, about 50 bytes per record.
"""

import concurrent.futures
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from absl import logging
from tqdm import tqdm

from lavie_jax.data import tar_index
from lavie_jax.data.files import HIDDEN, LeftOut, is_hidden
from lavie_jax.data.folders import caption_of
from lavie_jax.data.records import (
    SUFFIXES,
    VAL_FRACTION,
    Medium,
    Record,
    empty_split,
    name_hash,
    shard_files,
    split_of_hashes,
)
from lavie_jax.data.tar_members import Member, archives, is_header
from lavie_jax.errors import UserError


class TarRecords:
    """The records of a split.

    Raises:
        UserError: a tar is compressed or truncated, or there are no records.
    """

    def __init__(self, path: str | Path, *, medium: Medium, split: str = "train", val_fraction: float = VAL_FRACTION):
        self.paths = shard_files(path, ".tar")
        self.rows, left_out = tar_index.open_index(path, medium, self.paths, lambda paths: _walk_all(paths, medium))
        _warn(path, left_out)
        self.indices = split_of_hashes(self.rows["hash"], split, val_fraction)
        if not len(self.indices):
            raise empty_split(path, medium, split, len(self.rows))
        if len(self.rows) < 2**31:
            self.indices = self.indices.astype(np.int32)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        row = self.rows[self.indices[index]]
        path = self.paths[row["shard"]]
        try:
            with path.open("rb") as file:
                # The name is not kept in memory: it is in the header just before.
                file.seek(row["content"] - tarfile.BLOCKSIZE)
                header, content = file.read(tarfile.BLOCKSIZE), file.read(row["size"])
                file.seek(row["text"])
                text = file.read(row["text_size"])
            name = f"{path}/{header[:100].rstrip(bytes(1)).decode(errors='replace')}"
        except OSError as error:
            raise UserError(f"cannot read the tar {os.fspath(path)!r}: {error}") from error
        if len(content) < row["size"] or len(text) < row["text_size"]:
            raise UserError(f"{name}: the tar was cut short after the start")
        caption, problem = caption_of(None, text) if row["json"] else caption_of(text, None)
        if problem or not is_header(header):
            raise UserError(f"{os.fspath(path)!r} was changed after the start: the header of a record is not there")
        return Record(name, caption, content)


def _warn(path: str | Path, left_out: Sequence[tar_index.LeftOutOfTar]) -> None:
    """Logs how many records are left out of all tars, by reason."""
    counts: dict[str, list] = {}
    for of_tar in left_out:
        for reason, (count, first) in of_tar.items():
            total, example = counts.get(reason, (0, first))
            counts[reason] = [total + count, example]
    for reason, (count, first) in counts.items():
        logging.warning("%s: %d records %s are left out: %r, ...", path, count, reason, first)


def _walk_all(paths: Sequence[Path], medium: Medium) -> Iterator[tuple[np.ndarray, tar_index.LeftOutOfTar]]:
    """The rows of each tar, and what is left out of it."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        walks = pool.map(_walk, paths, [medium] * len(paths))
        for rows, left_out in tqdm(walks, "tars", len(paths), disable=len(paths) < 50, leave=False):
            yield rows, {reason: [len(names), names[0]] for reason, names in left_out.reasons.items()}


class _Members:
    """Clips and captions of one archive, by key."""

    def __init__(self) -> None:
        self.clips: dict[str, Member] = {}
        self.texts: dict[str, dict[str, Member]] = {}


def _walk(path: Path, medium: Medium) -> tuple[np.ndarray, LeftOut]:
    """The rows of the pairs in a tar, and what is left out."""
    left_out, pairs = LeftOut(), []
    rest = _Members()  # halves of pairs: `cat` may join tars that were divided within a pair
    try:
        with path.open("rb") as file:
            for archive in archives(file):
                members = _Members()
                for member in archive:
                    _add(members, member, os.fspath(path), medium, left_out)
                for key in [key for key in members.clips if key in members.texts]:
                    pairs.append((key, members.clips.pop(key), members.texts.pop(key)))
                for key, clip in members.clips.items():
                    if key in rest.clips:
                        left_out.add("without a caption", f"{path.name}/{key}")
                    rest.clips[key] = clip
                for key, texts in members.texts.items():
                    rest.texts.setdefault(key, {}).update(texts)
            for key in [key for key in rest.clips if key in rest.texts]:
                pairs.append((key, rest.clips.pop(key), rest.texts.pop(key)))
            for key in rest.clips:
                left_out.add("without a caption", f"{path.name}/{key}")
            for key in rest.texts:
                left_out.add(f"without a {medium}", f"{path.name}/{key}")
            rows = [row for pair in pairs if (row := _row(file, path, *pair, left_out)) is not None]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"cannot read the tar {os.fspath(path)!r}: {error or 'it is empty'}. It is truncated, damaged or "
            "compressed: download it again, unpack .gz, or remove it."
        ) from error
    return np.array(rows, tar_index.FIELDS), left_out


def _add(members: _Members, member: Member, tar: str, medium: Medium, left_out: LeftOut) -> None:
    """Files a member under its key. Webdataset: the key ends at the first dot of the file's name."""
    folder, _, name = member.name.rpartition("/")
    if "." in (folder[:1], name[:1]) or "/." in folder or "__MACOSX" in folder or "@eaDir" in folder:
        folder = str(PurePosixPath(folder))  # without "./"
        if is_hidden(name) or any(is_hidden(part) for part in folder.split("/") if part not in (".", "..")):
            if PurePosixPath(name).suffix.lower() in SUFFIXES[medium]:
                left_out.add(f"that {HIDDEN}", member.name)
            return
    stem, _, suffix = name.partition(".")
    key, suffix = f"{folder}/{stem}" if folder not in ("", ".") else stem, f".{suffix.lower()}"
    if suffix in SUFFIXES[medium]:
        if key in members.clips:
            raise UserError(f"the tar {tar!r} has two {medium}s named {key!r}")
        members.clips[key] = member
    elif suffix in (".txt", ".json"):
        members.texts.setdefault(key, {})[suffix] = member
    elif PurePosixPath(name).suffix.lower() in SUFFIXES[medium]:
        left_out.add(f"whose name has more dots ({suffix} is not an ending)", member.name)


def _row(
    file: BinaryIO,
    path: Path,
    key: str,
    clip: Member,
    texts: dict[str, Member],
    left_out: LeftOut,
) -> tuple[Any, ...] | None:
    """The row of a pair: its clip, and the caption that is used; None without one."""
    problem = ""
    for suffix in (".txt", ".json"):
        if suffix in texts:
            content = os.pread(file.fileno(), texts[suffix].size, texts[suffix].offset)
            caption, why = caption_of(content, None) if suffix == ".txt" else caption_of(None, content)
            if caption:
                text = texts[suffix]
                hashed = name_hash(f"{path.name}/{key}")
                return 0, hashed, suffix == ".json", clip.offset, clip.size, text.offset, text.size
            problem = problem or why
    left_out.add(f"that {problem}", f"{path.name}/{key}")
    return None
