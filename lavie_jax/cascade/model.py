"""One stage's weights on the devices: text encoder, VAE and noise. The UNet is called in `denoising.py`.

Clips stay on the host and go through the networks in pieces of a fixed size, spread over the devices. A device's memory
therefore does not depend on the length of a clip.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8, UInt32

from lavie_jax import parallel
from lavie_jax.data import token_chunks, tokens
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.placement import split_by_rows
from lavie_jax.models.vae import VAE, VAE_PIXELS
from lavie_jax.program_cache import cached
from lavie_jax.samples.prompt_syntax import Parts
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import to_float
from lavie_jax.stages.conditioning import Prompts
from lavie_jax.weights import Part, Weights

LEAST_MEAN = 0.03  # of hidden states, relative to their standard deviation, for `weigh` to restore it
BATCH, ALL = PartitionSpec(parallel.BATCH_AXES), PartitionSpec()


class StageModel:
    """A stage's networks and their weights, replicated on every device or split over the mesh axis `fsdp`."""

    def __init__(self, weights: Weights, *, dtype: DTypeLike, mesh: Mesh):
        self.weights, self.dtype, self.mesh = weights, dtype, mesh
        self.stage = STAGES[weights.stage]
        self.tokenizer = tokens.load_tokenizer(weights.tokenizer_dir, weights.new_words)
        self.unet, self.text_encoder, self.vae = networks(weights, dtype)
        self.unet_params = self._place(weights.unet, self.unet.dtype)
        self.text_params = self._place(weights.text_encoder, self.text_encoder.dtype)
        self.vae_params = self._place(weights.vae, self.vae.dtype)

    def _place(self, part: Part, dtype: DTypeLike) -> dict:
        shardings = parallel.shardings(part.params, self.mesh)
        # Leaf by leaf: a small host cannot hold a copy of the whole model in another dtype.
        return jax.tree.map(lambda p, s: parallel.put(np.asarray(p).astype(dtype), s), part.params, shardings)

    @property
    def device(self) -> jax.Device:
        """The device of this process for computations that need only one."""
        return self.mesh.local_devices[0]

    def encode_text(self, texts: Sequence[str]) -> Prompts:
        """Returns the last hidden states of the text encoder for B texts.

        Each distinct text is encoded separately: they are few, and one compiled program serves any number of them.
        """
        ids, masks = tokens.tokenize_with_mask(self.tokenizer, list(dict.fromkeys(texts)))
        masks = masks if self.text_encoder.takes_mask else None
        hidden = [self._hidden(ids[i], None if masks is None else masks[i]) for i in range(len(ids))]
        rows = [list(dict.fromkeys(texts)).index(text) for text in texts]
        return Prompts(np.stack(hidden)[rows], None if masks is None else masks[rows])

    def encode_prompts(self, prompts: Sequence[Parts], *, several: bool = False) -> list[Prompts]:
        """Returns the weighted hidden states (L, D) of prompts that are mixed, and therefore have the same L.

        Args:
            prompts: what `Reading.parse` returns for each.
            several: whether words that exceed the text encoder's window are encoded in further ones, each by itself.
                L is then a multiple of the window's length. Shorter prompts get the windows of an empty prompt.
        """
        each = [token_chunks.tokenize_chunks(self.tokenizer, parts, several=several) for parts in prompts]
        (empty,) = token_chunks.tokenize_chunks(self.tokenizer, [[]], several=False)
        longest, masked = max(map(len, each)), self.text_encoder.takes_mask

        def encode(chunks: Sequence[token_chunks.Chunk]) -> Prompts:
            masks = [chunk.mask if masked else None for chunk in chunks]
            hidden = [weigh(self._hidden(c.ids, mask), c.weights, mask) for c, mask in zip(chunks, masks)]
            return Prompts(np.concatenate(hidden), np.concatenate(masks) if masked else None)

        return [encode([*chunks, *[empty] * (longest - len(chunks))]) for chunks in each]

    def _hidden(self, ids: Int32[np.ndarray, " l"], mask: Bool[np.ndarray, " l"] | None) -> Float[np.ndarray, "l d"]:
        """Returns the last hidden states of one text."""
        vocab_size = self.text_encoder.config.vocab_size
        if ids.max() >= vocab_size:
            raise UserError(
                f"{self.weights.path}: the tokenizer returns token {ids.max()}, but the text encoder has {vocab_size} "
                "tokens: one of them belongs to another model"
            )
        masks = None if mask is None else mask[None]
        return np.asarray(_encode_text(self.text_params, ids[None], masks, model=self.text_encoder))[0]

    def noise(self, seed: int, stream: int, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Returns standard normal noise for a clip, keyed by its seed."""
        return _normal(self._words(seed, stream), shape)[0]

    def frame_noise(
        self, seed: int, stream: int, frames: Sequence[int], shape: tuple[int, ...]
    ) -> Float[Array, "t ..."]:
        """Returns standard normal noise for the frames with these indices, keyed by seed, stream and index.

        A frame's noise therefore does not depend on the windows of a clip.
        """
        rows = self._words(seed, stream).repeat(len(frames), axis=0)
        return _normal(np.concatenate([rows, np.asarray(frames, np.uint32)[:, None]], axis=1), shape)

    def _words(self, seed: int, stream: int) -> UInt32[np.ndarray, "1 3"]:
        return np.array([[seed, self.stage.noise_number, stream]], np.uint32)

    def encode(
        self,
        frames: UInt8[np.ndarray, "t H W 3"] | Float[np.ndarray, "t H W 3"],
        noise: Float[np.ndarray, "t h w c"] | None = None,
    ) -> Float[np.ndarray, "t h w c"]:
        """Returns scaled latents: a sample of each frame's posterior, given standard normal `noise`, else its mode.

        Frames are pixels, or float32 in [-1, 1].
        """
        if noise is None:
            factor, (count, height, width) = self.vae.config.factor, frames.shape[:3]
            shape = count, height // factor, width // factor, self.vae.config.latent_channels
            noise = np.zeros(shape, np.float32)
        parts = [
            encode_rows(
                self.vae_params, self._spread(frames[part], size), self._spread(noise[part], size), vae=self.vae,
                mesh=self.mesh,
            )
            for part, size in pieces(*frames.shape[:3], devices=self.mesh.size)
        ]  # fmt: skip
        return np.concatenate([parallel.gather(part) for part in parts])[: len(frames)]

    def decode(self, latents: Float[np.ndarray, "t h w c"]) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Yields the frames of scaled latents in order, a few at a time. Raises UserError if latents are not finite."""
        if not np.isfinite(latents).all():
            raise UserError("a sample became infinite or NaN during denoising: use a smaller guidance scale")
        factor, (count, height, width) = self.vae.config.factor, latents.shape[:3]

        def started():
            for part, size in pieces(count, height * factor, width * factor, devices=self.mesh.size):
                frames = decode_rows(self.vae_params, self._spread(latents[part], size), vae=self.vae, mesh=self.mesh)
                yield frames, len(latents[part])

        for frames, wanted in one_ahead(started()):
            yield parallel.gather(frames)[:wanted]

    def _spread(self, rows: np.ndarray, size: int) -> Array:
        """Spreads rows over the devices, padded to `size` with the last one, so that all pieces use one program."""
        filled = np.concatenate([rows, rows[-1:].repeat(size - len(rows), axis=0)]) if len(rows) < size else rows
        return parallel.put(filled, parallel.batch_sharding(self.mesh))


def weigh(
    hidden: Float[np.ndarray, "l d"], weights: Float[np.ndarray, " l"], mask: Bool[np.ndarray, " l"] | None = None
) -> Float[np.ndarray, "l d"]:
    """Multiplies hidden states by the weights of their tokens, and restores their mean, as A1111 does.

    Padding does not count where it is masked. Some text encoders, such as those of the included models, have hidden
    states of mean 0 up to chance. Dividing by a mean that is chance would scale the prompt by any number, even a
    negative one, so theirs is not restored.
    """
    if (weights == 1).all():
        return hidden
    exact = hidden.astype(np.float32)  # numpy's sums of bfloat16 lose most of their terms
    weighted = exact * weights[:, None]
    real = slice(None) if mask is None else mask
    before, after = (float(x[real].mean(dtype=np.float64)) for x in (exact, weighted))
    if abs(before) >= LEAST_MEAN * exact[real].std() and before * after > 0:
        weighted *= np.float32(before / after)
    return weighted.astype(hidden.dtype)


def networks(weights: Weights, dtype: DTypeLike) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns a stage's UNet, text encoder and VAE, computing in `dtype` (the VAE in the stage's `vae_dtype`)."""
    vae_dtype = STAGES[weights.stage].vae_dtype or dtype
    return (
        registry.module(weights.unet.config, dtype),
        registry.module(weights.text_encoder.config, dtype),
        registry.module(weights.vae.config, vae_dtype),
    )


def pieces(count: int, height: int, width: int, *, devices: int) -> list[tuple[slice, int]]:
    """Splits `count` frames of `height` x `width` pixels into pieces that the devices' VAEs process at a time.

    Returns:
        (slice of the frames, number of rows with padding) of each piece.
    """
    each = max(1, min(math.ceil(count / devices), VAE_PIXELS // (height * width)))
    size = each * devices
    return [(slice(i, i + size), size) for i in range(0, count, size)]


def one_ahead(results: Iterator) -> Iterator:
    """Yields each result after requesting the next one, so that the devices compute while the host fetches."""
    previous = next(results, None)
    for result in results:
        yield previous
        previous = result
    if previous is not None:
        yield previous


def per_device(f, mesh: Mesh, *specs: PartitionSpec):
    """Runs `f` on every device with its own rows of the `BATCH` arguments, inside a jitted function.

    The compiler gathers weights that are split over `fsdp` layer by layer, where they are used.
    """
    if mesh.shape["fsdp"] == 1:
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)

    def partitioned(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.tree.map(split_by_rows, f(*args))

    return partitioned


# ---- compiled ----


@cached
@functools.partial(jax.jit, static_argnames="model")
def _encode_text(
    params: dict, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None, *, model: nn.Module
) -> Float[Array, "b l d"]:
    return model.apply({"params": params}, ids) if mask is None else model.apply({"params": params}, ids, mask)


def _normal(words: UInt32[np.ndarray, "b n"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Returns standard normal noise for each row of words.

    Generator, variant and seed are explicit: the user's configuration of jax must not change samples.
    """
    with jax.threefry_partitionable(True):
        return _threefry_normal(words, shape=shape)


@cached
@functools.partial(jax.jit, static_argnames="shape")
def _threefry_normal(words: UInt32[Array, "b n"], *, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    def one(words):
        """Returns the noise of one row."""
        # `jax.random.key` of a 32-bit seed, but independent of jax_random_seed_offset
        key = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(words[0]), words[0]]), impl="threefry2x32")
        for word in words[1:]:
            key = jax.random.fold_in(key, word)
        return jax.random.normal(key, shape, jnp.float32)

    return jax.vmap(one)(words)


@cached
@functools.partial(jax.jit, static_argnames=("vae", "mesh"))
def encode_rows(
    params: dict,
    frames: UInt8[Array, "n H W 3"] | Float[Array, "n H W 3"],
    noise: Float[Array, "n h w c"],
    *,
    vae: VAE,
    mesh: Mesh,
) -> Float[Array, "n h w c"]:
    """Returns the scaled latents of one piece of `StageModel.encode`; rows are split over the devices."""

    def encode(params, frames, noise):
        images = frames if jnp.issubdtype(frames.dtype, jnp.floating) else to_float(frames)
        mean, logvar = vae.apply({"params": params}, images, method="encode")
        return (mean + jnp.exp(0.5 * logvar) * noise) * vae.config.scaling_factor

    return per_device(encode, mesh, ALL, BATCH, BATCH)(params, frames, noise)


@cached
@functools.partial(jax.jit, static_argnames=("vae", "mesh"))
def decode_rows(params: dict, latents: Float[Array, "n h w c"], *, vae: VAE, mesh: Mesh) -> UInt8[Array, "n H W 3"]:
    """Returns the frames of one piece of `StageModel.decode`; rows are split over the devices."""

    def decode(params, latents):
        images = vae.apply({"params": params}, latents / vae.config.scaling_factor, method="decode")
        return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)

    return per_device(decode, mesh, ALL, BATCH)(params, latents)
