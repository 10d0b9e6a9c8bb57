"""Layers that the UNet and the VAE share: norms, convolutions, residual blocks, resampling, the timestep embedding.

Arrays are channels-last. A video and the images trained jointly with it (LaVie, sec. 3.2) share the frame axis,
`(B, T+M, H, W, C)`: T video frames, then M images; `Frames(T, M)` holds the counts. Values that exist once for the
whole video and once for every image (time embedding, text) have an *items* axis: item 0 is the video, when there is
one, followed by the M images. Where the video's frames have texts of their own, every frame is an item (`per_frame`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from lavie_jax.models import precision
from lavie_jax.models.placement import split_by_rows

# Jitted, so that it is traced once per shape. Flax evaluates its shape for every layer in every call.
KERNEL_INIT = jax.jit(nn.linear.default_kernel_init, static_argnums=(1, 2))
CPU_PIXELS = 64  # height x width up to which a 3x3 convolution of wide features is a matrix product on a CPU
CPU_CHANNELS = 256  # channels from which features are wide


class Frames(NamedTuple):
    """Layout of the frame axis: `video` frames of one clip (T), then `images`, each independent (M)."""

    video: int
    images: int


def per_frame(x: Shaped[Array, "b items ..."], frames: Frames) -> bool:
    """Whether every frame is an item of its own, as where T <= 1."""
    return x.shape[1] == frames.video + frames.images


def items_to_frames(x: Float[Array, "b items ..."], frames: Frames) -> Float[Array, "b frames ..."]:
    """Broadcasts the values of items to their frames: the video's to all T frames, every image's to itself."""
    if per_frame(x, frames):
        return x
    video = jnp.broadcast_to(x[:, :1], (x.shape[0], frames.video, *x.shape[2:]))
    return jnp.concatenate([video, x[:, 1:]], axis=1) if frames.images else video


def on_video(
    f: Callable[[Array], Array], x: Float[Array, "b frames h w c"], frames: Frames
) -> Float[Array, "b frames h w c"]:
    """Applies `f` to the video frames and leaves the images unchanged: temporal layers see video frames only."""
    if frames.images == 0:
        return f(x)
    if frames.video == 0:
        return x
    return jnp.concatenate([f(x[:, : frames.video]), x[:, frames.video :]], axis=1)


class GroupNorm(nn.Module):
    """Group normalization of (..., H, W, C), in float32; nothing for 0 groups.

    With `frames`, the input is (B, T+M, H, W, C). The statistics are computed over all frames of the video together, as
    in the original, and over each image separately; in the original, images are part of the video's statistics. Without
    `frames`, every image has its own statistics.
    """

    groups: int
    eps: float
    frames: Frames | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... h w c"]) -> Float[Array, "... h w c"]:
        if not self.groups:
            return x
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def pooled_mean(values):
            """(..., H, W, C) -> (..., 1, 1, C): returns the mean of each channel's group."""
            # over H and W first, with contiguous channels: reducing groups of a few channels in a large array is slow
            mean = reduce(values, "... h w c -> ... 1 1 c", "mean")
            groups = reduce(mean, "... (g c) -> ... g", "mean", g=self.groups)
            mean = repeat(groups, "... g -> ... (g c)", c=channels // self.groups)
            if self.frames is None or self.frames.video <= 1:
                return mean
            video = reduce(mean[:, : self.frames.video], "b t ... -> b 1 ...", "mean")
            return items_to_frames(jnp.concatenate([video, mean[:, self.frames.video :]], axis=1), self.frames)

        x32 = x.astype(jnp.float32)
        mean = pooled_mean(x32)
        inverse = jax.lax.rsqrt(pooled_mean(jnp.square(x32 - mean)) + self.eps)
        # (x - mean) * inverse * scale + bias, as one multiply-add over the large array
        gain = inverse * scale
        return (x32 * gain + (bias - mean * gain)).astype(self.dtype)


def conv(
    features: int,
    kernel: tuple[int, ...],
    *,
    name: str,
    dtype: DTypeLike,
    stride: int = 1,
    padding: Any = None,
    zero: bool = False,
) -> nn.Conv:
    """Returns a convolution over the last axes before the channels, by default padded by k // 2 on both sides.

    A kernel with two axes acts on every frame, one with three axes, (k, 1, 1), along the frames. With `zero`, the
    kernel is initialized to zero.
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
    dtype: DTypeLike,
    bias: bool = True,
    kernel_init: nn.initializers.Initializer = KERNEL_INIT,
) -> nn.Dense:
    """Returns a linear layer over the last axis."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=kernel_init, dot_general=_multiply, name=name)


def _multiply(x: Float[Array, "n *pixels c"], kernel: Array, *dimensions: Any, **options: Any) -> Array:
    """Computes `lax.dot_general` with the rows sharded as the batch is."""
    return split_by_rows(precision.dot_general(split_by_rows(x), kernel, *dimensions, **options))


def _convolve(x: Float[Array, "n *pixels c"], kernel: Array, strides: tuple[int, ...], padding: Any, **options):
    """Computes `lax.conv_general_dilated`; on a CPU in another form where that is faster."""

    def convolution(x, kernel):
        return precision.conv_general_dilated(x, kernel, strides, padding, **options)

    def patches_times_kernel(x, kernel):
        """A 3x3 convolution as one matrix product of all patches."""
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        height, width = x.shape[1] - 2, x.shape[2] - 2
        shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        patches, columns = jnp.concatenate(shifted, axis=-1), rearrange(kernel, "h w i o -> (h w i) o")
        return jnp.matmul(patches, columns, preferred_element_type=precision.accumulator(x.dtype)).astype(x.dtype)

    def along_frames(x, kernel):
        """A convolution along the frames, with the pixels of a frame as one axis."""
        pixels, kernel = rearrange(x, "b t h w c -> b t (h w) c"), rearrange(kernel, "k 1 1 i o -> k 1 i o")
        axes = ("NHWC", "HWIO", "NHWC")
        y = precision.conv_general_dilated(pixels, kernel, (1, 1), [padding[0], (0, 0)], dimension_numbers=axes)
        return rearrange(y, "b t (h w) c -> b t h w c", h=x.shape[2])

    x, window = split_by_rows(x), kernel.shape[:-2]
    on_cpu = convolution
    if set(strides) == {1} and window[1:] == (1, 1):
        on_cpu = along_frames  # 3 to 7 times as fast as with three axes (benchmarks/cpu_forms.py)
    elif set(strides) == {1} and window == (3, 3):
        # 8 frames of 3x4 pixels, 1280 channels: 16 instead of 55 ms; 32 of 4x4, 96 channels: 1.3 instead of 0.7 ms
        small, wide = math.prod(x.shape[1:-1]) <= CPU_PIXELS, x.shape[-1] >= CPU_CHANNELS
        on_cpu = patches_times_kernel if small and wide else convolution
    if on_cpu is convolution:
        return split_by_rows(convolution(x, kernel))
    return split_by_rows(jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=convolution))


class ResnetBlock(nn.Module):
    """The residual block of UNet and VAE: x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))).

    It is called with the time embedding of every item or None, and an embedding of its caption, or None, that scales
    and shifts the output of norm2 (by zero at initialization).

    Attributes:
        kernels: of conv1 and conv2. (3, 3) acts per frame, (3, 1, 1) along the frames of a video.
        zero: whether conv2 starts at zero, so that the block is the identity at initialization.
    """

    features: int
    groups: int
    eps: float
    frames: Frames | None = None
    kernels: tuple[tuple[int, ...], tuple[int, ...]] = ((3, 3), (3, 3))
    zero: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... h w c"],
        temb: Float[Array, "b items e"] | None = None,
        caption: Float[Array, "b items e"] | None = None,
    ) -> Float[Array, "... h w d"]:
        h = GroupNorm(self.groups, self.eps, self.frames, self.dtype, name="norm1")(x)
        h = conv(self.features, self.kernels[0], name="conv1", dtype=self.dtype)(nn.silu(h))
        if temb is not None:
            shift = dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(temb))  # (B, items, C)
            h = h + items_to_frames(shift, self.frames)[:, :, None, None, :]
        h = GroupNorm(self.groups, self.eps, self.frames, self.dtype, name="norm2")(h)
        if caption is not None:
            zeros = nn.initializers.zeros
            project = dense(2 * self.features, dtype=self.dtype, kernel_init=zeros, name="caption_proj")
            modulation = items_to_frames(project(nn.silu(caption)), self.frames)[:, :, None, None, :]
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = h * (1 + scale) + shift
        h = conv(self.features, self.kernels[1], name="conv2", dtype=self.dtype, zero=self.zero)(nn.silu(h))
        if x.shape[-1] != self.features:
            x = conv(self.features, (1, 1), name="conv_shortcut", dtype=self.dtype)(x)
        return x + h


class Downsample(nn.Module):
    """Halves H and W by a strided 3x3 convolution.

    `padding` is (before, after): (1, 1) in the UNet; (0, 1) in the VAE, at the bottom and right only.
    """

    features: int
    padding: tuple[int, int] = (1, 1)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... H W c"]) -> Float[Array, "... h w d"]:
        return conv(self.features, (3, 3), name="conv", dtype=self.dtype, stride=2, padding=[self.padding] * 2)(x)


class Upsample(nn.Module):
    """Doubles H and W by repeating each pixel, then applies a 3x3 convolution.

    `size` crops the result of the first step to that of the skip connection, where a side was odd.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... h w c"], size: tuple[int, int] | None = None):
        x = repeat(x, "... h w c -> ... (h two) (w too) c", two=2, too=2)
        if size is not None:
            x = x[..., : size[0], : size[1], :]
        return conv(self.features, (3, 3), name="conv", dtype=self.dtype)(x)


class TimestepEmbedding(nn.Module):
    """Embeds timesteps (B, items) as (B, items, 4 * width): [cos, sin] features, then a two-layer SiLU MLP."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, t: Array) -> Float[Array, "b items e"]:
        features = timestep_features(t, self.width).astype(self.dtype)
        h = dense(4 * self.width, dtype=self.dtype, name="linear_1")(features)
        return dense(4 * self.width, dtype=self.dtype, name="linear_2")(nn.silu(h))


def timestep_features(t: Array, width: int) -> Array:
    """Returns cosines, then sines, of t at geometric frequencies 1 .. 1/10000: (...) -> (..., width) float32."""
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = t[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
