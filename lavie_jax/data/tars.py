"""Webdataset tars, as img2dataset and video2dataset write them: `00012.mp4`, `00012.txt`, `00012.json` side by side.

The headers of each tar are read once; afterwards a record takes two reads at known offsets. Only the offsets are kept
in memory, 40 bytes per record.
"""

import concurrent.futures
import json
import os
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from absl import logging
from tqdm import tqdm

from lavie_jax.data.records import (
    SUFFIXES,
    VAL_FRACTION,
    Medium,
    Record,
    empty_split,
    of_split,
    one_line,
    shard_files,
)
from lavie_jax.errors import UserError

_FIELDS = [("shard", "i4"), ("json", "?"), ("content", "i8"), ("size", "i8"), ("text", "i8"), ("text_size", "i4")]


class TarRecords:
    """The records of a split.

    Raises:
        UserError: a tar is compressed or truncated, or there are no records.
    """

    def __init__(self, path: str | Path, *, medium: Medium, split: str = "train", val_fraction: float = VAL_FRACTION):
        self.paths = shard_files(path, ".tar")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            walks = pool.map(lambda numbered: _walk(*numbered, medium), enumerate(self.paths))
            walks = list(tqdm(walks, "tars", len(self.paths), disable=len(self.paths) < 50, leave=False))
        names = [name for keys, _ in walks for name in keys]
        rows = np.concatenate([rows for _, rows in walks])
        indices = of_split(names, split, val_fraction)
        if not len(indices):
            raise empty_split(path, medium, split, len(rows))
        self.rows = rows[indices]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row = self.rows[index]
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
        return Record(name, _caption(text, bool(row["json"]), name), content)


def _caption(text: bytes, is_json: bool, name: str) -> str:
    try:
        words = text.decode("utf-8")
        words = json.loads(words).get("caption") if is_json else words
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: its caption is not UTF-8") from error
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{name}: its .json is not a JSON object: {error}") from error
    if not isinstance(words, str) or not words.strip():
        raise UserError(f"{name}: no caption")
    return one_line(words)


def _walk(number: int, path: Path, medium: Medium) -> tuple[list[str], np.ndarray]:
    """(names, offsets of clip and caption) of the pairs in a tar. Members without a partner are counted and logged."""
    clips: dict[str, tarfile.TarInfo] = {}
    texts: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # Webdataset: the key ends at the first dot of the file's name.
                pure = PurePosixPath(member.name)
                stem, _, suffix = pure.name.partition(".")
                key, suffix = str(pure.parent / stem), f".{suffix.lower()}"
                if not member.isreg():
                    continue
                if suffix in SUFFIXES[medium]:
                    if key in clips:
                        raise UserError(f"the tar {os.fspath(path)!r} has two {medium}s named {key!r}")
                    clips[key] = member
                elif suffix == ".txt" or (suffix == ".json" and key not in texts):
                    texts[key] = member
            # tarfile stops at a truncated or damaged header as if it were the end; the true end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it ends at byte {tar.offset} without an end mark")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"cannot read the tar {os.fspath(path)!r}: {error or 'it is empty'}. It is truncated, damaged or "
            "compressed: download it again, unpack .gz, or remove it."
        ) from error
    for one, other, what in ((clips, texts, "caption"), (texts, clips, medium)):
        alone = [key for key in one if key not in other]
        if alone:
            logging.warning("%s: %d records without a %s are left out: %r, ...", path, len(alone), what, alone[0])
    pairs = [key for key in clips if key in texts]
    rows = [
        (number, texts[k].name.lower().endswith(".json"), clips[k].offset_data, clips[k].size, texts[k].offset_data,
         texts[k].size) for k in pairs
    ]  # fmt: skip
    return [f"{path.name}/{key}" for key in pairs], np.array(rows, _FIELDS)
