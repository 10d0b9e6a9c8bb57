"""Sets of latents: clips or pictures as a stage's frozen models see them, which the curation computes once.

A set is a folder with a folder of ArrayRecord shards for each size of the frames, `320x512/clips-00000.array_record`,
`null_text.npy`, and a `manifest.json` that says what made them. A record has, beside its caption,

    latents   float16 (T, h, w, 2 C): of each frame, mean and standard deviation of the VAE's posterior, unscaled
    text      float16 (L, D): the caption, as the text encoder gives it

The posterior is stored, not a draw from it: training draws anew each time, as it does from pixels. The standard
deviation, not its logarithm: rounding to float16 then changes a draw by at most one part in 2048 of its mean and of
its noise, and the range, 3e-7 to 22026, fits.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from lavie_jax.data.buckets import Size, size_name
from lavie_jax.data.records import VAL_FRACTION, Medium
from lavie_jax.data.shards import ShardRecords
from lavie_jax.data.sources import Item, first_readable
from lavie_jax.data.video_files import VideoInfo, Window
from lavie_jax.errors import UserError

MANIFEST, NULL_TEXT = "manifest.json", "null_text.npy"
FORMAT = 1  # of the entry `latents` of a manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSet:
    """What the manifest of a set says.

    Attributes:
      medium: of what the latents were made.
      sizes: (height, width) of the frames, in pixels, and how many records there are of each.
      fps: frames that are stored for a second of a clip.
      null_caption: what `null_text` says, which stands for captions that are dropped.
      weights: SHA-256 of each model that made the set, see `training.latents.identity`.
      made_from: the weights folder, by the name it had then.
    """

    path: Path
    medium: Medium
    sizes: Mapping[Size, int]
    fps: float
    null_caption: str
    null_text: Float16[np.ndarray, "l d"]
    weights: Mapping[str, str]
    made_from: str


@functools.lru_cache(maxsize=16)  # a run asks for the same one several times
def open_set(path: str) -> LatentSet:
    """The set in a folder. Raises UserError where there is none, it is not whole, or holds no latents."""
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"no finished set of latents in {path!r}: {MANIFEST} is missing. "
            "python -m lavie_jax.curation --latents makes one"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        told = manifest.get("latents")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {os.fspath(folder / MANIFEST)!r}: {error}") from error
    if told is None:
        raise UserError(f"{path!r} holds encoded clips, not latents: use the data source array_record for it")
    if told.get("format") != FORMAT:
        raise UserError(f"{path!r} has latents of format {told.get('format')}; this version reads {FORMAT}")
    for name, file in manifest["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != file["bytes"]:
            state = "missing" if found is None else f"cut short or changed: it has {found} bytes, not {file['bytes']}"
            raise UserError(f"{os.fspath(folder / name)!r} is {state}; fetch the set again")
    try:
        null_text = np.load(folder / NULL_TEXT)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {os.fspath(folder / NULL_TEXT)!r}: {error}") from error
    return LatentSet(
        path=folder,
        medium=told["medium"],
        sizes={tuple(size): count for size, count in told["sizes"]},
        fps=told["fps"],
        null_caption=told["null_caption"],
        null_text=null_text,
        weights=told["weights"],
        made_from=told["made_from"],
    )


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """A clip or picture; `name` is for messages."""

    name: str
    caption: str
    latents: Float16[np.ndarray, "t h w c"]
    text: Float16[np.ndarray, "l d"]


class LatentRecords:
    """The records of a split of a set that have one size; the split is that of the shards of the clips themselves."""

    def __init__(self, found: LatentSet, size: Size, *, split: str, val_fraction: float = VAL_FRACTION):
        folder = found.path / size_name(size)
        self.shards = ShardRecords(folder, medium="latents", split=split, val_fraction=val_fraction)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> LatentRecord:
        return unpack_record(*self.shards.fields(index))


def unpack_record(name: str, fields: Mapping[str, Any]) -> LatentRecord:
    """The record that the fields of a shard's record are. Raises UserError for what is none."""
    try:
        return LatentRecord(name, fields["caption"], _array(fields, "latents"), _array(fields, "text"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: no record of latents: {error}") from error


def packed(name: str, array: Float16[np.ndarray, "..."]) -> dict[str, Any]:
    """The fields of a record that hold an array: its bytes, little-endian, and its shape."""
    return {name: np.ascontiguousarray(array, "<f2").tobytes(), f"{name}_shape": list(array.shape)}


def _array(fields: Mapping[str, Any], name: str) -> np.ndarray:
    return np.frombuffer(fields[name], "<f2").reshape(fields[f"{name}_shape"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSource:
    """Clips and stills of sets of latents: what `sources.RecordSource` is for encoded files.

    Of each clip the frames that `window` says, from a random time on, or the middle with `random_place` = False; the
    place within the picture was decided when the set was made.
    """

    clips: LatentRecords | None = None
    pictures: LatentRecords | None = None
    window: Window
    fps: float
    null_text: Float16[np.ndarray, "l d"]
    random_place: bool = True
    seed: int = 0

    def __len__(self) -> int:
        records = self.clips if self.clips is not None else self.pictures
        return 0 if records is None else len(records)

    def video(self, index: int, rng: np.random.Generator) -> Item:
        def read(record: LatentRecord) -> Item:
            return self._item(record, self.window, rng.random() if self.random_place else 0.5, rng)

        return first_readable(self.clips, index, read, kind="video", seed=self.seed)

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        pictures, one = self.pictures is not None, dataclasses.replace(self.window, frames=1)

        def read(record: LatentRecord) -> Item:
            return self._item(record, one, 0.0 if pictures else rng.random(), rng)

        records = self.pictures if pictures else self.clips
        item = first_readable(records, index, read, kind="image", seed=self.seed)
        return item._replace(pixels=item.pixels[0])

    def _item(self, record: LatentRecord, window: Window, place: float, rng: np.random.Generator) -> Item:
        if self.random_place:
            rng.random(2)  # the crop that pixels would get: so the same captions are dropped, and the same frames shown
        info = VideoInfo(len(record.latents), self.fps)
        start = window.room(info) * place
        if start < 0:
            raise UserError(f"{record.name} is too short for {window}: it has {info.frames} at {info.fps:g} fps")
        frames = window.numbers(info, start)
        return Item(record.latents[frames], record.caption, text=record.text, null_text=self.null_text)
