"""Sets of latents (`data.latents`): outputs of a stage's frozen models for clips or images, computed once.

All devices of this machine encode, while threads prepare the next frames. A resumed run keeps the shards that are
complete and up to date.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float16, UInt8
from tqdm import tqdm

from lavie_jax import parallel, weights
from lavie_jax.curation.assemble import NAME, PendingRecord
from lavie_jax.curation.job import LatentJob
from lavie_jax.data import latents, shards, tokens, transforms, video_files
from lavie_jax.data.buckets import Size, nearest, size_name
from lavie_jax.disk import new_file
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.vae import VAE, VAE_PIXELS
from lavie_jax.stages import STAGES
from lavie_jax.training.latents import check_stage, check_text, identity

MAX_FRAMES = 16  # per device and call; clips are padded to a multiple of it


class LatentEncoder:
    """The VAE and text encoder of a weights folder, replicated on all devices of this machine.

    Parameters and activations are float32. On a TPU, matrix products use JAX's default precision.

    Raises:
        UserError: the folder does not exist, its stage trains on pixels, or its VAE cannot encode the sizes.
    """

    def __init__(self, job: LatentJob):
        folder = weights.load_folder(job.weights, params=False)
        check_stage(folder.stage, train_text_encoder=False)
        vae_part, text_part = (weights.load_part(job.weights, part) for part in ("vae", "text_encoder"))
        text_encoder = registry.module(text_part.config)
        check_text(text_encoder)
        self.name, self.null_caption = job.weights, STAGES[folder.stage].null_caption
        self.sizes = job.sizes or ((folder.sampling["height"], folder.sampling["width"]),)
        self.fps = float(job.fps or folder.sampling["fps"])
        _check_sizes(self.sizes, self.fps, vae_part.config.factor)
        self.identity = identity(vae_part, text_part, folder.tokenizer_dir)
        self._tokenizer = tokens.load_tokenizer(folder.tokenizer_dir)
        self._mesh = parallel.make_mesh(devices=parallel.local_devices())
        vae = VAE(vae_part.config)

        def encode(params, images):
            mean, logvar = vae.apply({"params": params}, images, method="encode")
            return jnp.concatenate([mean, jnp.exp(0.5 * logvar)], axis=-1)

        def decode(params, stored):
            return vae.apply({"params": params}, jnp.split(stored, 2, axis=-1)[0], method="decode")

        def encode_text(params, ids):
            return text_encoder.apply({"params": params}, ids)

        replicated = parallel.replicated(self._mesh)
        self._vae = parallel.put(_float32(vae_part.params), replicated)
        self._text = parallel.put(_float32(text_part.params), replicated)
        # In full float32, once and for all epochs; by default, TPUs multiply in bfloat16.
        exact = jax.default_matmul_precision("highest")
        self._encode, self._decode, self._encode_text = (
            parallel.on_mesh(exact(jax.jit(f)), self._mesh) for f in (encode, decode, encode_text)
        )
        self.text = functools.lru_cache(maxsize=1024)(self._text_of)  # the scenes of a video often share a caption

    def settings(self) -> dict[str, object]:
        """Returns everything that determines the latents, ready for JSON."""
        return {"sizes": [list(size) for size in self.sizes], "fps": self.fps, "weights": self.identity}

    def size_of(self, height: int, width: int) -> Size:
        """Returns the size to which frames of (height, width) are resized."""
        return self.sizes[nearest((height, width), self.sizes)]

    def latents(self, frames: UInt8[np.ndarray, "t H W 3"], name: str) -> Float16[np.ndarray, "t h w c"]:
        """Returns mean and standard deviation of the posterior of every frame, unscaled."""
        # A constant number of frames at a time, so that each size compiles once.
        count = self._frames_at_once(frames.shape[1:3])
        padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % count, axis=0)])
        parts = [
            self._encode(self._vae, parallel.put_batch(transforms.to_float(padded[i : i + count]), self._mesh))
            for i in range(0, len(padded), count)
        ]
        return _float16(np.concatenate(jax.device_get(parts))[: len(frames)], name)

    def _frames_at_once(self, size: Size) -> int:
        return min(MAX_FRAMES, max(1, VAE_PIXELS // (size[0] * size[1]))) * self._mesh.size

    def _text_of(self, caption: str) -> Float16[np.ndarray, "l d"]:
        ids = tokens.tokenize(self._tokenizer, [caption])
        return _float16(np.asarray(self._encode_text(self._text, ids))[0], repr(caption))

    def decode(self, stored: Float16[np.ndarray, "t h w c"]) -> UInt8[np.ndarray, "t H W 3"]:
        """Decodes the posterior means of stored latents."""
        return transforms.to_uint8(np.asarray(self._decode(self._vae, stored.astype(np.float32))))

    def parts_of_clip(self, clip: Path, size: Size) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        """Yields the frames of a clip at `fps`, center-cropped to `size`, a bounded number at a time."""
        info, count = video_files.video_info(clip), self._frames_at_once(size)
        frames = int((info.frames - 1) / info.fps * self.fps + 1e-6) + 1
        for first in range(0, frames, count):
            length = min(count, frames - first)
            part = video_files.read_video(clip, frames=length, fps=self.fps, start=first / self.fps)
            yield transforms.resize_crop(part, height=size[0], width=size[1], rng=None)

    def manifest(self, medium: str, counts: Mapping[str, int]) -> dict[str, object]:
        """Returns the manifest's entry `latents`, given the number of records in the folder of each size."""
        return {
            "format": latents.FORMAT,
            "medium": medium,
            "dtype": "float16",
            "sizes": [[list(size), counts[size_name(size)]] for size in self.sizes if counts.get(size_name(size))],
            "fps": self.fps,
            "null_caption": self.null_caption,
            "made_from": self.name,
            "weights": self.identity,
        }

    def write(self, records: Sequence[PendingRecord], out: Path, shard_clips: int) -> tuple[list[Path], list[dict]]:
        """Writes all files of a set except its lists and manifest.

        Returns:
            The paths of the files; a row for each record: shard, index, SHA-256 of its latents, and its fields.
        """
        paths, rows = [self.write_null_text(out)], []
        with tqdm(total=len(records), desc="latents", unit="clip") as bar:
            for size in self.sizes:
                of_size = [record for record in records if record.size == size]
                for number, first in enumerate(range(0, len(of_size), shard_clips)):
                    path = out / size_name(size) / f"{NAME}-{number:05d}{shards.SUFFIX}"
                    rows += self.write_shard(of_size[first : first + shard_clips], path, out, bar.update)
                    paths.append(path)
        for stale in set(out.glob(f"*/*{shards.SUFFIX}")) - set(paths):
            stale.unlink()  # left by an interrupted run that had more videos
        return [*paths[1:], paths[0]], rows

    def write_null_text(self, out: Path) -> Path:
        """Writes the encoded null caption of a set; returns its path."""
        with new_file(out / latents.NULL_TEXT) as temporary, temporary.open("wb") as file:
            np.save(file, self.text(self.null_caption))
        return out / latents.NULL_TEXT

    def write_shard(
        self, records: Sequence[PendingRecord], path: Path, out: Path, done: Callable[[int], Any]
    ) -> list[dict]:
        """Writes a shard, unless it exists with these records, and returns its rows. Calls `done` with clip counts."""
        for partial in path.parent.glob(f".*-{path.name}"):  # left by a killed run
            partial.unlink()
        name = path.relative_to(out).as_posix()
        rows = _read_rows(path, name)
        if rows is not None and [_fields(row) for row in rows] == [dict(record.fields) for record in records]:
            done(len(rows))
            return rows
        shards.write_shard(self._encoded(records, done), path)
        return _read_rows(path, name)

    def _encoded(self, records: Sequence[PendingRecord], done: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
        """Yields the finished records in order. Frames of the next one are prepared while the devices compute."""
        with contextlib.closing(_prefetched(records)) as prepared:
            for record, parts in prepared:
                stored = np.concatenate([self.latents(part, str(record.fields["source"])) for part in parts])
                text = self.text(record.fields["caption"])
                yield {**latents.packed("latents", stored), **latents.packed("text", text), **record.fields}
                done(1)


def _check_sizes(sizes: Sequence[Size], fps: float, factor: int) -> None:
    wrong = any(min(size) < 1 or size[0] % factor or size[1] % factor for size in sizes)
    if wrong or len(set(sizes)) < len(sizes) or not fps > 0:
        raise UserError(
            f"latents need distinct frame sizes with sides that are multiples of the VAE's factor {factor}, and a rate "
            f"above 0; given {', '.join(map(size_name, sizes))} at {fps:g} fps"
        )


def _prefetched(records: Sequence[PendingRecord]) -> Iterator[tuple[PendingRecord, Iterator[np.ndarray]]]:
    """Yields each record with its frames; a thread computes the first part of the next one."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def started(record: PendingRecord):
            parts = record.parts()
            return record, pool.submit(next, parts), parts

        remaining = iter(records)
        following = [started(record) for record in itertools.islice(remaining, 1)]
        while following:
            record, first, rest = following.pop()
            head = first.result()
            following = [started(after) for after in itertools.islice(remaining, 1)]
            yield record, itertools.chain([head], rest)


def _float16(array: np.ndarray, name: str) -> Float16[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{name}: outputs of the models exceed the range of float16, up to {np.abs(array).max()}")
    return half


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


_ARRAYS = ("latents", "latents_shape", "text", "text_shape")
_POSITION = ("shard", "index", "sha256")


def _read_rows(path: Path, name: str) -> list[dict] | None:
    """Returns the records of a complete shard without their arrays; None if the shard is missing or incomplete."""
    if not path.is_file():
        return None
    rows = []
    try:
        records = shards.ShardRecords(path, medium="latents", val_fraction=0.0)
        for index in range(len(records)):
            _, fields = records.fields(index)
            position = {"shard": name, "index": index, "sha256": hashlib.sha256(fields["latents"]).hexdigest()}
            rows.append(position | {key: value for key, value in fields.items() if key not in _ARRAYS})
    except UserError as error:
        logging.warning("%s is recreated: %s", path, error)
        return None
    return rows


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _POSITION}
