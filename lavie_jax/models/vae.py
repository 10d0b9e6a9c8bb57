"""The image autoencoder of latent diffusion (arXiv 2112.10752, section 3.1 and appendix E.1).

Those of Stable Diffusion (f = 8) and of the x4-upscaler (f = 4), with diffusers' parameter layout, and small ones for
small datasets: `patch_size` > 1 folds squares of pixels into channels before the first convolution, which makes all
layers cheaper by that factor. Without levels (`block_out_channels=()`) the folded pixels are the latents: there is
nothing to train, and nothing is lost. Latents here are raw; callers multiply them by `scaling_factor`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lavie_jax import random
from lavie_jax.errors import UserError
from lavie_jax.models.attention import attention
from lavie_jax.models.config import check_positive, config_from_dict
from lavie_jax.models.layers import Downsample, GroupNorm, ResnetBlock, Upsample, conv, dense
from lavie_jax.models.precision import conv_general_dilated

EPS = 1e-6  # of every group norm in a VAE; 1e-5 in the UNet's residual blocks
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
VAE_PIXELS = 4 * 320 * 512  # pixels that callers pass at a time per device, to bound memory: 4 frames of the base


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Fields of diffusers' AutoencoderKL, with its defaults, and `patch_size`. Raises UserError for invalid values."""

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
        folded = self.in_channels * self.patch_size**2
        if not self.block_out_channels and (self.latent_channels, self.out_channels) != (folded, self.in_channels):
            raise UserError(
                "VAEConfig.block_out_channels must have at least one width. Without any, latents are folded pixels: "
                f"latent_channels must be {folded}, and out_channels {self.in_channels}"
            )
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise UserError(
                    f"VAEConfig.block_out_channels: {width} is not a positive multiple of "
                    f"norm_num_groups = {self.norm_num_groups}"
                )

    @property
    def factor(self) -> int:
        """Downsampling factor: the side, in pixels, of the square that one latent pixel represents."""
        return self.patch_size * 2 ** max(len(self.block_out_channels) - 1, 0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """Inverse of `to_dict`. Raises UserError for unknown names and wrong types."""
        return config_from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent."""
        return dataclasses.asdict(self) | {"block_out_channels": list(self.block_out_channels)}


class VAE(nn.Module):
    """Encodes images (..., H, W, C_in) in [-1, 1] to a Gaussian over latents (..., h, w, C), and decodes latents.

    h = H / factor, w = W / factor. Outputs are float32. Images do not influence each other.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    attention_kernel: str = "auto"

    def setup(self):
        """Creates the layers: encoding and decoding are separate methods, so `nn.compact` does not fit."""
        latent = self.config.latent_channels
        if not self.config.block_out_channels:
            return
        self.encoder = Encoder(self.config, self.dtype, self.attention_kernel)
        self.decoder = Decoder(self.config, self.dtype, self.attention_kernel)
        pixelwise = {"padding": 0, "dtype": self.dtype, "conv_general_dilated": conv_general_dilated}
        self.quant_conv = nn.Conv(2 * latent, (1, 1), **pixelwise)
        self.post_quant_conv = nn.Conv(latent, (1, 1), **pixelwise)

    def __call__(self, images: Float[Array, "*b H W c"]) -> Float[Array, "*b H W d"]:
        """Reconstructs images from the posterior's mean; uses both halves, as initialization must."""
        return self.decode(self.encode(images)[0])

    def encode(self, images: Float[Array, "*b H W c"]) -> tuple[Float[Array, "*b h w C"], Float[Array, "*b h w C"]]:
        """Returns the posterior's mean and its log-variance, clamped to [-30, 20]; -inf without levels.

        Raises:
            UserError: the patch size does not divide the sides.
        """
        p = self.config.patch_size
        height, width = images.shape[-3:-1]
        if height % p or width % p:
            raise UserError(
                f"images of {height}x{width} cannot be split into patches: both sides must be multiples of {p}"
            )
        x, lead = einops.pack([images], "* h w c")
        x = einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        if not self.config.block_out_channels:
            mean = einops.unpack(x.astype(jnp.float32), lead, "* h w c")[0]
            return mean, jnp.full_like(mean, -jnp.inf)  # no variance: every sample is the mean
        moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
        mean, logvar = jnp.split(einops.unpack(moments, lead, "* h w c")[0], 2, axis=-1)
        return mean, jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)

    def decode(self, latents: Float[Array, "*b h w C"]) -> Float[Array, "*b H W c"]:
        """Decodes raw (unscaled) latents to images, without clipping them."""
        p = self.config.patch_size
        z, lead = einops.pack([latents], "* h w c")
        x = (self.decoder(self.post_quant_conv(z)) if self.config.block_out_channels else z).astype(jnp.float32)
        x = einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
        return einops.unpack(x, lead, "* h w c")[0]


def sample_posterior(
    mean: Float[Array, "*b h w C"], logvar: Float[Array, "*b h w C"], rng: random.Key
) -> Float[Array, "*b h w C"]:
    """Samples z = mean + exp(logvar / 2) eps from the encoder's posterior."""
    return mean + jnp.exp(0.5 * logvar) * random.normal(rng, mean.shape)


class Encoder(nn.Module):
    """Patched images (B, H, W, C_in p^2) to moments (B, h, w, 2 C)."""

    config: VAEConfig
    dtype: DTypeLike
    attention_kernel: str

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        config, widths = self.config, self.config.block_out_channels
        x = conv(widths[0], (3, 3), name="conv_in", dtype=self.dtype)(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = DownBlock(config, width, not last, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(config, self.dtype, self.attention_kernel, name="mid_block")(x)
        return head(x, config, 2 * config.latent_channels, self.dtype)


class Decoder(nn.Module):
    """Latents (B, h, w, C) to patched images (B, H, W, C_out p^2)."""

    config: VAEConfig
    dtype: DTypeLike
    attention_kernel: str

    @nn.compact
    def __call__(self, z: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
        config, widths = self.config, self.config.block_out_channels[::-1]
        x = conv(widths[0], (3, 3), name="conv_in", dtype=self.dtype)(z)
        x = MidBlock(config, self.dtype, self.attention_kernel, name="mid_block")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = UpBlock(config, width, not last, self.dtype, name=f"up_blocks_{i}")(x)
        return head(x, config, config.out_channels * config.patch_size**2, self.dtype)


class DownBlock(nn.Module):
    """Residual blocks of one width; then, with `downsample`, a convolution that halves the sides."""

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
    """Residual blocks of one width, one more than in `DownBlock`; then, with `upsample`, a doubling of the sides."""

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
    """Residual block, attention over all positions, residual block."""

    config: VAEConfig
    dtype: DTypeLike
    attention_kernel: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        config, width = self.config, self.config.block_out_channels[-1]
        x = resnet(config, width, self.dtype, "resnets_0")(x)
        x = SpatialAttention(config, self.dtype, self.attention_kernel, name="attentions_0")(x)
        return resnet(config, width, self.dtype, "resnets_1")(x)


class SpatialAttention(nn.Module):
    """Residual self-attention over all positions of an image, with one head as wide as the layer."""

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
    """Applies the norm, SiLU and convolution that end both halves; adds their parameters to the calling module."""
    x = GroupNorm(config.norm_num_groups, EPS, dtype=dtype, name="conv_norm_out")(x)
    return conv(features, (3, 3), name="conv_out", dtype=dtype)(nn.silu(x))


def resnet(config: VAEConfig, width: int, dtype: DTypeLike, name: str) -> ResnetBlock:
    """Returns a residual block without a time embedding; adds its parameters to the calling module."""
    return ResnetBlock(width, config.norm_num_groups, EPS, dtype=dtype, name=name)
