"""Layers that the UNet and the VAE share: norms, convolutions, residual blocks, resampling, the timestep embedding.

Arrays are channels-last. A video and the images that are trained beside it (the joint batch of LaVie, sec. 3.2)
lie side by side on the frame axis, `(B, T+M, H, W, C)`: T video frames, then M images. `Frames(T, M)` says
which is which. What belongs to the whole video once and to every image once (time embedding, text) has an
*items* axis: item 0 is the video, when there is one, then come the M images.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from jaxtyping import Array, Float

from lavie_jax.models.placement import split_by_rows

# Jitted, it is traced once for each shape, and not for every layer of every call: flax asks it for its shape each time.
KERNEL_INIT = jax.jit(nn.linear.default_kernel_init, static_argnums=(1, 2))
CPU_PLACES = 64  # height x width up to which a 3x3 convolution is a matrix product on a CPU


class Frames(NamedTuple):
    """How the frame axis is made up: `video` frames of one clip (T), then `images` that stand alone (M)."""

    video: int
    images: int


def items_to_frames(x: Float[Array, "b items ..."], frames: Frames) -> Float[Array, "b frames ..."]:
    """What each item has, given to each of its frames: the video's to all T frames, every image's to itself."""
    if frames.video <= 1:
        return x
    video = jnp.broadcast_to(x[:, :1], (x.shape[0], frames.video, *x.shape[2:]))
    return jnp.concatenate([video, x[:, 1:]], axis=1) if frames.images else video


def on_video(f, x: Float[Array, "b frames h w c"], frames: Frames) -> Float[Array, "b frames h w c"]:
    """Apply `f` to the video frames and leave the images as they are: temporal layers see video frames only."""
    if frames.images == 0:
        return f(x)
    if frames.video == 0:
        return x
    return jnp.concatenate([f(x[:, : frames.video]), x[:, frames.video :]], axis=1)


class GroupNorm(nn.Module):
    """Group normalisation of (..., H, W, C), in float32.

    With `frames`, the input is (B, T+M, H, W, C), and the statistics are taken over all frames of the video
    together (as in the original) and over each image alone (a deviation: in the original the images enter the
    video's statistics). Without, every image has its own statistics.
    """

    groups: int
    eps: float
    frames: Frames | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def pooled_mean(values):  # (..., H, W, C) -> (..., 1, 1, C), every channel its group's mean
            # H and W first, with the channels side by side: groups of a few channels make slow loops of large arrays
            mean = reduce(values, "... h w c -> ... 1 1 c", "mean")
            groups = reduce(mean, "... (g c) -> ... g", "mean", g=self.groups)
            mean = repeat(groups, "... g -> ... (g c)", c=channels // self.groups)
            if self.frames is None or self.frames.video <= 1:
                return mean
            video = reduce(mean[:, : self.frames.video], "b t ... -> b 1 ...", "mean")
            return items_to_frames(jnp.concatenate([video, mean[:, self.frames.video :]], axis=1), self.frames)

        wide = x.astype(jnp.float32)
        mean = pooled_mean(wide)
        inverse = jax.lax.rsqrt(pooled_mean(jnp.square(wide - mean)) + self.eps)
        # (x - mean) * inverse * scale + bias, as one multiply-add over the large array
        gain = inverse * scale
        return (wide * gain + (bias - mean * gain)).astype(self.dtype)


def conv(
    features: int,
    kernel: tuple[int, ...],
    *,
    name: str,
    dtype: Any,
    stride: int = 1,
    padding: Any = None,
    zero: bool = False,
):
    """A convolution over the last axes before the channels, padded by k // 2 on both sides as in PyTorch.

    A kernel of two axes acts on every frame; one of three axes, (k, 1, 1), along the frames. `zero` starts it
    at zero.
    """
    return nn.Conv(
        features,
        kernel,
        strides=(stride,) * len(kernel),
        padding=padding if padding is not None else [(k // 2, k // 2) for k in kernel],
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero else KERNEL_INIT,
        conv_general_dilated=_convolve,
        name=name,
    )


def dense(
    features: int,
    *,
    name: str,
    dtype: Any,
    bias: bool = True,
    kernel_init: nn.initializers.Initializer = KERNEL_INIT,
) -> nn.Dense:
    """A linear layer of the last axis."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=kernel_init, dot_general=_multiply, name=name)


def _multiply(x: Float[Array, "n *places c"], kernel: Array, *dimensions: Any, **options: Any) -> Array:
    """`lax.dot_general`, its rows kept where they are."""
    return split_by_rows(jax.lax.dot_general(split_by_rows(x), kernel, *dimensions, **options))


def _convolve(x: Float[Array, "n *places c"], kernel: Array, strides: tuple[int, ...], padding: Any, **options):
    """`lax.conv_general_dilated`, or on a CPU, where frames are small, one product of all patches with the kernel.

    Between 3x4 and 8x8 places that is up to twice as fast (8 frames of 3x4, 1280 channels: 24 against 51 ms).
    """

    x = split_by_rows(x)

    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def product(x, kernel):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        height, width = x.shape[1] - 2, x.shape[2] - 2
        shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return jnp.concatenate(shifted, axis=-1) @ rearrange(kernel, "h w i o -> (h w i) o")

    if kernel.shape[:-2] != (3, 3) or set(strides) != {1} or math.prod(x.shape[1:-1]) > CPU_PLACES:
        return split_by_rows(convolution(x, kernel))
    return split_by_rows(jax.lax.platform_dependent(x, kernel, cpu=product, default=convolution))


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), the residual block of UNet and VAE.

    `kernels` are those of conv1 and conv2: (3, 3) acts per frame, (3, 1, 1) along the frames of a video. `temb`
    is the time embedding of every item, (B, items, E), or None; `caption` an embedding of its caption, (B, items, E),
    that scales and shifts what norm2 gives (nothing at first), or None. `zero` starts conv2 at zero, so that the block
    changes nothing at first.
    """

    features: int
    groups: int
    eps: float
    frames: Frames | None = None
    kernels: tuple[tuple[int, ...], tuple[int, ...]] = ((3, 3), (3, 3))
    zero: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, temb=None, caption=None):
        h = GroupNorm(self.groups, self.eps, self.frames, self.dtype, name="norm1")(x)
        h = conv(self.features, self.kernels[0], name="conv1", dtype=self.dtype)(nn.silu(h))
        if temb is not None:
            shift = dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))  # (B, items, C)
            h = h + items_to_frames(shift, self.frames)[:, :, None, None, :]
        h = GroupNorm(self.groups, self.eps, self.frames, self.dtype, name="norm2")(h)
        if caption is not None:
            zeros = nn.initializers.zeros
            project = dense(2 * self.features, dtype=self.dtype, kernel_init=zeros, name="caption_proj")
            said = items_to_frames(project(nn.silu(caption)), self.frames)[:, :, None, None, :]
            scale, shift = jnp.split(said, 2, axis=-1)
            h = h * (1 + scale) + shift
        h = conv(self.features, self.kernels[1], name="conv2", dtype=self.dtype, zero=self.zero)(nn.silu(h))
        if x.shape[-1] != self.features:
            x = conv(self.features, (1, 1), name="conv_shortcut", dtype=self.dtype)(x)
        return x + h


class Downsample(nn.Module):
    """Halve H and W by a strided 3x3 convolution.

    `padding` is (before, after): (1, 1) in the UNet, (0, 1), the far sides only, in the VAE.
    """

    features: int
    padding: tuple[int, int] = (1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return conv(self.features, (3, 3), name="conv", dtype=self.dtype, stride=2, padding=[self.padding] * 2)(x)


class Upsample(nn.Module):
    """Double H and W by repeating each pixel, cut to `size` (a skip connection's, when a side is odd), then a
    3x3 convolution.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, size: tuple[int, int] | None = None):
        x = repeat(x, "... h w c -> ... (h two) (w too) c", two=2, too=2)
        if size is not None:
            x = x[..., : size[0], : size[1], :]
        return conv(self.features, (3, 3), name="conv", dtype=self.dtype)(x)


class TimestepEmbedding(nn.Module):
    """Timesteps (B, items) -> (B, items, 4 * width): [cos, sin] features, then a two-layer SiLU MLP."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t):
        features = timestep_features(t, self.width).astype(self.dtype)
        h = dense(4 * self.width, dtype=self.dtype, name="linear_1")(features)
        return dense(4 * self.width, dtype=self.dtype, name="linear_2")(nn.silu(h))


def timestep_features(t: Array, width: int) -> Array:
    """(...) -> (..., width) float32: cosines, then sines, of t at geometric frequencies 1 .. 1/10000."""
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = t[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
