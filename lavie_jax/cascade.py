"""Text to video: noise, denoised step by step under a prompt, then decoded to frames (LaVie, sec. 3.1).

`Cascade` is what a user holds, `StageModel` one stage's weights on the devices with its compiled functions.
What goes into a UNet besides noise is in `stages.py`, the maths of a step in `diffusion/`; files are made in
`samples/outputs.py`.

A sample depends on its prompt, its seed and the settings alone: its noise is keyed by the seed, and every
device works on samples of its own, so neither the batch nor the number of devices shows in it.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8, UInt32
from tqdm.auto import tqdm

import lavie_jax
from lavie_jax import parallel
from lavie_jax.data import tokens
from lavie_jax.diffusion import Sampler, make_sampler
from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText
from lavie_jax.models.unet import UNet
from lavie_jax.models.vae import VAE
from lavie_jax.samples.prompts import check_seed
from lavie_jax.samples.settings import Settings
from lavie_jax.stages import STAGES, Condition, denoiser
from lavie_jax.weights import Part, Weights, load_folder

SHIPPED = Path(__file__).parent / "assets" / "base"
DECODED_PIXELS = 4 * 320 * 512  # that a device's VAE makes at a time: 4 frames of the base stage

BATCH, ALL = PartitionSpec(parallel.BATCH_AXES), PartitionSpec()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to make."""

    prompt: str
    seed: int
    negative_prompt: str


def load(
    path: str | os.PathLike = SHIPPED,
    *,
    dtype: DTypeLike | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> "Cascade":
    """The model in a weights folder, or in `base/` of a cascade's folder, on the devices and ready to sample.

    Args:
        path: the folder; without one, the small model that is shipped.
        dtype: of parameters and computation. Default: bfloat16 on accelerators, float32 on CPU, where
            bfloat16 is slower.
        devices: to split batches over. Default: all of this process.

    Raises:
        UserError: the folder is missing, incomplete, damaged or of another stage.
    """
    return Cascade.of(load_folder(base_folder(path), stage="base"), dtype=dtype, devices=devices)


def base_folder(path: str | os.PathLike) -> Path:
    """The base stage's own folder: `path`, or `path/base` where `path` holds a cascade."""
    path = Path(path)
    if path == SHIPPED and not path.exists():
        raise UserError(f"no model is shipped in {path} yet: give a weights folder with --weights")
    nested = path / "base"
    return nested if not (path / "config.json").exists() and nested.is_dir() else path


def sampler_for(weights: Weights, settings: Settings) -> Sampler:
    """The sampler that `settings` name. UserError when the model of `weights` cannot be sampled with them."""
    settings.check_sides(weights.vae.config.factor)
    return make_sampler(settings.sampler, settings.steps, weights.schedule)


class Cascade:
    """Prompts to videos; so far through the base stage."""

    def __init__(self, base: "StageModel"):
        self.base = base

    @classmethod
    def of(
        cls, base: Weights, *, dtype: DTypeLike | None = None, devices: Sequence[jax.Device] | None = None
    ) -> "Cascade":
        """From weights that are loaded; `dtype` and `devices` as in `load`."""
        devices = jax.local_devices() if devices is None else list(devices)
        dtype = dtype or (jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16)
        return cls(StageModel(base, dtype=dtype, devices=devices))

    def made_with(self) -> dict[str, str]:
        """Versions, precision and hardware, for the record."""
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
        return {
            "lavie_jax": lavie_jax.__version__,
            "python": platform.python_version(),
            **versions,
            "dtype": jnp.dtype(self.base.dtype).name,
            "device": self.base.mesh.devices.flat[0].device_kind,
        }

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> UInt8[np.ndarray, "b t H W 3"]:
        """Videos, (B, T, H, W, 3) uint8. What is not given is as in the weights' config.json.

        `prompt`, `seed` and `negative_prompt` are one for all, or one for each of B samples. `frames` = 1
        makes images, by the joint model's image path, without temporal attention. `batch_size` samples are
        denoised together (see `samples`).

        Raises:
            UserError: a setting that is out of range or that this model cannot make; lists of different lengths.
        """
        given = dict(frames=frames, height=height, width=width, sampler=sampler, steps=steps, guidance=guidance)
        settings = Settings.make(self.base.weights.sampling, given)
        negative = settings.negative_prompt if negative_prompt is None else negative_prompt
        requests = [
            Request(prompt=text, seed=check_seed(number), negative_prompt=other)
            for text, number, other in _aligned(prompt=prompt, seed=seed, negative_prompt=negative)
        ]
        for line in text_warnings(self.base.tokenizer, [r.prompt + settings.prompt_suffix for r in requests]):
            logging.warning("%s", line)
        return np.stack(list(self.samples(requests, settings, batch_size=batch_size, progress=progress)))

    def samples(
        self,
        requests: Sequence[Request],
        settings: Settings,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        """The requested videos in order, each batch as soon as it is made.

        `batch_size` is rounded up to a multiple of the devices; the default is one sample a device. A last
        batch that is not full is filled up, so that one program serves all. `progress` shows a bar of
        denoising steps.
        """
        model, ways = self.base, self.base.mesh.size
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size: at least 1 is needed, given {batch_size}")
        sampler = sampler_for(model.weights, settings)
        size = min(math.ceil(n / ways) * ways for n in (batch_size or ways, max(len(requests), 1)))
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        with tqdm(total=len(batches) * sampler.steps, unit="step", desc="compiling", disable=not progress) as bar:

            def on_step():
                bar.set_description("denoising", refresh=False)
                bar.update()

            for batch in batches:
                filled = [*batch, *[batch[-1]] * (size - len(batch))]
                with _memory_in_words():
                    videos = model.decode(model.denoise(filled, settings, sampler, on_step))
                yield from videos[: len(batch)]


class StageModel:
    """One stage's weights, replicated on the devices, and what is compiled from them."""

    def __init__(self, weights: Weights, *, dtype: DTypeLike, devices: Sequence[jax.Device]):
        self.weights, self.dtype = weights, dtype
        self.mesh = parallel.make_mesh(devices=devices)
        self.tokenizer = tokens.load_tokenizer(weights.tokenizer_dir)
        vae_dtype = jnp.float32 if weights.stage == "vsr" else dtype  # the x4 VAE overflows in half precision
        self.unet = UNet(weights.unet.config, dtype)
        self.text_encoder = CLIPText(weights.text_encoder.config, dtype)
        self.vae = VAE(weights.vae.config, vae_dtype)
        self.unet_params = self._place(weights.unet, dtype)
        self.text_params = self._place(weights.text_encoder, dtype)
        self.vae_params = self._place(weights.vae, vae_dtype)

    def _place(self, part: Part, dtype: DTypeLike) -> dict:
        everywhere = parallel.replicated(self.mesh)
        # Leaf by leaf: a copy of the whole model in another dtype would not fit a small host.
        return jax.tree.map(lambda p: parallel.put(np.asarray(p).astype(dtype), everywhere), part.params)

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "b l d"]:
        """Last hidden states of the text encoder.

        Each different text goes through it alone: they are few, and one program serves any number of them.
        """
        ids = dict(zip(texts, tokens.tokenize(self.tokenizer, texts)))
        known, largest = self.text_encoder.config.vocab_size, max(row.max() for row in ids.values())
        if largest >= known:
            raise UserError(
                f"{self.weights.path}: its tokenizer gives token {largest}, its text encoder has {known} tokens: they "
                "do not belong together"
            )
        encoded = {t: _encode(self.text_params, row[None], model=self.text_encoder) for t, row in ids.items()}
        return np.concatenate([np.asarray(encoded[text]) for text in texts])

    def noise(self, seeds: Sequence[int], stream: int, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
        """Standard normal noise, (B, *shape), each sample's from its own seed.

        Stream 0 is what denoising starts from, stream i + 1 is for step i. B is a multiple of the devices.
        """
        seeds = parallel.put(np.asarray(seeds, np.uint32), parallel.batch_sharding(self.mesh))
        number = list(STAGES).index(self.weights.stage)
        return _noise(seeds, number, stream, shape=shape, mesh=self.mesh)

    def denoise(
        self,
        requests: Sequence[Request],
        settings: Settings,
        sampler: Sampler,
        on_step: Callable[[], None] = lambda: None,
    ) -> Float[Array, "b t h w c"]:
        """Scaled latents of the requests, whose number is a multiple of the devices.

        `on_step` is called when a step is done; the devices are at work on the next one already.
        """
        factor, channels = self.vae.config.factor, self.unet.config.out_channels
        shape = (settings.frames, settings.height // factor, settings.width // factor, channels)
        seeds = [r.seed for r in requests]
        batch = parallel.batch_sharding(self.mesh)
        text = parallel.put(self.encode_text([r.prompt + settings.prompt_suffix for r in requests]), batch)
        null_text = parallel.put(self.encode_text([r.negative_prompt for r in requests]), batch)
        state = sampler.init(self.noise(seeds, 0, shape))
        before = None
        for i in range(sampler.steps):
            noise = self.noise(seeds, i + 1, shape) if sampler.needs_noise else None
            state = _step(
                self.unet_params, state, i, text, null_text, Condition(), noise, unet=self.unet, sampler=sampler,
                guidance=float(settings.guidance), image=settings.frames == 1, mesh=self.mesh,
            )  # fmt: skip
            if before is not None:
                jax.block_until_ready(before)
                on_step()
            before = state["x"]
        jax.block_until_ready(before)
        on_step()
        return before

    def decode(self, latents: Float[Array, "b t h w c"]) -> UInt8[np.ndarray, "b t H W 3"]:
        """Frames of scaled latents, a few at a time on each device. UserError when the latents are not finite."""
        if not bool(jnp.isfinite(latents).all()):
            raise UserError("a sample became infinite or NaN while it was denoised: use a smaller guidance")
        batch, frames, height, width, _ = latents.shape
        pixels = batch // self.mesh.size * height * width * self.vae.config.factor**2
        size = max(1, min(frames, DECODED_PIXELS // pixels))
        padding = -frames % size
        latents = jnp.pad(latents, [(0, 0), (0, padding), (0, 0), (0, 0), (0, 0)], mode="edge")
        parts = [
            np.asarray(_decode(self.vae_params, latents[:, i : i + size], vae=self.vae, mesh=self.mesh))
            for i in range(0, frames, size)
        ]
        return np.concatenate(parts, axis=1)[:, :frames]


@contextlib.contextmanager
def _memory_in_words():
    """A device that is out of memory is for the user to know, not a fault of the program."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "the device has too little memory for this: take a smaller batch size, fewer frames, or a smaller height "
            "and width"
        ) from error


def text_warnings(tokenizer, texts: Iterable[str]) -> list[str]:
    """Lines about what of `texts` the model will not see.

    These are ends of texts beyond its context, and words that a small model does not know.
    """
    texts = dict.fromkeys(texts)
    length = tokens.context_length(tokenizer)
    lines = [
        f"a prompt is longer than the model's {length} tokens, its end is cut: {lost!r}"
        for text in texts
        if (lost := tokens.lost_text(tokenizer, text))
    ]
    if unknown := dict.fromkeys(word for text in texts for word in tokens.unknown_words(tokenizer, text)):
        known = ", ".join(tokens.known_words(tokenizer))
        lines.append(f"this small model does not know, and leaves out: {', '.join(unknown)}. It knows: {known}")
    return lines


def _aligned(**values: object) -> Iterable[tuple]:
    """One tuple for each sample: lists as they are, single values repeated."""
    many = {n: v for n, v in values.items() if isinstance(v, Sequence | np.ndarray) and not isinstance(v, str)}
    lists = {n: list(v) for n, v in many.items()}
    lengths = {n: len(v) for n, v in lists.items()}
    count = max(lengths.values(), default=1)
    if 0 in lengths.values() or any(n != count for n in lengths.values()):
        raise UserError(f"lists of one length, at least 1, are needed; given {lengths}")
    return zip(*(lists.get(n, [v] * count) for n, v in values.items()))


# ---- compiled: every device runs the same program on its own samples ----


def _per_device(f, mesh: Mesh, *specs: PartitionSpec):
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)


@functools.partial(jax.jit, static_argnames="model")
def _encode(params: dict, ids: Int[Array, "b l"], *, model: CLIPText) -> Float[Array, "b l d"]:
    return model.apply({"params": params}, ids)


@functools.partial(jax.jit, static_argnames=("shape", "mesh"))
def _noise(
    seeds: UInt32[Array, " b"], stage: Int[Array, ""], stream: Int[Array, ""], *, shape: tuple[int, ...], mesh: Mesh
) -> Float[Array, "b ..."]:
    def one(seed):
        # The generator is named, because a user's jax configuration must not change a seed's sample.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stage), stream)
        return jax.random.normal(key, shape, jnp.float32)

    return _per_device(jax.vmap(one), mesh, BATCH)(seeds)


@functools.partial(jax.jit, static_argnames=("unet", "sampler", "guidance", "image", "mesh"))
def _step(
    params: dict,
    state: Mapping[str, Array],
    i: Int[Array, ""],
    text: Float[Array, "b l d"],
    null_text: Float[Array, "b l d"],
    condition: Condition,
    noise: Float[Array, "b ..."] | None,
    *,
    unet: UNet,
    sampler: Sampler,
    guidance: float,
    image: bool,
    mesh: Mesh,
) -> dict[str, Array]:
    def step(params, state, i, text, null_text, condition, noise):
        denoise = denoiser(unet, params, text, null_text, condition, guidance=guidance, image=image)
        return sampler.step(state, i, denoise, noise)

    specs = (ALL, BATCH, ALL, BATCH, BATCH, BATCH, BATCH)
    return _per_device(step, mesh, *specs)(params, state, i, text, null_text, condition, noise)


@functools.partial(jax.jit, static_argnames=("vae", "mesh"))
def _decode(params: dict, latents: Float[Array, "b t h w c"], *, vae: VAE, mesh: Mesh) -> UInt8[Array, "b t H W 3"]:
    def decode(params, latents):
        images = vae.apply({"params": params}, latents / vae.config.scaling_factor, method="decode")
        return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)

    return _per_device(decode, mesh, ALL, BATCH)(params, latents)
