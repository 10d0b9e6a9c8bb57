"""ArrayRecord shards of msgpack records, and TFDS data sets; both without TensorFlow.

A record is {"video": encoded clip} or {"image": encoded image} with a "caption" and any further fields. `write_shards`
writes shards, `write_tfds` converts them to a TFDS data set.
"""

import functools
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from absl import logging
from jaxtyping import Int32

from lavie_jax.data.records import (
    VAL_FRACTION,
    Medium,
    Record,
    empty_split,
    name_hash,
    of_split,
    one_line,
    shard_files,
    split_of_hashes,
)
from lavie_jax.data.shard_index import MANY, ShardIndex, read_index, write_index
from lavie_jax.data.shard_readers import Readers
from lavie_jax.disk import new_file
from lavie_jax.errors import UserError

SUFFIX = ".array_record"
LIST = "clips.jsonl"  # lists the records of the shards beside it; written by `lavie_jax.curation`


class ShardRecords:
    """Records of ArrayRecord shards that belong to a split.

    Raises:
        UserError: a shard is truncated or damaged, or its first record lacks a caption or the medium, or has other
            fields than that of the first shard.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        medium: Medium | Literal["latents"],
        split: str = "train",
        val_fraction: float = VAL_FRACTION,
    ):
        self.medium = medium
        files = shard_files(path, SUFFIX)
        folder = _listed_folder(files)
        index = None if folder is None else read_index(folder, LIST, files)
        self.reader = Readers(files, None if index is None else index.counts)
        self.paths, self.starts = self.reader.paths, self.reader.starts
        self.sizes = None if index is None else index.sizes  # of all records, if known
        if index is None:
            fields = _check_schema(self.reader, medium)
        else:
            _check_fields(index.fields, medium, self.paths[0])
        if not val_fraction:
            self.indices = np.arange(self.starts[-1] if split == "train" else 0)
        else:
            hashes = self._split_hashes() if index is None else index.hashes
            if index is None and folder is not None and len(files) >= MANY:
                write_index(folder, LIST, files, self._index(fields, hashes))
            self.indices = split_of_hashes(_spread(hashes, self.paths[0]), split, val_fraction)
        if not len(self.indices):
            raise empty_split(path, "clip" if medium == "latents" else medium, split, int(self.starts[-1]))

    def _index(self, fields: Sequence[str], hashes: np.ndarray) -> ShardIndex:
        sizes = self._sizes_in_list()
        if sizes is None:
            sizes = np.zeros((len(hashes), 2), np.int32)
        return ShardIndex(tuple(fields), np.diff(self.starts), hashes, sizes)

    def _split_hashes(self) -> np.ndarray:
        """Returns the hash of each record by which it is assigned to a split, the same for all scenes of one video.

        The list beside the shards (for latents, above them) has the video of each clip; finding it in the records would
        mean reading all clips.
        """
        hashes = np.empty(self.starts[-1], np.uint64)
        for path, start, end in zip(map(Path, self.paths), self.starts, self.starts[1:]):
            folder = next((p for p in (path.parent, path.parent.parent) if (p / LIST).is_file()), None)
            sources, indices = {}, np.empty(0, int)
            if folder is not None:
                sources = _listed_sources(folder / LIST, (folder / LIST).stat().st_mtime_ns)
                indices, of_sources = sources.get(path.relative_to(folder).as_posix(), (indices, None))
            if len(np.unique(indices)) < end - start:
                hashes[start:end] = [name_hash(f"{path.name}[{i}]") for i in range(end - start)]
            if len(indices) and 0 <= indices.min() and indices.max() < end - start:
                hashes[start + indices] = of_sources
        return hashes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        name, fields = self.fields(index)
        return _record(fields, self.medium, name)

    def fields(self, index: int) -> tuple[str, dict[str, Any]]:
        """(name for messages, all fields) of a record."""
        position = int(self.indices[index])
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        name = f"{self.paths[shard]}[{position - self.starts[shard]}]"
        return name, _fields(self.reader, position, name)

    def listed_sizes(self) -> list[tuple[int, int]] | None:
        """(height, width) of each record if there is a list beside every shard; else None."""
        sizes = self._sizes_in_list() if self.sizes is None or not self.sizes.all() else self.sizes
        return None if sizes is None else list(map(tuple, sizes[self.indices].tolist()))

    def _sizes_in_list(self) -> Int32[np.ndarray, "n 2"] | None:
        lists = {path: Path(path).parent / LIST for path in self.paths}
        if not all(path.is_file() for path in lists.values()):
            return None
        found = np.zeros((self.starts[-1], 2), np.int32)
        start_of = dict(zip(self.paths, self.starts.tolist()))
        try:
            for path in set(lists.values()):
                with path.open(encoding="utf-8") as file:
                    for row in map(json.loads, file):
                        start = start_of.get(os.fspath(path.parent / row["shard"]))
                        if start is not None:
                            found[start + row["index"]] = row["height"], row["width"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):  # the list belongs to another set
            return None
        return found if found.all() else None


def store_index(folder: Path, medium: Medium | Literal["latents"]) -> None:
    """Stores the index of a finished set, as opening a set of many shards does."""
    files = shard_files(folder, SUFFIX)
    records = ShardRecords(folder, medium=medium, val_fraction=0.0)
    fields = _check_schema(records.reader, medium)
    write_index(folder, LIST, files, records._index(fields, records._split_hashes()))


def _listed_folder(files: Sequence[Path]) -> Path | None:
    """Returns the folder of the list of all these shards, beside or above them."""
    for folder in (files[0].parent, files[0].parent.parent):
        if (folder / LIST).is_file():
            return folder if all(file.is_relative_to(folder) for file in files) else None
    return None


def _spread(hashes: np.ndarray, path: str) -> np.ndarray:
    """Returns the hashes, or others if all clips are scenes of one video, so that both splits get some."""
    if len(hashes) < 2 or not (hashes == hashes[0]).all():
        return hashes
    logging.warning("all clips in %s are scenes of one video: both splits get some", Path(path).parent)
    return np.array([name_hash(f"scene {i}") for i in range(len(hashes))], np.uint64)


_HASH_OF_SPLIT = {"val": 0, "train": 2**64 - 1}


@functools.lru_cache(maxsize=8)
def _listed_sources(path: Path, mtime: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{shard: (indices of records, hashes of their source videos)} of a list of clips; {} if it is not one.

    A clip that is listed with its split has the lowest hash in val, and the highest in train.
    """
    rows: dict[str, list[tuple[int, int]]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if isinstance(row.get("source"), str):
                    fixed = _HASH_OF_SPLIT.get(row.get("split"))
                    hashed = name_hash(row["source"]) if fixed is None else fixed
                    rows.setdefault(row["shard"], []).append((int(row["index"]), hashed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("%s is not a list of clips and is ignored: %r", path, error)
        return {}
    return {
        shard: (np.array([i for i, _ in pairs]), np.array([h for _, h in pairs], np.uint64))
        for shard, pairs in rows.items()
    }


def _fields(reader: Any, position: int, name: str) -> dict[str, Any]:
    """Returns all fields of a record, given its position in the reader."""
    try:
        packed = reader[position]
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{name}: cannot be read: {error}") from error
    return unpack(packed, name)


def unpack(packed: bytes, name: str) -> dict[str, Any]:
    """Decodes the fields of a msgpack record.

    Raises:
        UserError: it is not a msgpack map.
    """
    import msgpack

    try:
        fields = msgpack.unpackb(packed)
    except (ValueError, msgpack.UnpackException) as error:
        raise UserError(f"{name}: not a msgpack record: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{name}: a record must be a map of fields, not {type(fields).__name__}")
    return fields


def _record(fields: Mapping[str, Any], medium: Medium, name: str) -> Record:
    content, caption = fields.get(medium), fields.get("caption")
    if isinstance(caption, bytes):
        try:
            caption = caption.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: its caption is not UTF-8") from error
    if not isinstance(content, bytes) or not content:
        raise UserError(f"{name}: no {medium}")
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{name}: no caption")
    return Record(name, one_line(caption), content)


def _check_schema(reader: Readers, medium: str) -> list[str]:
    """Returns the fields of records. Raises UserError unless the first record of every shard has the same ones."""
    first = None
    for path, start, end in zip(reader.paths, reader.starts, reader.starts[1:]):
        if start == end:
            raise UserError(f"the shard {path!r} has no records: remove it")
        fields = sorted(_fields(reader, int(start), f"{path}[0]"))
        _check_fields(fields, medium, path)
        if first is not None and fields != first[1]:
            raise UserError(
                f"shards have different fields: records of {first[0]!r} have {', '.join(first[1])}, those of {path!r} "
                f"{', '.join(fields)}. Train on them as two parts of a mixture."
            )
        first = first or (path, fields)
    return first[1]


def _check_fields(fields: Sequence[str], medium: str, path: str) -> None:
    if not {medium, "caption"} <= set(fields):
        raise UserError(f"records of {path!r} have the fields {', '.join(fields)}; they need {medium} and caption")


def write_shards(
    records: Iterable[Mapping[str, Any]], folder: str | Path, *, name: str = "clips", shard_records: int = 1000
) -> list[Path]:
    """Writes `records`, maps of bytes, str and numbers, as `folder/name-00000.array_record` and so on.

    A shard has a temporary name until it is complete.

    Returns:
        The paths of the shards.

    Raises:
        UserError: shards of this name exist already, or there are no records.
    """
    folder, paths, records = Path(folder), [], iter(records)
    if list(folder.glob(f"{name}-*{SUFFIX}")):
        raise UserError(f"{os.fspath(folder)!r} has shards named {name!r} already: name another folder")
    for first in records:
        paths.append(folder / f"{name}-{len(paths):05d}{SUFFIX}")
        write_shard(itertools.chain([first], itertools.islice(records, shard_records - 1)), paths[-1])
    if not paths:
        raise UserError(f"no records to write to {os.fspath(folder)!r}")
    return paths


def write_shard(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes one shard, which has a temporary name until it is complete."""
    import msgpack
    from array_record.python import array_record_module

    with new_file(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")  # for random access
        try:
            for fields in records:
                writer.write(msgpack.packb(dict(fields)))
        finally:
            writer.close()


# ---- TFDS ----


class TFDSRecords:
    """A TFDS data set, such as `write_tfds` writes: a folder with `dataset_info.json` and ArrayRecord files.

    Split `val` is its "validation" or "val" if it has one, and otherwise a part of its "train".
    """

    def __init__(self, path: str | Path, *, medium: Medium, split: str = "train", val_fraction: float = VAL_FRACTION):
        import tensorflow_datasets as tfds  # without TensorFlow; needed only for TFDS data sets

        self.medium, self.name = medium, os.fspath(path)
        if not (Path(path) / "dataset_info.json").is_file():
            raise UserError(
                f"{self.name!r} is not a TFDS data set: dataset_info.json is missing. Give the folder of a version"
            )
        try:
            builder = tfds.builder_from_directory(self.name)
        except Exception as error:  # the libraries that parse its files raise many types
            raise UserError(f"cannot read the TFDS data set {self.name!r}: {error}") from error
        splits = {key: info.num_examples for key, info in builder.info.splits.items() if info.num_examples}
        held_out = next((key for key in ("validation", "val") if key in splits), None)
        chosen = held_out if split == "val" and held_out else "train"
        if chosen not in splits:
            raise UserError(f"{self.name!r} has no records for training; its splits: {splits or 'none'}")
        features = sorted(builder.info.features)
        if not {medium, "caption"} <= set(features):
            raise UserError(f"records of {self.name!r} have {', '.join(features)}; they need {medium} and caption")
        try:
            self.records = builder.as_data_source(split=chosen)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"cannot read {self.name!r} without TensorFlow: {error}") from error
        names = (f"{chosen}[{i}]" for i in range(len(self.records)))
        self.indices = of_split(names, "train" if held_out else split, 0.0 if held_out else val_fraction)
        if not len(self.indices):
            raise empty_split(path, medium, split, len(self.records))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        position = int(self.indices[index])
        name = f"{self.name}[{position}]"
        try:
            fields = self.records[position]
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"cannot read {name}: {error}") from error
        return _record(fields, self.medium, name)


def write_tfds(shards: str | Path, folder: str | Path, *, medium: Medium = "video", files: int = 1) -> Path:
    """Converts `shards` to a TFDS data set `lavie_clips` in `folder`; returns the data set's own folder.

    Records have `caption` and the encoded `video` or `image`, in the split "train". `tfds.builder_from_directory` opens
    the result. The `tfds` command line, which needs TensorFlow, is not used.
    """
    import tensorflow_datasets as tfds

    records = ShardRecords(shards, medium=medium, val_fraction=0.0)

    class LavieClips(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Encoded clips, or images, with captions."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            encoded, text = tfds.features.Scalar(dtype=np.object_), tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({medium: encoded, "caption": text})
            )

        def _split_generators(self, manager: Any) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(len(records)):
                record = records[i]
                yield i, {medium: record.content, "caption": record.caption}

    builder = LavieClips(data_dir=os.fspath(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=files))
    return Path(builder.data_dir)
