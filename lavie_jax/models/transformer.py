"""The spatio-temporal transformer of LaVie's UNet (sec. 3.2, and 3.3 for the interpolation stage).

Stable Diffusion's transformer block, with temporal self-attention added. From the inside out: one attention layer, the
feed-forward layer, the block, and the transformer around it. Parameter paths mirror the PyTorch names.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from lavie_jax.models import layers
from lavie_jax.models.additions import add_motion
from lavie_jax.models.attention import attention, relative_position_buckets, rotary_embedding
from lavie_jax.models.free_u import FreeU
from lavie_jax.models.layers import Frames, GroupNorm, ResnetBlock, dense, items_to_frames, on_video, per_frame
from lavie_jax.models.placement import frames_to_pixels, pixels_to_frames, splits_unevenly
from lavie_jax.models.temporal_windows import AttentionWindows, attend_in_windows
from lavie_jax.models.unet_config import UNetConfig

ROTARY_WIDTH = 32  # channels of every head that are rotated; all of them in narrower heads
TRANSFORMER_EPS = 1e-6  # of the group norm before a transformer and in temporal modules; `norm_eps` elsewhere


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings and layout that all layers of one UNet call have in common."""

    config: UNetConfig
    frames: Frames
    dtype: DTypeLike
    kernel: str
    remat: str = "none"
    windows: AttentionWindows | None = None  # of the temporal attention; None: one over all frames
    free_u: FreeU | None = None  # factors of the inputs of up blocks


class Attention(nn.Module):
    """Multi-head attention from x (B, S, C) to context (B, L, D), or to itself; q, k and v have no bias."""

    s: Setting
    heads: int
    temporal: bool = False  # adds rotary embedding and relative position bias where configured; starts at zero

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s c"],
        context: Float[Array, "b l d"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b s c"]:
        context = x if context is None else context
        channels, dtype = x.shape[-1], self.s.dtype
        q, k, v = (
            dense(channels, bias=False, dtype=dtype, name=name)(y)
            for name, y in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        bias, windows = None, self.s.windows if self.temporal else None
        if self.temporal and self.s.config.temporal_position:
            width = min(ROTARY_WIDTH, channels // self.heads)
            q, k = (rotary_embedding(y, self.heads, width) for y in (q, k))
            length = x.shape[1] if windows is None else windows.size
            bias = RelativePositionBias(self.heads, name="time_rel_pos_bias")(length)
        q, k, v = (rearrange(y, "b s (n k) -> b s n k", n=self.heads) for y in (q, k, v))
        # T is small enough to materialize the scores where the chosen kernel does not support a bias
        kernel = "auto" if bias is not None and self.s.kernel in ("blockwise", "flash") else self.s.kernel
        if windows is None or windows.size == x.shape[1]:
            out = attention(q, k, v, bias=bias, mask=mask, kernel=kernel)
        else:
            out = attend_in_windows(functools.partial(attention, bias=bias, kernel=kernel), q, k, v, windows)
        # weight and bias of the temporal output start at zero: at step 0 the video model equals the image model
        init = nn.initializers.zeros if self.temporal else layers.KERNEL_INIT
        out = rearrange(out, "b s n k -> b s (n k)")
        return dense(channels, dtype=dtype, kernel_init=init, name="to_out_0")(out)


class RelativePositionBias(nn.Module):
    """A learned score for each head and bucketed distance between frames: (1, N, T, T)."""

    heads: int

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "1 n t t"]:
        table = nn.Embed(32, self.heads, embedding_init=nn.initializers.normal(1.0), name="relative_attention_bias")
        return rearrange(table(relative_position_buckets(length)), "q k n -> 1 n q k")


class FeedForward(nn.Module):
    """GEGLU (arXiv 2002.05202): value * gelu(gate), projected back. Four times as wide inside, with the exact GELU."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        channels = x.shape[-1]
        value, gate = jnp.split(GEGLUProjection(8 * channels, self.dtype, name="net_0")(x), 2, axis=-1)
        return dense(channels, dtype=self.dtype, name="net_2")(value * nn.gelu(gate, approximate=False))


class GEGLUProjection(nn.Module):
    """A dense layer nested one level deeper, `ff/net_0/proj`, as in PyTorch."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        return dense(self.features, dtype=self.dtype, name="proj")(x)


class TransformerBlock(nn.Module):
    """Spatial self-attention, cross-attention to the text, temporal self-attention, feed-forward.

    Each is pre-norm and residual. x is (B, T+M, H, W, C), text (B, items, L, D) with the video as item 0, or with an
    item for every frame. In the interpolation stage the temporal attention comes last.
    """

    s: Setting
    level: int
    only_text: bool  # attn1 attends to the text too instead of the frame

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b frames h w c"],
        text: Float[Array, "b items l d"],
        mask: Bool[Array, "b items l"] | None = None,
    ) -> Float[Array, "b frames h w c"]:
        config = self.s.config
        heads = config.attention_heads[self.level]

        def norm(name):
            # in two passes: the fast variance is inaccurate where the mean is large
            return nn.LayerNorm(epsilon=1e-5, dtype=self.s.dtype, use_fast_variance=False, name=name)

        attn1 = Attention(self.s, heads, name="attn1")
        y = norm("norm1")(x)
        x = x + (self._to_text(attn1, y, text, mask) if self.only_text else self._spatial(attn1, y))
        x = x + self._to_text(Attention(self.s, heads, name="attn2"), norm("norm2")(x), text, mask)
        if config.temporal_attention == "before_ff":
            x = self._temporal(heads, norm, x, text, mask)
        x = x + FeedForward(self.s.dtype, name="ff")(norm("norm3")(x))
        return self._temporal(heads, norm, x, text, mask) if config.temporal_attention == "after_ff" else x

    def _spatial(self, attn, x):
        height, frames = x.shape[2], self.s.frames
        fold, unfold = "b f h w c -> (b f) (h w) c", "(b f) (h w) c -> b f h w c"

        def within(y):  # every frame attends to itself
            return rearrange(attn(rearrange(y, fold)), unfold, b=y.shape[0], h=height)

        def first_and_previous(y):  # LaVie sec. 3.3: the keys of frame i are those of frames 0 and i - 1
            first = jnp.broadcast_to(y[:, :1], y.shape)
            is_first = jnp.arange(y.shape[1])[:, None, None, None] == 0
            previous = jnp.where(is_first, first, jnp.roll(y, 1, axis=1))
            context = rearrange(jnp.stack([first, previous]), "pair b t h w c -> (b t) (pair h w) c")
            return rearrange(attn(rearrange(y, fold), context), unfold, b=y.shape[0], h=height)

        if self.s.config.spatial_attention == "self":
            return within(x)
        video, images = x[:, : frames.video], x[:, frames.video :]
        out = [first_and_previous(video)] if frames.video else []
        return jnp.concatenate(out + [within(images)] if frames.images else out, axis=1)

    def _to_text(self, attn, x, text, mask):
        """Attends to the text. The frames of a video share one text and form one sequence; images have their own.

        Frames with texts of their own are treated as images are.
        """
        batch, height, frames = x.shape[0], x.shape[2], self.s.frames
        if splits_unevenly(frames.video):  # parts of a sequence of all frames would not be those of the frames
            text, mask = jax.tree.map(lambda y: items_to_frames(y, frames), (text, mask))
        if frames.video > 1 and per_frame(text, frames):
            frames = Frames(0, x.shape[1])
        out = []
        if frames.video:
            video = rearrange(x[:, : frames.video], "b t h w c -> b (t h w) c")
            y = attn(video, text[:, 0], None if mask is None else mask[:, 0])
            out += [rearrange(y, "b (t h w) c -> b t h w c", t=frames.video, h=height)]
        if frames.images:
            images = rearrange(x[:, frames.video :], "b m h w c -> (b m) (h w) c")
            image_text = rearrange(text[:, -frames.images :], "b m l d -> (b m) l d")
            image_mask = None if mask is None else rearrange(mask[:, -frames.images :], "b m l -> (b m) l")
            out += [rearrange(attn(images, image_text, image_mask), "(b m) (h w) c -> b m h w c", b=batch, h=height)]
        return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)

    def _temporal(self, heads, norm, x, text, mask):
        """Temporal self-attention (LaVie sec. 3.2): each pixel attends to itself in the other frames."""
        attn, norm = Attention(self.s, heads, temporal=True, name="attn_temporal"), norm("norm_temporal")

        def over_time(video):
            batch, height = video.shape[0], video.shape[2]
            video = add_motion(self.s.config, video, text, mask, self.s.frames, self.s.dtype)
            y = attn(rearrange(frames_to_pixels(norm(video)), "b t p c -> (b p) t c"))
            return video + pixels_to_frames(rearrange(y, "(b p) t c -> b t p c", b=batch), height)

        return on_video(over_time, x, self.s.frames)


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(norm(x)))); the super-resolution stage has temporal convolutions before it."""

    s: Setting
    level: int
    only_text: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b frames h w c"],
        text: Float[Array, "b items l d"],
        mask: Bool[Array, "b items l"] | None = None,
    ) -> Float[Array, "b frames h w c"]:
        config, dtype, channels = self.s.config, self.s.dtype, x.shape[-1]

        def projection(name):
            if config.use_linear_projection:
                return dense(channels, dtype=dtype, name=name)
            return layers.conv(channels, (1, 1), name=name, dtype=dtype)

        if config.temporal_resblocks:
            # unlike in the original, conv2 starts at zero, so that the image model is unchanged at step 0
            block = ResnetBlock(
                channels, config.temporal_norm_groups, TRANSFORMER_EPS, Frames(self.s.frames.video, 0),
                kernels=((3, 1, 1), (3, 1, 1)), zero=True, dtype=dtype, name="resblock_temporal",
            )  # fmt: skip
            x = on_video(block, x, self.s.frames)
        # the only norm of the UNet with statistics per frame
        y = GroupNorm(config.norm_num_groups, TRANSFORMER_EPS, dtype=dtype, name="norm")(x)
        block = TransformerBlock(self.s, self.level, self.only_text, name="transformer_blocks_0")
        y = block(projection("proj_in")(y), text, mask)
        return x + projection("proj_out")(y)
