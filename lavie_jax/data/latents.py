"""Sets of latents: clips or images encoded by a stage's frozen models, which `lavie_jax.curation` computes once.

A set is a folder with ArrayRecord shards for each frame size, `320x512/clips-00000.array_record`, `null_text.npy`, and
a `manifest.json` that records the models. In addition to its caption, a record has

    latents   float16 (T, h, w, 2 C): mean and standard deviation of the VAE's posterior of each frame, unscaled
    text      float16 (L, D): the caption's encoding by the text encoder

The posterior is stored instead of a sample, because training uses a new sample each time, as it does with pixels. The
standard deviation is stored instead of its logarithm: then rounding to float16 changes the mean and the noise of a
sample by at most one part in 2048. Its range, 3e-7 to 22026, is within that of float16.
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
from lavie_jax.data.downloads import local_data
from lavie_jax.data.records import VAL_FRACTION, Medium
from lavie_jax.data.shards import ShardRecords
from lavie_jax.data.sources import Item, first_readable
from lavie_jax.data.video_files import ClipWindow, VideoInfo
from lavie_jax.errors import UserError, user_path

MANIFEST, NULL_TEXT = "manifest.json", "null_text.npy"
FORMAT = 1  # of the entry `latents` of a manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSet:
    """The manifest of a set.

    Attributes:
        path: the set's folder.
        medium: whether the latents are of clips or of images.
        sizes: {(height, width) of the frames in pixels: number of records}.
        fps: frames stored per second of a clip.
        null_caption: the text that replaces dropped captions.
        null_text: its encoding.
        weights: SHA-256 of each model that computed the set, see `training.latents.identity`.
        made_from: name of the weights folder when the set was computed.
    """

    path: Path
    medium: Medium
    sizes: Mapping[Size, int]
    fps: float
    null_caption: str
    null_text: Float16[np.ndarray, "l d"]
    weights: Mapping[str, str]
    made_from: str


@functools.lru_cache(maxsize=16)  # a run opens the same set several times
def open_set(path: str) -> LatentSet:
    """Opens the set in a folder, or in a bucket, from which it is copied.

    Raises:
        UserError: the set is missing or incomplete, or does not contain latents.
    """
    folder = user_path(local_data(path))
    path = os.fspath(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"no finished set of latents in {path!r}: {MANIFEST} is missing. "
            "Compute one with python -m lavie_jax.curation --latents"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entry = manifest.get("latents")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {os.fspath(folder / MANIFEST)!r}: {error}") from error
    if entry is None:
        raise UserError(f"{path!r} contains encoded clips, not latents: use data.source=array_record")
    if entry.get("format") != FORMAT:
        raise UserError(f"{path!r} has latents of format {entry.get('format')}; this version reads {FORMAT}")
    for name, file in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != file["bytes"]:
            state = "missing" if size is None else f"truncated or changed: it has {size} bytes, not {file['bytes']}"
            raise UserError(f"{os.fspath(folder / name)!r} is {state}; fetch the set again")
    try:
        null_text = np.load(folder / NULL_TEXT)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {os.fspath(folder / NULL_TEXT)!r}: {error}") from error
    return LatentSet(
        path=folder,
        medium=entry["medium"],
        sizes={tuple(size): count for size, count in entry["sizes"]},
        fps=entry["fps"],
        null_caption=entry["null_caption"],
        null_text=null_text,
        weights=entry["weights"],
        made_from=entry["made_from"],
    )


@dataclasses.dataclass(frozen=True)
class LatentRecord:
    """An encoded clip or image; `name` is for messages."""

    name: str
    caption: str
    latents: Float16[np.ndarray, "t h w c"]
    text: Float16[np.ndarray, "l d"]


class LatentRecords:
    """Records of one size in a split of a set. Splits equal those of the shards of encoded clips."""

    def __init__(self, latents: LatentSet, size: Size, *, split: str, val_fraction: float = VAL_FRACTION):
        folder = latents.path / size_name(size)
        self.shards = ShardRecords(folder, medium="latents", split=split, val_fraction=val_fraction)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> LatentRecord:
        return unpack_record(*self.shards.fields(index))


def unpack_record(name: str, fields: Mapping[str, Any]) -> LatentRecord:
    """Returns the record in the fields of a shard's record.

    Raises:
        UserError: the fields are not a record of latents.
    """
    try:
        return LatentRecord(name, fields["caption"], _array(fields, "latents"), _array(fields, "text"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: not a record of latents: {error}") from error


def packed(name: str, array: Float16[np.ndarray, "..."]) -> dict[str, Any]:
    """Returns the fields of a record that store an array: little-endian bytes and shape."""
    return {name: np.ascontiguousarray(array, "<f2").tobytes(), f"{name}_shape": list(array.shape)}


def _array(fields: Mapping[str, Any], name: str) -> np.ndarray:
    return np.frombuffer(fields[name], "<f2").reshape(fields[f"{name}_shape"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSource:
    """Clips and images of sets of latents: the counterpart of `sources.RecordSource`.

    `window` starts at a random time of each clip, or in the middle with `random_crop` = False. The crop was chosen when
    the set was computed.
    """

    clips: LatentRecords | None = None
    images: LatentRecords | None = None
    window: ClipWindow
    fps: float
    null_text: Float16[np.ndarray, "l d"]
    random_crop: bool = True
    seed: int = 0

    def __len__(self) -> int:
        records = self.clips if self.clips is not None else self.images
        return 0 if records is None else len(records)

    def video(self, index: int, rng: np.random.Generator) -> Item:
        """Returns the latents of a window of clip `index`, with its encoded caption; `rng` chooses the start."""

        def read(record: LatentRecord) -> Item:
            return self._item(record, self.window, rng.random() if self.random_crop else 0.5, rng)

        return first_readable(self.clips, index, read, kind="video", seed=self.seed)

    def image(self, index: int, rng: np.random.Generator, *, margin: int = 0) -> Item:
        """Returns the latents of image `index`, or, without images, of a frame of a clip; there is no `margin`."""
        of_images, one = self.images is not None, dataclasses.replace(self.window, frames=1)

        def read(record: LatentRecord) -> Item:
            return self._item(record, one, 0.0 if of_images else rng.random(), rng)

        records = self.images if of_images else self.clips
        item = first_readable(records, index, read, kind="image", seed=self.seed)
        return item._replace(pixels=item.pixels[0])

    def _item(self, record: LatentRecord, window: ClipWindow, place: float, rng: np.random.Generator) -> Item:
        if self.random_crop:
            # Training on pixels crops with these two numbers: the ones after them, for dropped captions, stay the same.
            rng.random(2)
        info = VideoInfo(len(record.latents), self.fps)
        start = window.room(info) * place
        if start < 0:
            raise UserError(f"{record.name} is too short for {window}: it has {info.frames} at {info.fps:g} fps")
        frames = window.indices(info, start)
        return Item(record.latents[frames], record.caption, text=record.text, null_text=self.null_text)
