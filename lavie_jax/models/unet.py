"""The UNet of the cascade: Stable Diffusion's, extended over time (LaVie, arXiv 2309.15103).

One network serves the image models (Stable Diffusion 1.x, the x4-upscaler) and all video stages: text to video (sec.
3.2), prediction (sec. 4.4), temporal interpolation (sec. 3.3) and super-resolution (sec. 3.4). They differ only in the
fields of `UNetConfig` (`unet_config.py`). Parameter paths mirror the PyTorch names, `down_blocks_0/attentions_1/...`.

This file defines, in this order, the conditioning, the temporal module of the super-resolution stage, the down, mid and
up blocks, and the `UNet`. `transformer.py` has the transformers within the blocks, `additions.py` extensions that LaVie
does not have.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from lavie_jax.models import additions, layers, pixel_latents
from lavie_jax.models.free_u import FreeU
from lavie_jax.models.layers import Downsample, Frames, GroupNorm, ResnetBlock, TimestepEmbedding, Upsample, on_video
from lavie_jax.models.placement import split_by_frames
from lavie_jax.models.temporal_windows import AttentionWindows
from lavie_jax.models.transformer import TRANSFORMER_EPS, Setting, Transformer
from lavie_jax.models.unet_config import UNetConfig

REMAT = ("none", "block", "full", "offload")
LAYER = "layer"  # checkpoint name of the output of every layer of a block
TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER], offload_src="device", offload_dst="pinned_host"
)


class Conditioning(NamedTuple):
    """The inputs of every block besides its features, for each item: the video, if there is one, then the images."""

    temb: Float[Array, "b items e"]  # embedding of the timestep, and of the noise level in the super-resolution stage
    text: Float[Array, "b items l d"]
    caption: Float[Array, "b items e"] | None = None  # see `additions.CaptionEmbedding`
    text_mask: Bool[Array, "b items l"] | None = None  # True for real tokens; None when all of them are


def remat_block(module: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()) -> type[nn.Module]:
    """Returns `module`, a block of layers, wrapped as `UNet.remat` requires."""
    if remat == "none":
        return module
    return nn.remat(module, static_argnums=static_argnums, policy=TO_HOST if remat == "offload" else None)


def remat_layer(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """Returns `module`, a layer of a block, wrapped as `UNet.remat` requires."""
    return nn.remat(module) if remat in ("full", "offload") else module


def resnet(s: Setting, x: Array, cond: Conditioning, features: int, name: str) -> Array:
    """Applies a residual block, whose parameters are added to the calling module."""
    config = s.config
    block = remat_layer(ResnetBlock, s.remat)(
        features, config.norm_num_groups, config.norm_eps, s.frames, dtype=s.dtype, name=name
    )
    return checkpoint_name(block(x, cond.temb, cond.caption), LAYER)


def transformer(s: Setting, x: Array, cond: Conditioning, level: int, only_text: bool, name: str) -> Array:
    """Applies a transformer, whose parameters are added to the calling module."""
    module = remat_layer(Transformer, s.remat)(s, level, only_text, name=name)
    return checkpoint_name(module(x, cond.text, cond.text_mask), LAYER)


class TemporalModule(nn.Module):
    """x + shift_conv(spatial(temporal(x))): follows the blocks of the super-resolution UNet (LaVie sec. 3.4)."""

    s: Setting

    @nn.compact
    def __call__(self, x: Float[Array, "b frames h w c"], temb: Float[Array, "b items e"]):
        groups, dtype, frames = self.s.config.temporal_norm_groups, self.s.dtype, Frames(self.s.frames.video, 0)
        channels, video_temb = x.shape[-1], temb[:, :1]
        temporal = ResnetBlock(
            channels, groups, TRANSFORMER_EPS, frames, ((5, 1, 1), (3, 1, 1)), dtype=dtype, name="resblocks_3d_t"
        )
        spatial = ResnetBlock(channels, groups, TRANSFORMER_EPS, frames, dtype=dtype, name="resblocks_3d_s")
        shift = layers.conv(channels, (1, 1), name="shift_conv", dtype=dtype, zero=True)
        return on_video(lambda video: video + shift(spatial(temporal(video, video_temb), video_temb)), x, self.s.frames)


class DownBlock(nn.Module):
    """Residual blocks, each followed by a transformer at the levels with attention, then a strided convolution.

    Each of them produces a skip connection. Only the first `wanted` are computed, so the deepest level does not
    downsample. Returns the output and the skip connections.
    """

    s: Setting
    level: int
    wanted: int

    @nn.compact
    def __call__(self, x: Float[Array, "b frames h w c"], cond: Conditioning):
        config = self.s.config
        width = config.block_out_channels[self.level]
        skips = []
        for i in range(min(self.wanted, config.layers_per_block)):
            x = resnet(self.s, x, cond, width, f"resnets_{i}")
            if config.attention_levels[self.level]:
                only_text = config.only_cross_attention[self.level]
                x = transformer(self.s, x, cond, self.level, only_text, f"attentions_{i}")
            skips.append(x)
        if self.wanted > config.layers_per_block:
            x = Downsample(width, dtype=self.s.dtype, name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Residual block, transformer, residual block, at the deepest level; no transformer with `plain_mid`."""

    s: Setting

    @nn.compact
    def __call__(self, x: Float[Array, "b frames h w c"], cond: Conditioning):
        width, deepest = x.shape[-1], len(self.s.config.block_out_channels) - 1
        x = resnet(self.s, x, cond, width, "resnets_0")
        if not self.s.config.plain_mid:
            # the mid block keeps its self-attention whatever `only_cross_attention` is at the deepest level
            x = transformer(self.s, x, cond, deepest, only_text=False, name="attentions_0")
        return resnet(self.s, x, cond, width, "resnets_1")


class UpBlock(nn.Module):
    """One residual block for each skip connection of the level, as in `DownBlock`, then upsampling.

    With fewer skip connections, only the last residual blocks are computed. The outermost level does not upsample.
    """

    s: Setting
    level: int  # counted from the outermost, as on the way down

    @nn.compact
    def __call__(self, x: Float[Array, "b frames h w c"], skips: list[Array], cond: Conditioning, size):
        config = self.s.config
        width = config.block_out_channels[self.level]
        for i, skip in enumerate(reversed(skips), start=config.layers_per_block + 1 - len(skips)):
            self.sow("intermediates", f"into_{i}", x)  # kept only on request, see `deep_features`
            if self.s.free_u is not None:
                x, skip = self.s.free_u(len(config.block_out_channels) - 1 - self.level, x, skip)
            x = resnet(self.s, jnp.concatenate([x, skip], axis=-1), cond, width, f"resnets_{i}")
            if config.attention_levels[self.level]:
                only_text = config.only_cross_attention[self.level]
                x = transformer(self.s, x, cond, self.level, only_text, f"attentions_{i}")
        if self.level > 0:
            x = Upsample(width, dtype=self.s.dtype, name="upsamplers_0")(x, size)
        return x


class UNet(nn.Module):
    """Predicts the noise (or v, or x0) in x_t, for a video and for images trained jointly with it.

    Attributes:
        config: the architecture.
        dtype: dtype of the computation; parameters are float32, and norms and softmax compute in float32.
        attention_kernel: one of `attention.KERNELS`.
        remat: which activations the backward pass recomputes to save memory. "none"; "block": those inside each down,
            mid and up block; "full": as "block", and those inside each layer once more; "offload": those inside each
            layer, while the outputs of layers are kept in host memory.
        attention_windows: windows of the temporal attention, for clips longer than those in training; None means one
            window over all frames.
        free_u: factors of the inputs of up blocks in sampling; None means no factors.
    """

    config: UNetConfig
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "auto"
    remat: str = "none"
    attention_windows: AttentionWindows | None = None
    free_u: FreeU | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b frames h w c_in"],
        t: Num[Array, " b"],
        text: Float[Array, "b l d"] | Float[Array, "b t l d"] | None,
        image_text: Float[Array, "b m l d"] | None = None,
        image_t: Num[Array, "b m"] | None = None,
        noise_level: Num[Array, " b"] | None = None,
        text_mask: Bool[Array, "b l"] | Bool[Array, "b t l"] | None = None,
        image_text_mask: Bool[Array, "b m l"] | None = None,
        deep: Float[Array, "b frames h_deep w_deep c_deep"] | None = None,
        depth: int | None = None,
    ) -> Float[Array, "b frames h w c_out"]:
        """Returns the prediction in float32. The video's does not depend on the images, nor an image's on other frames.

        Args:
            x: noisy latents, with the stage's condition concatenated to their channels. The first T frames are the
                video's, the last M are images (LaVie sec. 3.2); M = 0 without `image_text`.
            t: timestep of each row.
            text: the video's caption, or one for each of its frames; None when T = 0.
            image_text: the images' captions.
            image_t: timesteps of the images; those of their rows by default.
            noise_level: noise level of the super-resolution stage's low-resolution input (sec. 3.4).
            text_mask: True for the real tokens of `text`; None when all of them are.
            image_text_mask: the same for `image_text`.
            deep: `deep_features` of a call at another timestep, used instead of computing them (DeepCache, arXiv
                2312.00858). The network is computed down to the first `depth` skip connections and up from there.
            depth: number of skip connections that are computed if `deep` is given.
        """
        config, dtype = self.config, self.dtype
        if self.remat not in REMAT:
            raise ValueError(f"Unknown remat: {self.remat!r}. Choose from {', '.join(REMAT)}.")
        frames = split_frames(x, text, image_text)
        s = Setting(config, frames, dtype, self.attention_kernel, self.remat, self.attention_windows, self.free_u)
        x = split_by_frames(x)

        if text is not None and text.ndim == 3:  # one item for the whole video
            text, text_mask = text[:, None], None if text_mask is None else text_mask[:, None]
        t_items = _timestep_per_item(t, image_t, frames, 0 if text is None else text.shape[1])
        text_items = _concatenate_items(text, image_text).astype(dtype)
        if config.encoder_hid_dim is not None:  # T5's width to Stable Diffusion's, for instance
            text_items = layers.dense(config.cross_attention_dim, dtype=dtype, name="encoder_hid_proj")(text_items)
        mask_items = _mask_per_item(text, text_mask, image_text, image_text_mask)
        temb = TimestepEmbedding(config.block_out_channels[0], dtype, name="time_embedding")(t_items)
        temb = self._add_noise_level(temb, noise_level)
        caption = additions.caption_embedding(config, text_items, mask_items, temb, dtype)
        cond = Conditioning(temb, text_items, caption, mask_items)
        velocity = additions.velocity(config, text_items, mask_items, frames, dtype)

        def temporal_module(present, name, h):
            return remat_block(TemporalModule, self.remat)(s, name=name)(h, temb) if present else h

        h = layers.conv(config.block_out_channels[0], (3, 3), name="conv_in", dtype=dtype)(x.astype(dtype))
        h = additions.add_frames_around(config, h, x, velocity, frames, dtype)
        levels, count = range(len(config.block_out_channels)), config.layers_per_block + 1
        sources = None
        if config.move_key_frames:
            sources = pixel_latents.sources(x[:, : frames.video], config.out_channels)
            embedding = pixel_latents.SourceEmbedding(h.shape[-1], dtype, name="source_embedding_temporal")(sources)
            h = on_video(lambda y: y + embedding, h, frames)
        skips, wanted = [h], config.skip_connections if deep is None else depth
        for level in levels:
            if len(skips) == wanted:
                break
            block = remat_block(DownBlock, self.remat)(s, level, wanted - len(skips), name=f"down_blocks_{level}")
            h, level_skips = block(h, cond)
            # Without the barrier the compiler may keep the operands of these sums alive until the way up.
            h, level_skips = jax.lax.optimization_barrier((h, level_skips))
            skips += level_skips
            h = temporal_module(level in config.down_temporal_idx, f"down_temporal_blocks_{level}", h)
        if deep is None:
            h = remat_block(MidBlock, self.remat)(s, name="mid_block")(h, cond)
            h = temporal_module(config.mid_temporal, "mid_temporal_block", h)
        else:
            h = deep
        for i, level in enumerate(reversed(levels)):
            level_skips = skips[level * count : (level + 1) * count]
            if not level_skips:  # a level that `deep` replaces
                continue
            size = skips[level * count - 1].shape[2:4] if level else None  # odd where a side was odd
            up = remat_block(UpBlock, self.remat, static_argnums=(4,))(s, level, name=f"up_blocks_{i}")
            h = up(h, level_skips, cond, size)
            h = temporal_module(i in config.up_temporal_idx, f"up_temporal_blocks_{i}", h)

        h = GroupNorm(config.norm_num_groups, config.norm_eps, frames, dtype, name="conv_norm_out")(h)
        prediction = layers.conv(config.out_channels, (3, 3), name="conv_out", dtype=dtype, zero=True)(nn.silu(h))
        prediction = prediction.astype(jnp.float32)
        if sources is not None:
            mixture = pixel_latents.SourceMixture(name="source_mixture_temporal")
            prediction = on_video(lambda y: mixture(sources, h[:, : frames.video], y), prediction, frames)
        return additions.add_condition(config, prediction, x, velocity, temb, frames)

    def _add_noise_level(self, temb: Array, noise_level: Array | None) -> Array:
        classes = self.config.num_class_embeds
        if (noise_level is None) != (classes is None):
            raise ValueError("noise_level is required by a UNet with num_class_embeds, and not allowed in any other.")
        if classes is None:
            return temb
        embed = nn.Embed(classes, temb.shape[-1], dtype=self.dtype, name="class_embedding")
        return temb + embed(noise_level)[:, None]


def deep_features(config: UNetConfig, intermediates: Mapping[str, Any], depth: int) -> Float[Array, "b frames h w c"]:
    """Returns the features that entered the last `depth` residual blocks on the way up.

    `intermediates` is what `UNet.apply(..., mutable="intermediates")` returns in addition to the prediction.
    """
    count = config.layers_per_block + 1
    level = (depth - 1) // count
    block = intermediates[f"up_blocks_{len(config.block_out_channels) - 1 - level}"]
    return block[f"into_{(level + 1) * count - depth}"][0]


def split_frames(x: Array, text: Array | None, image_text: Array | None) -> Frames:
    """Returns the numbers of video frames and images in x. Raises ValueError if the texts do not match."""
    images = 0 if image_text is None else image_text.shape[1]
    video = x.shape[1] - images
    if text is not None and text.ndim == 4 and text.shape[1] != video:
        raise ValueError(f"The video has {video} frames, but text for {text.shape[1]}.")
    if video < 0 or (video > 0) != (text is not None):
        raise ValueError(
            f"{x.shape[1]} frames with {images} image captions leave {video} for the video, whose text is "
            f"{'missing' if text is None else 'given'}: a video needs a text, and a text a video."
        )
    return Frames(video, images)


def _timestep_per_item(t: Array, image_t: Array | None, frames: Frames, texts: int) -> Num[Array, "b items"]:
    """The timesteps of the video, which has `texts` items, and of the images."""
    if image_t is None:
        image_t = jnp.broadcast_to(t[:, None], (t.shape[0], frames.images))
    video_t = jnp.broadcast_to(t[:, None], (t.shape[0], texts))
    return jnp.concatenate([video_t, image_t], axis=1) if frames.video else image_t


def _concatenate_items(video: Array | None, images: Array | None) -> Array:
    items = [] if video is None else [video]
    return jnp.concatenate(items if images is None else [*items, images], axis=1)


def _mask_per_item(text, text_mask, image_text, image_text_mask) -> Bool[Array, "b items l"] | None:
    """Concatenates the masks; where only one is given, all tokens of the other text are real."""
    if text_mask is None and image_text_mask is None:
        return None
    masks = [
        jnp.ones(tokens.shape[:-1], bool) if mask is None and tokens is not None else mask
        for tokens, mask in ((text, text_mask), (image_text, image_text_mask))
    ]
    return _concatenate_items(*masks)
