"""The image autoencoder of latent diffusion (arXiv 2112.10752, section 3.1 and appendix E.1).

Stable Diffusion's (f = 8) and x4-upscaler's (f = 4) as diffusers lays them out, and small ones for small
worlds: `patch_size` > 1 folds squares of pixels into channels before the first convolution, which makes
every layer that much cheaper. Latents here are raw; callers multiply them by `scaling_factor`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lavie_jax.errors import UserError
from lavie_jax.models.attention import attention
from lavie_jax.models.config import check_positive, config_from_dict, only_supported
from lavie_jax.models.layers import Downsample, GroupNorm, ResnetBlock, Upsample, conv, dense

EPS = 1e-6  # of every group norm in a VAE; the UNet's resnets have 1e-5
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
VAE_PIXELS = 4 * 320 * 512  # that callers give a device's VAE at a time, for memory: 4 frames of the base stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Names and defaults of diffusers' AutoencoderKL, and `patch_size`. UserError for impossible values."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    patch_size: int = 1

    def __post_init__(self):
        sizes = {n: v for n, v in dataclasses.asdict(self).items() if type(v) is int}
        check_positive("VAEConfig", **sizes)
        if not self.block_out_channels:
            raise UserError("VAEConfig.block_out_channels: at least one width is needed")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise UserError(
                    f"VAEConfig.block_out_channels: {width} is not a positive multiple of "
                    f"norm_num_groups = {self.norm_num_groups}"
                )

    @property
    def factor(self) -> int:
        """Pixels on the side of the square that one latent stands for."""
        return self.patch_size * 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """From what `to_dict` gave; UserError for unknown names and wrong types."""
        return config_from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return dataclasses.asdict(self) | {"block_out_channels": list(self.block_out_channels)}

    @classmethod
    def from_diffusers(cls, json: Mapping[str, Any]) -> "VAEConfig":
        """From `vae/config.json`. UserError names a field that is unknown or cannot be had here."""
        levels = len(json.get("block_out_channels", cls.block_out_channels))
        supported = {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
            "mid_block_add_attention": True,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
        }
        only_supported("the VAE's config.json", json, supported)
        no_effect = {"sample_size", "force_upcast"}
        ours = {n: v for n, v in json.items() if n not in no_effect and n not in supported and not n.startswith("_")}
        return config_from_dict(cls, ours)


class VAE(nn.Module):
    """Images (..., H, W, C_in) in [-1, 1] to a Gaussian over latents (..., h, w, C), and latents to images.

    h = H / factor, w = W / factor; what is returned is float32. Every image is on its own.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "auto"

    def setup(self):
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype, self.attention_kernel)
        self.decoder = Decoder(self.config, self.dtype, self.attention_kernel)
        self.quant_conv = nn.Conv(2 * latent, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(latent, (1, 1), dtype=self.dtype)

    def __call__(self, images: Float[Array, "*b H W c"]) -> Float[Array, "*b H W d"]:
        """The images made again from the posterior's mean; runs both halves, as initialisation needs."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: Float[Array, "*b H W c"]) -> tuple[Float[Array, "*b h w C"], Float[Array, "*b h w C"]]:
        """The posterior's mean and log-variance, the latter clamped to [-30, 20].

        UserError when the patch size does not divide the sides.
        """
        p = self.config.patch_size
        height, width = images.shape[-3:-1]
        if height % p or width % p:
            raise UserError(f"images of {height}x{width} do not divide into patches of {p}x{p}")
        x, lead = einops.pack([images], "* h w c")
        x = einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
        mean, logvar = jnp.split(einops.unpack(moments, lead, "* h w c")[0], 2, axis=-1)
        return mean, jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)

    def decode(self, latents: Float[Array, "*b h w C"]) -> Float[Array, "*b H W c"]:
        """Images of raw (unscaled) latents, not clipped."""
        p = self.config.patch_size
        z, lead = einops.pack([latents], "* h w c")
        x = self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
        x = einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
        return einops.unpack(x, lead, "* h w c")[0]


def sample_posterior(
    mean: Float[Array, "*b h w C"], logvar: Float[Array, "*b h w C"], rng: jax.Array
) -> Float[Array, "*b h w C"]:
    """One draw z = mean + exp(logvar / 2) eps from the encoder's posterior."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape, mean.dtype)


class Encoder(nn.Module):
    """(B, H, W, C_in p^2) to moments (B, h, w, 2 C)."""

    config: VAEConfig
    dtype: DTypeLike
    attention_kernel: str

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        cfg, widths = self.config, self.config.block_out_channels
        x = conv(widths[0], (3, 3), name="conv_in", dtype=self.dtype)(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = DownBlock(cfg, width, not last, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(cfg, self.dtype, self.attention_kernel, name="mid_block")(x)
        return head(x, cfg, 2 * cfg.latent_channels, self.dtype)


class Decoder(nn.Module):
    """Latents (B, h, w, C) to (B, H, W, C_out p^2)."""

    config: VAEConfig
    dtype: DTypeLike
    attention_kernel: str

    @nn.compact
    def __call__(self, z: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
        cfg, widths = self.config, self.config.block_out_channels[::-1]
        x = conv(widths[0], (3, 3), name="conv_in", dtype=self.dtype)(z)
        x = MidBlock(cfg, self.dtype, self.attention_kernel, name="mid_block")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = UpBlock(cfg, width, not last, self.dtype, name=f"up_blocks_{i}")(x)
        return head(x, cfg, cfg.out_channels * cfg.patch_size**2, self.dtype)


class DownBlock(nn.Module):
    """Residual blocks of one width, then half the sides, where `downsample` says so."""

    config: VAEConfig
    width: int
    downsample: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        for i in range(self.config.layers_per_block):
            x = resnet(self.config, self.width, self.dtype, f"resnets_{i}")(x)
        if self.downsample:
            x = Downsample(self.width, padding=(0, 1), dtype=self.dtype, name="downsamplers_0")(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one width, one more than on the way down, then twice the sides, likewise."""

    config: VAEConfig
    width: int
    upsample: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        for i in range(self.config.layers_per_block + 1):
            x = resnet(self.config, self.width, self.dtype, f"resnets_{i}")(x)
        if self.upsample:
            x = Upsample(self.width, dtype=self.dtype, name="upsamplers_0")(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention over all places, residual block."""

    config: VAEConfig
    dtype: DTypeLike
    attention_kernel: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        cfg, width = self.config, self.config.block_out_channels[-1]
        x = resnet(cfg, width, self.dtype, "resnets_0")(x)
        x = SpatialAttention(cfg, self.dtype, self.attention_kernel, name="attentions_0")(x)
        return resnet(cfg, width, self.dtype, "resnets_1")(x)


class SpatialAttention(nn.Module):
    """Residual self-attention over all places of an image, with one head as wide as the layer."""

    config: VAEConfig
    dtype: DTypeLike
    kernel: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        height, width, features = x.shape[1:]
        y = GroupNorm(self.config.norm_num_groups, EPS, dtype=self.dtype, name="group_norm")(x)
        y = einops.rearrange(y, "b h w d -> b (h w) 1 d")
        q, k, v = (dense(features, dtype=self.dtype, name=n)(y) for n in ("to_q", "to_k", "to_v"))
        y = attention(q, k, v, kernel=self.kernel)
        y = dense(features, dtype=self.dtype, name="to_out_0")(y)
        return x + einops.rearrange(y, "b (h w) 1 d -> b h w d", h=height, w=width)


def head(x: Float[Array, "b h w c"], config: VAEConfig, features: int, dtype: DTypeLike) -> Array:
    """Norm, SiLU and convolution that end both halves; adds its parameters to the calling module."""
    x = GroupNorm(config.norm_num_groups, EPS, dtype=dtype, name="conv_norm_out")(x)
    return conv(features, (3, 3), name="conv_out", dtype=dtype)(nn.silu(x))


def resnet(config: VAEConfig, width: int, dtype: DTypeLike, name: str) -> ResnetBlock:
    """A residual block without time; adds its parameters to the calling module."""
    return ResnetBlock(width, config.norm_num_groups, EPS, dtype=dtype, name=name)
