"""Sets of latents (`data.latents`): what a stage's frozen models see of clips or pictures, computed once.

All devices of this machine work, on frames that are prepared beside them. A run that was stopped goes on with the
shards that are whole and hold what they would be made of.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float16, UInt8
from tqdm import tqdm

from lavie_jax import parallel, weights
from lavie_jax.curation.assemble import Example
from lavie_jax.curation.pipeline import LatentJob
from lavie_jax.data import latents, shards, tokens, transforms, video_files
from lavie_jax.data.buckets import Size, nearest, size_name
from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText
from lavie_jax.models.vae import VAE, VAE_PIXELS
from lavie_jax.stages import STAGES
from lavie_jax.training.latents import check_stage, identity

MOST_FRAMES = 16  # that a device encodes at a time: a clip is padded to a multiple


class Encoder:
    """The frozen models of a weights folder, on all devices of this machine; they compute in float32.

    Raises UserError for a folder that does not exist, of a stage that is trained on pixels, or sizes that its VAE
    cannot take.
    """

    def __init__(self, job: LatentJob):
        found = weights.load_folder(job.weights, params=False)
        check_stage(found.stage, train_text_encoder=False)
        vae_part, text_part = (weights.load_part(job.weights, part) for part in ("vae", "text_encoder"))
        self.name, self.null_caption = job.weights, STAGES[found.stage].null_caption
        self.sizes = job.sizes or ((found.sampling["height"], found.sampling["width"]),)
        self.fps = float(job.fps or found.sampling["fps"])
        factor = vae_part.config.factor
        wrong = [size_name(size) for size in self.sizes if min(size) < 1 or size[0] % factor or size[1] % factor]
        if wrong or len(set(self.sizes)) < len(self.sizes) or not self.fps > 0:
            raise UserError(
                f"latents are of frames whose sides are multiples of the VAE's factor {factor}, each size once, at a "
                f"rate above 0; given {', '.join(map(size_name, self.sizes))} at {self.fps:g} fps"
            )
        self.identity = identity(vae_part, text_part, found.tokenizer_dir)
        self._tokenizer = tokens.load_tokenizer(found.tokenizer_dir)
        self._mesh = parallel.make_mesh(devices=jax.local_devices())
        vae, text_encoder = VAE(vae_part.config), CLIPText(text_part.config)

        def encode(params, images):
            mean, logvar = vae.apply({"params": params}, images, method="encode")
            return jnp.concatenate([mean, jnp.exp(0.5 * logvar)], axis=-1)

        def decode(params, latents):
            return vae.apply({"params": params}, jnp.split(latents, 2, axis=-1)[0], method="decode")

        everywhere = parallel.replicated(self._mesh)
        self._vae = parallel.put(_float32(vae_part.params), everywhere)
        self._text = parallel.put(_float32(text_part.params), everywhere)
        self._encode, self._decode = (parallel.on_mesh(jax.jit(f), self._mesh) for f in (encode, decode))
        self._encode_text = parallel.on_mesh(
            jax.jit(lambda params, ids: text_encoder.apply({"params": params}, ids)), self._mesh
        )
        self.text = functools.lru_cache(maxsize=1024)(self._one_text)  # all scenes of a video may have one caption

    def settings(self) -> dict[str, object]:
        """What decides the results, for JSON."""
        return {"sizes": [list(size) for size in self.sizes], "fps": self.fps, "weights": self.identity}

    def size_of(self, height: int, width: int) -> Size:
        """The size to which frames of (height, width) are brought."""
        return self.sizes[nearest((height, width), self.sizes)]

    def latents(self, frames: UInt8[np.ndarray, "t H W 3"], name: str) -> Float16[np.ndarray, "t h w c"]:
        """Mean and standard deviation of every frame's posterior, unscaled."""
        # Always as many frames at a time: one program for each size.
        count = self._at_once(frames.shape[1:3])
        padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % count, axis=0)])
        parts = [
            self._encode(self._vae, parallel.put_batch(transforms.to_float(padded[i : i + count]), self._mesh))
            for i in range(0, len(padded), count)
        ]
        return _half(np.concatenate(jax.device_get(parts))[: len(frames)], name)

    def _at_once(self, size: Size) -> int:
        return min(MOST_FRAMES, max(1, VAE_PIXELS // (size[0] * size[1]))) * self._mesh.size

    def _one_text(self, caption: str) -> Float16[np.ndarray, "l d"]:
        ids = tokens.tokenize(self._tokenizer, [caption])
        return _half(np.asarray(self._encode_text(self._text, ids))[0], repr(caption))

    def pictures(self, stored: Float16[np.ndarray, "t h w c"]) -> UInt8[np.ndarray, "t H W 3"]:
        """What the means of latents look like."""
        return transforms.to_uint8(np.asarray(self._decode(self._vae, stored.astype(np.float32))))

    def parts_of_clip(self, clip: Path, size: Size) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        """The frames of a clip at `fps`, cut to `size` at the centre; a few at a time, however long it is."""
        info, count = video_files.video_info(clip), self._at_once(size)
        frames = int((info.frames - 1) / info.fps * self.fps + 1e-6) + 1
        for first in range(0, frames, count):
            some = min(count, frames - first)
            part = video_files.read_video(clip, frames=some, fps=self.fps, start=first / self.fps)
            yield transforms.resize_crop(part, height=size[0], width=size[1], rng=None)

    def manifest(self, medium: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
        """What a set's manifest says of its latents; `rows` are those that `write` gave."""
        counts = Counter(str(Path(row["shard"]).parent) for row in rows)
        return {
            "format": latents.FORMAT,
            "medium": medium,
            "dtype": "float16",
            "sizes": [[list(size), counts[size_name(size)]] for size in self.sizes if counts[size_name(size)]],
            "fps": self.fps,
            "null_caption": self.null_caption,
            "made_from": self.name,
            "weights": self.identity,
        }

    def write(self, examples: Sequence[Example], out: Path, shard_clips: int) -> tuple[list[Path], list[dict]]:
        """Writes a set but for its manifest: (all files, a row for each record: place, SHA-256 of latents, fields)."""
        with video_files.finished(out / latents.NULL_TEXT) as temporary, temporary.open("wb") as file:
            np.save(file, self.text(self.null_caption))
        files, rows = [], []
        with tqdm(total=len(examples), desc="latents", unit="clip") as bar:
            for size in self.sizes:
                mine = [example for example in examples if example.size == size]
                for number, first in enumerate(range(0, len(mine), shard_clips)):
                    some = mine[first : first + shard_clips]
                    path = out / size_name(size) / f"clips-{number:05d}{shards.SUFFIX}"
                    rows += self._shard(some, path, path.relative_to(out).as_posix(), bar)
                    files.append(path)
        for before in set(out.glob(f"*/*{shards.SUFFIX}")) - set(files):
            before.unlink()  # of a run that was stopped and had more videos
        return [*files, out / latents.NULL_TEXT], rows

    def _shard(self, examples: Sequence[Example], path: Path, name: str, bar: tqdm) -> list[dict]:
        for half in path.parent.glob(f".[0-9]*-{path.name}"):  # of a run that was killed
            half.unlink()
        rows = _rows(path, name)
        if rows is not None and [_fields(row) for row in rows] == [dict(example.fields) for example in examples]:
            bar.update(len(rows))
            return rows
        shards.write_shard(self._records(examples, bar), path)
        return _rows(path, name)

    def _records(self, examples: Sequence[Example], bar: tqdm) -> Iterator[dict[str, Any]]:
        """The records, in order; frames of the next example are prepared while the devices work."""
        with contextlib.closing(_ahead(examples)) as prepared:
            for example, parts in prepared:
                what = f"{example.fields['source']}"
                stored = np.concatenate([self.latents(part, what) for part in parts])
                text = self.text(example.fields["caption"])
                yield {**latents.packed("latents", stored), **latents.packed("text", text), **example.fields}
                bar.update()


def _ahead(examples: Sequence[Example]) -> Iterator[tuple[Example, Iterator[np.ndarray]]]:
    """Each example with its frames; the first part of the next one is made by a thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

        def started(example: Example):
            parts = example.parts()
            return pool.submit(next, parts), parts

        left = iter(examples)
        following = [(example, *started(example)) for example in itertools.islice(left, 1)]
        while following:
            example, first, rest = following.pop()
            head = first.result()
            following = [(after, *started(after)) for after in itertools.islice(left, 1)]
            yield example, itertools.chain([head], rest)


def _half(array: np.ndarray, name: str) -> Float16[np.ndarray, "..."]:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{name}: the models answer with numbers that float16 cannot hold, up to {np.abs(array).max()}")
    return half


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


_ARRAYS = ("latents", "latents_shape", "text", "text_shape")
_PLACE = ("shard", "index", "sha256")


def _rows(path: Path, name: str) -> list[dict] | None:
    """What a whole shard holds, but for the arrays; None where there is none."""
    if not path.is_file():
        return None
    rows = []
    try:
        records = shards.ShardRecords(path, medium="latents", val_fraction=0.0)
        for index in range(len(records)):
            _, fields = records.fields(index)
            place = {"shard": name, "index": index, "sha256": hashlib.sha256(fields["latents"]).hexdigest()}
            rows.append(place | {key: value for key, value in fields.items() if key not in _ARRAYS})
    except UserError as error:
        logging.warning("%s is made again: %s", path, error)
        return None
    return rows


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _PLACE}
