"""The UNet of the cascade: Stable Diffusion's, inflated over time (LaVie, sec. 3.1 to 3.3).

One network for the image models (Stable Diffusion 1.x, the x4-upscaler) and for the three video stages; they
differ by the fields of `UNetConfig` (`unet_config.py`) alone. Parameter paths mirror the PyTorch names,
`down_blocks_0/attentions_1/...`.

From the inside out: the attention of one block, the transformer, the temporal module of the super-resolution
stage, the down, mid and up blocks, and last the `UNet` itself.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

from lavie_jax.models import layers
from lavie_jax.models.additions import (
    BETWEEN_KEYS,
    CUBIC,
    CaptionEmbedding,
    ConditionSkip,
    KeyFrameEmbedding,
    MotionEmbedding,
)
from lavie_jax.models.attention import attention, relative_position_buckets, rotary_embedding
from lavie_jax.models.layers import (
    Downsample,
    Frames,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    dense,
    items_to_frames,
    on_video,
)
from lavie_jax.models.unet_config import UNetConfig

ROTARY_WIDTH = 32  # channels of every head that the rotary embedding turns, or the whole head where it is narrower
REMAT = ("none", "block", "full", "offload")
LAYER = "layer"  # what a layer of a block gives, by this name
TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER], offload_src="device", offload_dst="pinned_host"
)
TRANSFORMER_EPS = 1e-6  # of the group norm before a transformer and in the temporal modules; elsewhere it is `norm_eps`


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every part of one UNet call has in common."""

    config: UNetConfig
    frames: Frames
    dtype: Any
    kernel: str
    remat: str = "none"

    def resnet(self, x: Array, temb: Array, caption: Array | None, features: int, name: str) -> Array:
        """x through a residual block, whose parameters are added to the calling module."""
        block = self._layer(ResnetBlock)(
            features, self.config.norm_num_groups, self.config.norm_eps, self.frames, dtype=self.dtype, name=name
        )
        return checkpoint_name(block(x, temb, caption), LAYER)

    def transformer(self, x: Array, text: Array, level: int, only_text: bool, name: str) -> Array:
        """x through a transformer, likewise."""
        return checkpoint_name(self._layer(Transformer)(self, level, only_text, name=name)(x, text), LAYER)

    def block(self, module: type[nn.Module], static_argnums: tuple[int, ...] = ()) -> type[nn.Module]:
        """`module`, a block of layers, with what `remat` says of its activations."""
        if self.remat == "none":
            return module
        return nn.remat(module, static_argnums=static_argnums, policy=TO_HOST if self.remat == "offload" else None)

    def _layer(self, module):
        return nn.remat(module) if self.remat in ("full", "offload") else module


class Attention(nn.Module):
    """Multi-head attention from x (B, S, C) to context (B, L, D), or to itself; q, k and v have no bias."""

    s: Setting
    heads: int
    temporal: bool = False  # rotary embedding and relative position bias where the config has them; starts at zero

    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        channels, dtype = x.shape[-1], self.s.dtype
        q, k, v = (
            dense(channels, bias=False, dtype=dtype, name=name)(y)
            for name, y in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        bias = None
        if self.temporal and self.s.config.temporal_position:
            width = min(ROTARY_WIDTH, channels // self.heads)
            q, k = (rotary_embedding(y, self.heads, width) for y in (q, k))
            bias = RelativePositionBias(self.heads, name="time_rel_pos_bias")(x.shape[1])
        q, k, v = (rearrange(y, "b s (n k) -> b s n k", n=self.heads) for y in (q, k, v))
        # T is short: where the chosen kernel takes no bias, the scores may be held
        kernel = "auto" if bias is not None and self.s.kernel in ("blockwise", "flash") else self.s.kernel
        out = attention(q, k, v, bias=bias, kernel=kernel)
        # video == image model at step 0: the output projection of temporal attention starts at zero, weight and
        # bias
        init = nn.initializers.zeros if self.temporal else layers.KERNEL_INIT
        out = rearrange(out, "b s n k -> b s (n k)")
        return dense(channels, dtype=dtype, kernel_init=init, name="to_out_0")(out)


class RelativePositionBias(nn.Module):
    """A learned score for each head and bucketed distance between frames: (1, N, T, T)."""

    heads: int

    @nn.compact
    def __call__(self, length: int):
        table = nn.Embed(32, self.heads, embedding_init=nn.initializers.normal(1.0), name="relative_attention_bias")
        return rearrange(table(relative_position_buckets(length)), "q k n -> 1 n q k")


class FeedForward(nn.Module):
    """GEGLU (arXiv 2002.05202): (value * gelu(gate)) projected back, four times as wide inside; exact erf GELU."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        value, gate = jnp.split(GEGLUProjection(8 * channels, self.dtype, name="net_0")(x), 2, axis=-1)
        return dense(channels, dtype=self.dtype, name="net_2")(value * nn.gelu(gate, approximate=False))


class GEGLUProjection(nn.Module):
    """A dense layer one level further down: `ff/net_0/proj`, as PyTorch names it."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        return dense(self.features, dtype=self.dtype, name="proj")(x)


class TransformerBlock(nn.Module):
    """Spatial self-attention, text cross-attention, temporal self-attention, feed-forward; each pre-norm and
    residual.

    x (B, T+M, H, W, C); text (B, items, L, D), item 0 the video's. In the interpolation stage the temporal
    attention comes last.
    """

    s: Setting
    level: int
    only_text: bool  # attn1 attends to the text too, not to the frame

    @nn.compact
    def __call__(self, x, text):
        config = self.s.config
        heads = config.attention_heads[self.level]

        def norm(name):
            # in two passes: the fast variance loses digits where the mean is large
            return nn.LayerNorm(epsilon=1e-5, dtype=self.s.dtype, use_fast_variance=False, name=name)

        attn1 = Attention(self.s, heads, name="attn1")
        y = norm("norm1")(x)
        x = x + (self._to_text(attn1, y, text) if self.only_text else self._spatial(attn1, y))
        x = x + self._to_text(Attention(self.s, heads, name="attn2"), norm("norm2")(x), text)
        if config.temporal_attention == "before_ff":
            x = self._temporal(heads, norm, x, text)
        x = x + FeedForward(self.s.dtype, name="ff")(norm("norm3")(x))
        return self._temporal(heads, norm, x, text) if config.temporal_attention == "after_ff" else x

    def _spatial(self, attn, x):
        height, frames = x.shape[2], self.s.frames
        fold, unfold = "b f h w c -> (b f) (h w) c", "(b f) (h w) c -> b f h w c"

        def within(y):  # every frame attends to itself
            return rearrange(attn(rearrange(y, fold)), unfold, b=y.shape[0], h=height)

        def first_and_previous(y):  # LaVie sec. 3.3: the keys of frame i are those of frames 0 and i - 1
            first, previous = jnp.broadcast_to(y[:, :1], y.shape), jnp.concatenate([y[:, :1], y[:, :-1]], axis=1)
            context = rearrange(jnp.stack([first, previous]), "pair b t h w c -> (b t) (pair h w) c")
            return rearrange(attn(rearrange(y, fold), context), unfold, b=y.shape[0], h=height)

        if self.s.config.spatial_attention == "self":
            return within(x)
        video, images = x[:, : frames.video], x[:, frames.video :]
        out = [first_and_previous(video)] if frames.video else []
        return jnp.concatenate(out + [within(images)] if frames.images else out, axis=1)

    def _to_text(self, attn, x, text):
        """All frames of the video share one text, so they form one long sequence; every image has its own."""
        batch, height, frames = x.shape[0], x.shape[2], self.s.frames
        out = []
        if frames.video:
            video = rearrange(x[:, : frames.video], "b t h w c -> b (t h w) c")
            out += [rearrange(attn(video, text[:, 0]), "b (t h w) c -> b t h w c", t=frames.video, h=height)]
        if frames.images:
            images = rearrange(x[:, frames.video :], "b m h w c -> (b m) (h w) c")
            image_text = rearrange(text[:, -frames.images :], "b m l d -> (b m) l d")
            out += [rearrange(attn(images, image_text), "(b m) (h w) c -> b m h w c", b=batch, h=height)]
        return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)

    def _temporal(self, heads, norm, x, text):
        attn, norm = Attention(self.s, heads, temporal=True, name="attn_temporal"), norm("norm_temporal")

        def over_time(video):  # the frames at each place attend to each other
            batch, height = video.shape[0], video.shape[2]
            if self.s.config.motion_embedding:
                embedding = MotionEmbedding(self.s.dtype, name="motion_embedding_temporal")
                video = video + embedding(text[:, 0], video.shape[1:4], video.shape[-1])
            y = attn(rearrange(norm(video), "b t h w c -> (b h w) t c"))
            return video + rearrange(y, "(b h w) t c -> b t h w c", b=batch, h=height)

        return on_video(over_time, x, self.s.frames)


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(norm(x)))), after convolutions over time in the super-resolution stage."""

    s: Setting
    level: int
    only_text: bool

    @nn.compact
    def __call__(self, x, text):
        config, dtype, channels = self.s.config, self.s.dtype, x.shape[-1]

        def projection(name):
            if config.use_linear_projection:
                return dense(channels, dtype=dtype, name=name)
            return layers.conv(channels, (1, 1), name=name, dtype=dtype)

        if config.temporal_resblocks:
            # conv2 starts at zero (not so in the original), so that the image model is unchanged at step 0
            block = ResnetBlock(
                channels, config.temporal_norm_groups, TRANSFORMER_EPS, Frames(self.s.frames.video, 0),
                kernels=((3, 1, 1), (3, 1, 1)), zero=True, dtype=dtype, name="resblock_temporal",
            )  # fmt: skip
            x = on_video(block, x, self.s.frames)
        # this norm alone has per-frame statistics
        y = GroupNorm(config.norm_num_groups, TRANSFORMER_EPS, dtype=dtype, name="norm")(x)
        block = TransformerBlock(self.s, self.level, self.only_text, name="transformer_blocks_0")
        y = block(projection("proj_in")(y), text)
        return x + projection("proj_out")(y)


class TemporalModule(nn.Module):
    """x + shift_conv(spatial(temporal(x))): the residual module over time after each block of the super-
    resolution UNet.
    """

    s: Setting

    @nn.compact
    def __call__(self, x, temb):
        groups, dtype, frames = self.s.config.temporal_norm_groups, self.s.dtype, Frames(self.s.frames.video, 0)
        channels, video_temb = x.shape[-1], temb[:, :1]
        temporal = ResnetBlock(
            channels, groups, TRANSFORMER_EPS, frames, ((5, 1, 1), (3, 1, 1)), dtype=dtype, name="resblocks_3d_t"
        )
        spatial = ResnetBlock(channels, groups, TRANSFORMER_EPS, frames, dtype=dtype, name="resblocks_3d_s")
        shift = layers.conv(channels, (1, 1), name="shift_conv", dtype=dtype, zero=True)
        return on_video(lambda video: video + shift(spatial(temporal(video, video_temb), video_temb)), x, self.s.frames)


class DownBlock(nn.Module):
    """Residual blocks, with transformers at the levels that attend, then a strided convolution except at the
    deepest level.
    """

    s: Setting
    level: int

    @nn.compact
    def __call__(self, x, temb, text, caption):
        config = self.s.config
        width = config.block_out_channels[self.level]
        skips = []
        for i in range(config.layers_per_block):
            x = self.s.resnet(x, temb, caption, width, f"resnets_{i}")
            if config.attention_levels[self.level]:
                only_text = config.only_cross_attention[self.level]
                x = self.s.transformer(x, text, self.level, only_text, f"attentions_{i}")
            skips.append(x)
        if self.level < len(config.block_out_channels) - 1:
            x = Downsample(width, dtype=self.s.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, transformer, residual block, at the deepest level."""

    s: Setting

    @nn.compact
    def __call__(self, x, temb, text, caption):
        width, deepest = x.shape[-1], len(self.s.config.block_out_channels) - 1
        x = self.s.resnet(x, temb, caption, width, "resnets_0")
        # whatever `only_cross_attention` says of the deepest level, the mid block keeps its self-attention
        x = self.s.transformer(x, text, deepest, only_text=False, name="attentions_0")
        return self.s.resnet(x, temb, caption, width, "resnets_1")


class UpBlock(nn.Module):
    """As many residual blocks as there are skips of this level, each fed one of them; then upsampling except at
    the last.
    """

    s: Setting
    level: int  # counted from the outermost, as on the way down

    @nn.compact
    def __call__(self, x, skips, temb, text, caption, size):
        config = self.s.config
        width = config.block_out_channels[self.level]
        for i, skip in enumerate(reversed(skips)):
            x = self.s.resnet(jnp.concatenate([x, skip], axis=-1), temb, caption, width, f"resnets_{i}")
            if config.attention_levels[self.level]:
                only_text = config.only_cross_attention[self.level]
                x = self.s.transformer(x, text, self.level, only_text, f"attentions_{i}")
        if self.level > 0:
            x = Upsample(width, dtype=self.s.dtype, name="upsamplers_0")(x, size)
        return x


class UNet(nn.Module):
    """Predicts the noise (or v, or x0) in x_t, for a video and for images beside it.

    `remat` says what of the activations is recomputed in the backward pass, for memory, instead of being kept: "none";
    "block", those inside each down, mid and up block; "full", in these blocks those inside each layer once more;
    "offload", those inside each layer, once: what one layer hands to the next waits in the host's memory.
    """

    config: UNetConfig
    dtype: Any = jnp.float32  # of the computation; parameters are float32, norms and softmax compute in float32
    attention_kernel: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b frames h w c_in"],
        t: Num[Array, " b"],
        text: Float[Array, "b l d"] | None,
        image_text: Float[Array, "b m l d"] | None = None,
        image_t: Num[Array, "b m"] | None = None,
        noise_level: Num[Array, " b"] | None = None,
    ) -> Float[Array, "b frames h w c_out"]:
        """Of x (B, T+M, H, W, C), the first T frames are the video's, the last M images (M = 0 without `image_text`).

        `text` is the video's caption, None when T = 0; `image_text` the images' own. `t` is the timestep of each row,
        and of its images unless `image_t` gives them their own. `noise_level` is that of the super-resolution stage's
        low-resolution input. The result is float32. The video comes out as if the images were absent, each image as
        if it were alone.
        """
        config, dtype = self.config, self.dtype
        if self.remat not in REMAT:
            raise ValueError(f"Unknown remat: {self.remat!r}. Choose from {', '.join(REMAT)}.")
        images = 0 if image_text is None else image_text.shape[1]
        frames = Frames(x.shape[1] - images, images)
        if frames.video < 0 or (frames.video > 0) != (text is not None):
            raise ValueError(
                f"{x.shape[1]} frames with {images} images leave {frames.video} for the video; text goes with T > 0."
            )
        if (noise_level is None) != (config.num_class_embeds is None):
            raise ValueError("noise_level goes with a UNet that has num_class_embeds, and only with it.")
        s = Setting(config, frames, dtype, self.attention_kernel, self.remat)

        # One timestep and one text for each item: the video, when there is one, then the images.
        if image_t is None:
            image_t = jnp.broadcast_to(t[:, None], (t.shape[0], images))
        t_items = jnp.concatenate([t[:, None], image_t], axis=1) if frames.video else image_t
        texts = [] if text is None else [text[:, None]]
        texts = jnp.concatenate(texts if image_text is None else [*texts, image_text], axis=1).astype(
            dtype
        )  # (B, items, L, D)
        temb = TimestepEmbedding(config.block_out_channels[0], dtype, name="time_embedding")(t_items)  # (B, items, E)
        if config.num_class_embeds is not None:
            embed = nn.Embed(config.num_class_embeds, temb.shape[-1], dtype=dtype, name="class_embedding")
            temb = temb + embed(noise_level)[:, None]
        caption = CaptionEmbedding(dtype, name="caption_embedding")(texts, temb) if config.caption_modulation else None

        def temporal_module(there, name, h):
            return s.block(TemporalModule)(s, name=name)(h, temb) if there else h

        h = layers.conv(config.block_out_channels[0], (3, 3), name="conv_in", dtype=dtype)(x.astype(dtype))
        if config.key_frames_around:
            keys = KeyFrameEmbedding(dtype, name="key_frame_embedding_temporal")
            h = on_video(lambda y: y + keys(x[:, : frames.video], config.out_channels, y.shape[-1]), h, frames)
        levels = range(len(config.block_out_channels))
        skips = [[h]]  # conv_in's output belongs to the outermost level
        for level in levels:
            h, level_skips = s.block(DownBlock)(s, level, name=f"down_blocks_{level}")(h, temb, texts, caption)
            # These wait for the way up: left alone, the compiler may keep the several arrays that each is the sum of
            h, level_skips = jax.lax.optimization_barrier((h, level_skips))
            skips.append(level_skips)
            h = temporal_module(level in config.down_temporal_idx, f"down_temporal_blocks_{level}", h)
        h = s.block(MidBlock)(s, name="mid_block")(h, temb, texts, caption)
        h = temporal_module(config.mid_temporal, "mid_temporal_block", h)

        stack = [skip for level_skips in skips for skip in level_skips]
        for i, level in enumerate(reversed(levels)):
            count = config.layers_per_block + 1
            stack, level_skips = stack[:-count], stack[-count:]
            size = stack[-1].shape[2:4] if level else None  # the next skip's, which is odd where a side was
            up = s.block(UpBlock, static_argnums=(6,))(s, level, name=f"up_blocks_{i}")
            h = up(h, level_skips, temb, texts, caption, size)
            h = temporal_module(i in config.up_temporal_idx, f"up_temporal_blocks_{i}", h)

        h = GroupNorm(config.norm_num_groups, config.norm_eps, frames, dtype, name="conv_norm_out")(h)
        h = layers.conv(config.out_channels, (3, 3), name="conv_out", dtype=dtype, zero=True)(nn.silu(h))
        h = h.astype(jnp.float32)
        frame_temb = items_to_frames(temb, frames)
        if config.low_res_skip:
            h = h + ConditionSkip(reach=CUBIC, name="low_res_skip")(x, frame_temb, config.out_channels)
        if config.key_frames_around:
            skip = ConditionSkip(frames=BETWEEN_KEYS, name="key_frame_skip_temporal")
            video = slice(frames.video)
            h = on_video(lambda y: y + skip(x[:, video], frame_temb[:, video], config.out_channels), h, frames)
        return h
