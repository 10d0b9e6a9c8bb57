"""Extensions of LaVie's UNet with which small models, trained from scratch, learn much faster.

Each one is a field of `UNetConfig`, is off in every released model, and starts at zero, so that it changes nothing at
initialization. The UNet calls the functions at the top of this file; the modules behind them follow.
"""

import itertools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lavie_jax.models import pixel_latents
from lavie_jax.models.layers import Frames, conv, dense, items_to_frames, on_video, per_frame, timestep_features
from lavie_jax.models.precision import dot_general
from lavie_jax.models.unet_config import UNetConfig

BETWEEN_KEYS = (-1, 0, 1, 2)  # frame offsets; the mean of their key frames is the cross-fade between two key frames
CUBIC = 2  # pixels on each side that bicubic interpolation reads


def caption_embedding(
    config: UNetConfig,
    text: Float[Array, "b items l d"],
    mask: Bool[Array, "b items l"] | None,
    temb: Float[Array, "b items e"],
    dtype: DTypeLike,
) -> Float[Array, "b items e"] | None:
    """`caption_modulation`: returns what scales and shifts the features of every residual block."""
    if not config.caption_modulation:
        return None
    return CaptionEmbedding(dtype, name="caption_embedding")(text, mask, temb)


def add_motion(
    config: UNetConfig,
    video: Float[Array, "b t h w c"],
    text: Float[Array, "b items l d"],
    mask: Bool[Array, "b items l"] | None,
    frames: Frames,
    dtype: DTypeLike,
) -> Float[Array, "b t h w c"]:
    """`motion_embedding`: adds the embedding of caption, time and position before temporal attention."""
    if not config.motion_embedding:
        return video
    embedding = MotionEmbedding(dtype, name="motion_embedding_temporal")
    items = slice(frames.video) if frames.video > 1 and per_frame(text, frames) else 0
    mask = None if mask is None else mask[:, items]
    return video + embedding(text[:, items], mask, video.shape[1:4], video.shape[-1])


def velocity(
    config: UNetConfig,
    text: Float[Array, "b items l d"],
    mask: Bool[Array, "b items l"] | None,
    frames: Frames,
    dtype: DTypeLike,
) -> Float[Array, "b moved 2"] | None:
    """`known_frames_around`: returns by how much the caption moves known frames, see `Velocity`."""
    if not (config.known_frames_around and frames.video):
        return None
    items = slice(frames.video) if per_frame(text, frames) else slice(1)
    return Velocity(dtype, name="velocity_temporal")(text[:, items], None if mask is None else mask[:, items])


def add_frames_around(
    config: UNetConfig,
    h: Float[Array, "b frames h w c"],
    x: Float[Array, "b frames h w c_in"],
    velocity: Float[Array, "b moved 2"] | None,
    frames: Frames,
    dtype: DTypeLike,
) -> Float[Array, "b frames h w c"]:
    """`key_frames_around`, `known_frames_around`: adds the given frames on both sides to the first features."""
    if config.key_frames_around:
        keys = KeyFrameEmbedding(dtype, name="key_frame_embedding_temporal")
        h = on_video(lambda y: y + keys(x[:, : frames.video], config.out_channels, y.shape[-1]), h, frames)
    if config.known_frames_around:
        known = KnownFrameEmbedding(dtype, name="known_frame_embedding_temporal")
        h = on_video(lambda y: y + known(x[:, : frames.video], velocity, config.out_channels, y.shape[-1]), h, frames)
    return h


def add_condition(
    config: UNetConfig,
    prediction: Float[Array, "b frames h w c_out"],
    x: Float[Array, "b frames h w c_in"],
    velocity: Float[Array, "b moved 2"] | None,
    temb: Float[Array, "b items e"],
    frames: Frames,
) -> Float[Array, "b frames h w c_out"]:
    """`low_res_skip`, `..._frames_around`: adds a linear map of the condition to the prediction; `enlarge_low_res`:
    adds the low-resolution frame."""
    if config.enlarge_low_res:
        prediction = prediction + pixel_latents.enlarged(x, config.out_channels)
    if not (config.low_res_skip or config.key_frames_around or config.known_frames_around):
        return prediction
    frame_temb, video = items_to_frames(temb, frames), slice(frames.video)
    if config.low_res_skip:
        skip = ConditionSkip(reach=CUBIC, name="low_res_skip")
        prediction = prediction + skip(x, frame_temb, config.out_channels)
    if config.key_frames_around:
        skip = ConditionSkip(frames=BETWEEN_KEYS, name="key_frame_skip_temporal")
        prediction = on_video(
            lambda y: y + skip(x[:, video], frame_temb[:, video], config.out_channels), prediction, frames
        )
    if config.known_frames_around:
        known = KnownFrameSkip(name="known_frame_skip_temporal")
        prediction = on_video(
            lambda y: y + known(x[:, video], velocity, frame_temb[:, video], config.out_channels), prediction, frames
        )
    return prediction


def max_over_words(x: Float[Array, "*b l c"], mask: Bool[Array, "*b l"] | None) -> Float[Array, "*b c"]:
    """Takes the maximum over the words in each channel, so that one word of many is not averaged away.

    Masked words do not count; without any word the result is 0.
    """
    if mask is None:
        return x.max(axis=-2)
    highest = jnp.where(mask[..., None], x, jnp.finfo(x.dtype).min).max(axis=-2)
    return jnp.where(mask.any(axis=-1)[..., None], highest, 0)


class MotionEmbedding(nn.Module):
    """Product of embeddings of the caption, the time and the position in the frame, (B, T, H, W, C).

    Attention with relative positions cannot tell apart frames that look alike, and at high noise levels, where the
    motion of a clip is decided, all frames do. A word such as "left" determines a position only together with the
    time; no two of the three factors carry information, so a network of sums gets no gradient at first. Hence
    the product. AnimateDiff (arXiv 2307.04725) and Stable Video Diffusion (arXiv 2311.15127) number the frames, video
    transformers their positions too (Latte, arXiv 2401.03048); LaVie does neither. Every axis runs from 0 to `SPAN`
    whatever its length, so that what was learned on short or small clips carries over to longer and larger ones.
    """

    SPAN: ClassVar[float] = 16.0
    GAIN: ClassVar[float] = 30.0  # scales a product of three small numbers to the size of the features it is added to

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        text: Float[Array, "b *t l d"],
        mask: Bool[Array, "b *t l"] | None,
        size: tuple[int, int, int],
        channels: int,
    ) -> Float[Array, "b t h w c"]:
        def dense(name, init=nn.linear.default_kernel_init):
            return nn.Dense(channels, dtype=self.dtype, kernel_init=init, dot_general=dot_general, name=name)

        def positions(length):
            return timestep_features(jnp.linspace(0.0, self.SPAN, length), channels).astype(self.dtype)

        caption = max_over_words(dense("text")(text), mask)  # (B, C), or (B, T, C) where frames have their own texts
        caption = rearrange(caption, "b c -> b 1 1 1 c" if caption.ndim == 2 else "b t c -> b t 1 1 c")
        time = rearrange(dense("time")(positions(size[0])), "t c -> t 1 1 c")
        rows, columns = dense("row")(positions(size[1])), dense("column")(positions(size[2]))
        position = rearrange(rows, "h c -> h 1 c") + columns
        return dense("out", nn.initializers.zeros)(self.GAIN * caption * time * position)


class CaptionEmbedding(nn.Module):
    """Embedding of the whole caption at this noise level: (B, items, L, D) and (B, items, E) -> (B, items, E).

    Every residual block scales and shifts its features by it, as class-conditional diffusion models do with their
    class (arXiv 2105.05233, sec. 3). The outline of a shape is a product of the caption and the position within the
    shape, which cross-attention takes long to learn.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, text: Float[Array, "b items l d"], mask: Bool[Array, "b items l"] | None, temb: Float[Array, "b items e"]
    ) -> Float[Array, "b items e"]:
        width = temb.shape[-1]
        caption = max_over_words(dense(width, dtype=self.dtype, name="linear_1")(text), mask)
        return temb + dense(width, dtype=self.dtype, name="linear_2")(nn.silu(caption))


def conditions_around(
    x: Float[Array, "b f h w c_in"], width: int, *, frames: tuple[int, ...] = (0,), reach: int = 0
) -> Float[Array, "b f h w c"]:
    """Gathers the channels of x after the first `width` from each pixel's neighborhood; borders are repeated.

    Args:
        x: x_t with the condition behind it.
        width: number of channels of x_t.
        frames: offsets in time.
        reach: number of pixels on each side, in height and width.
    """
    condition, size = x[..., width:], x.shape[1:4]
    far = max(abs(offset) for offset in frames)
    padded = jnp.pad(condition, ((0, 0), (far, far), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = itertools.product([far + offset for offset in frames], *[range(2 * reach + 1)] * 2)
    shifted = [padded[:, i : i + size[0], j : j + size[1], k : k + size[2]] for i, j, k in corners]
    return jnp.concatenate(shifted, axis=-1)


class KeyFrameEmbedding(nn.Module):
    """Embeds the key frames on both sides of each frame: (B, T, H, W, C_in) -> (B, T, H, W, features).

    The interpolation stage gives each frame its nearest key frame; the other one reaches it only through
    temporal attention, which is spatially coarse and takes long to learn where to look. With both, and the position
    between them from which of `BETWEEN_KEYS` are equal, interpolation becomes a matter of convolutions.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c_in"], width: int, features: int) -> Float[Array, "b t h w features"]:
        keys = conditions_around(x, width, frames=BETWEEN_KEYS).astype(self.dtype)
        return conv(features, (3, 3), name="conv", dtype=self.dtype, zero=True)(keys)


class ConditionSkip(nn.Module):
    """A linear prediction from x_t and its condition: (B, F, H, W, C_in) -> (B, F, H, W, C_out).

    Key frames, or low-resolution frames, determine most of the output, but norms and gates pass an image through only
    approximately, which shows in plain backgrounds. So the network starts from this map and adds a correction. The map
    depends on the noise level, since the share of x0 in a v-prediction grows with the noise. EDM (arXiv 2206.00364,
    sec. 5) has such a path for x_t only. The map is applied in float32 whatever the dtype of the network; its weights
    have the dtype of all parameters, bfloat16 when an accelerator samples. It reads x_t at each pixel, and the
    condition in the neighborhood that `conditions_around` gathers.
    """

    frames: tuple[int, ...] = (0,)
    reach: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b f h w c_in"], temb: Float[Array, "b f e"], features: int
    ) -> Float[Array, "b f h w features"]:
        x = x.astype(jnp.float32)
        around = conditions_around(x, features, frames=self.frames, reach=self.reach)
        around = around / (2 * self.reach + 1)  # neighbors are correlated, and Adam moves all their weights together
        return noise_level_map(jnp.concatenate([x[..., :features], around], axis=-1), temb, features)


class Velocity(nn.Module):
    """Rows and columns, in sides of a frame, by which a caption moves the content of a clip: (B, items, L, D) -> 2.

    Given a picture, "moving left" says where its content is in any other frame: at the picture's position, moved in
    proportion to the time between them. Convolutions and attention learn such a product of caption, time and position
    slowly (see `MotionEmbedding`), and a shift at once, as motion compensation in video coding does.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, text: Float[Array, "b items l d"], mask: Bool[Array, "b items l"] | None
    ) -> Float[Array, "b items 2"]:
        words = max_over_words(dense(text.shape[-1], dtype=self.dtype, name="text")(text), mask)
        out = nn.Dense(2, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="out")
        return out(words.astype(jnp.float32))


def shifted(
    x: Float[Array, "b t h w c"], rows: Float[Array, "b t"], columns: Float[Array, "b t"]
) -> Float[Array, "b t h w c"]:
    """Moves frames by fractions of pixels, down and to the right, by linear interpolation; borders are repeated."""

    def weights(shift: Array, size: int) -> Float[Array, "b t size size"]:
        source = jnp.clip(jnp.arange(size) - shift[..., None], 0, size - 1)
        return jnp.maximum(1 - jnp.abs(source[..., None] - jnp.arange(size)), 0).astype(x.dtype)

    moved = jnp.einsum("btij,btjwc->btiwc", weights(rows, x.shape[2]), x)
    return jnp.einsum("btij,bthjc->bthic", weights(columns, x.shape[3]), moved)


def known_frames_around(
    x: Float[Array, "b t h w c_in"], velocity: Float[Array, "b items 2"], width: int
) -> tuple[Bool[Array, "b t"], Float[Array, "b t h w c"]]:
    """Returns which frames are known, and the nearest known frame on either side of each frame, itself included.

    A side has the latents of that frame, moved by the velocity, 1, and its distance in clips; where there is none, it
    has zeros.

    Args:
        x: x_t with the condition of the prediction stage behind it: the mask, then the masked latents.
        velocity: sides per clip, of the clip or of each frame.
        width: number of channels of x_t.
    """
    known, latents, count = x[:, :, 0, 0, width] < 0.5, x[..., width + 1 :], x.shape[1]
    index = jnp.arange(count)
    before = jax.lax.cummax(jnp.where(known, index, -1), axis=1)
    after = jax.lax.cummin(jnp.where(known, index, count), axis=1, reverse=True)

    def side(source: Array) -> Array:
        """Returns the latents of the frames `source`, 1, and the distance to them; zeros where there is none."""
        there = ((source >= 0) & (source < count))[:, :, None, None, None]
        picked = jnp.take_along_axis(latents, jnp.clip(source, 0, count - 1)[:, :, None, None, None], axis=1)
        later = (index - source) / count
        sides = velocity * later[..., None] * jnp.asarray(x.shape[2:4])
        picked = shifted(picked, sides[..., 0], sides[..., 1])
        flat = jnp.ones_like(picked[..., :1])
        distance = jnp.abs(later)[:, :, None, None, None] * flat
        return jnp.where(there, jnp.concatenate([picked, flat, distance], axis=-1), 0)

    return known, jnp.concatenate([side(before), side(after)], axis=-1)


class KnownFrameEmbedding(nn.Module):
    """Embeds the nearest known frames of each frame: (B, T, H, W, C_in) -> (B, T, H, W, features).

    Without it, a known frame reaches the others only through temporal attention, as in `KeyFrameEmbedding`.
    """

    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c_in"], velocity: Float[Array, "b items 2"], width: int, features: int
    ) -> Float[Array, "b t h w features"]:
        _, around = known_frames_around(x, velocity, width)
        return conv(features, (3, 3), name="conv", dtype=self.dtype, zero=True)(around.astype(self.dtype))


class KnownFrameSkip(nn.Module):
    """A linear prediction from the known frames: (B, T, H, W, C_in) -> (B, T, H, W, C_out).

    The prediction of a known frame is a linear map of x_t and its own latents, which other frames do not have; that of
    other frames is nearly one of the nearest known frames, moved. See `ConditionSkip`.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c_in"],
        velocity: Float[Array, "b items 2"],
        temb: Float[Array, "b t e"],
        features: int,
    ) -> Float[Array, "b t h w features"]:
        x = x.astype(jnp.float32)
        known, around = known_frames_around(x, velocity, features)
        own = jnp.where(known[:, :, None, None, None], x, 0)
        flags = jnp.broadcast_to(known[:, :, None, None, None], (*x.shape[:-1], 1)).astype(jnp.float32)
        return noise_level_map(jnp.concatenate([own, flags, around], axis=-1), temb, features)


def noise_level_map(
    inputs: Float[Array, "b f h w n"], temb: Float[Array, "b f e"], features: int
) -> Float[Array, "b f h w features"]:
    """A linear map of each pixel, in float32, whose matrix depends on the noise level. For modules in `nn.compact`."""
    # In full precision, which TPUs leave only on request. The map is a small part of the network's products.
    exact = {"precision": jax.lax.Precision.HIGHEST}
    dense = nn.Dense(inputs.shape[-1] * features, kernel_init=nn.initializers.zeros, name="matrix", **exact)
    matrix = rearrange(dense(nn.silu(temb.astype(jnp.float32))), "b f (c d) -> b f c d", d=features)
    return jnp.einsum("bfhwc,bfcd->bfhwd", inputs, matrix, **exact)
