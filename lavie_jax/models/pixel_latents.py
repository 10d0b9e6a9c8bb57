"""Where the prediction of a UNet starts whose latents are folded pixels, those of a VAE without levels.

Such latents are known in part before the network runs: the low-resolution frame, enlarged, and the key frames around a
frame, moved to its time. The network predicts x0 as a correction of these.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lavie_jax.models import motion
from lavie_jax.models.layers import conv

CHANNELS = 3  # of a pixel
SPACING = 4  # frames from one key frame to the next
SOURCES = 4  # of a frame between: both key frames, moved and as they are
STANDING = -3.0  # logarithm of the first weight of a key frame as it is


def patch_size(channels: int) -> int:
    """Returns the side of the squares of pixels that latents of so many channels are."""
    return math.isqrt(channels // CHANNELS)


def enlarged(x: Float[Array, "b f h w c_in"], channels: int) -> Float[Array, "b f h w c_out"]:
    """Enlarges the low-resolution frames behind x_t by bicubic interpolation, as latents of `channels`."""
    low_res, p = x[..., channels:], patch_size(channels)
    batch, frames, height, width, _ = low_res.shape
    large = jax.image.resize(low_res, (batch, frames, height * p, width * p, CHANNELS), "cubic")
    return rearrange(large, "b f (h p) (w q) c -> b f h w (p q c)", p=p, q=p)


def sources(x: Float[Array, "b t h w c_in"], channels: int) -> Float[Array, "b t sources h w c"]:
    """Returns the key frames around each frame, first moved to its time and then as they are, as latents.

    Args:
        x: x_t and the condition of the interpolation stage behind it, from the first key frame on.
        channels: number of channels of x_t.
    """
    keys, p = jax.lax.stop_gradient(x[:, ::SPACING, :, :, channels:]), patch_size(channels)
    batch, count, height, width, _ = keys.shape
    frames = np.arange(x.shape[1])
    before, after = frames // SPACING, -(-frames // SPACING)
    standing = jnp.stack([keys[:, np.minimum(at, count - 1)] for at in (before, after)], axis=2)
    between = np.flatnonzero((before < after) & (after < count))
    if not len(between):
        return jnp.concatenate([standing, standing], axis=2)
    room = [(0, -side % (motion.MULTIPLE // p)) for side in (height, width)]
    pixels = jnp.pad(keys, ((0, 0), (0, 0), *room, (0, 0)), mode="edge")
    pixels = rearrange(pixels, "b k h w (p q c) -> b k (h p) (w q) c", p=p, q=p)
    pairs = [rearrange(pixels[:, at[between]], "b n ... -> (b n) ...") for at in (before, after)]
    times = jnp.tile(jnp.asarray(between % SPACING / SPACING, jnp.float32), batch)
    moved = jax.lax.map(lambda pair: motion.moved(*pair), (*pairs, times))
    moved = rearrange(moved, "(b n) s (h p) (w q) c -> b n s h w (p q c)", b=batch, p=p, q=p)
    moved = standing.at[:, between].set(moved[..., :height, :width, :])
    return jnp.concatenate([moved, standing], axis=2)


class SourceEmbedding(nn.Module):
    """Embeds the sources of each frame: (B, T, sources, H, W, C) -> (B, T, H, W, features).

    It sees the mean of the moved key frames, and how much each source differs from it.
    """

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, given: Float[Array, "b t sources h w c"]) -> Float[Array, "b t h w features"]:
        mean = given[:, :, :2].mean(2, keepdims=True)
        inputs = jnp.concatenate([mean, given - mean], axis=2).astype(self.dtype)
        inputs = rearrange(inputs, "b t s h w c -> b t h w (s c)")
        return conv(self.features, (3, 3), name="conv", dtype=self.dtype)(inputs)


class SourceMixture(nn.Module):
    """Mixes the sources of each pixel, by weights from the last features: at first a cross-fade of the moved frames.

    A key frame is its own source and is not changed.
    """

    @nn.compact
    def __call__(
        self,
        given: Float[Array, "b t sources h w c"],
        features: Float[Array, "b t h w d"],
        correction: Float[Array, "b t h w c"],
    ) -> Float[Array, "b t h w c"]:
        p = patch_size(given.shape[-1])
        frames = np.arange(given.shape[1])
        time = frames % SPACING / SPACING
        near = np.clip(np.stack([1 - time, time]), 1e-3, 1)
        first = np.concatenate([np.log(near), np.log(near) + STANDING]).astype(np.float32)
        logits = conv(SOURCES * p**2, (3, 3), name="conv", dtype=jnp.float32, zero=True)(features)
        logits = rearrange(logits, "b t h w (s n) -> s b t h w n", s=SOURCES)
        weights = jax.nn.softmax(logits + rearrange(first, "s t -> s 1 t 1 1 1"), axis=0)
        weights = repeat(weights, "s b t h w n -> s b t h w (n c)", c=CHANNELS)
        mixed = sum(weights[i] * given[:, :, i] for i in range(SOURCES))
        return mixed + jnp.where((time > 0)[:, None, None, None], correction, 0)
