"""Where the prediction of a UNet starts whose latents are folded pixels, those of a VAE without levels.

Such latents are known in part before the network runs: the low-resolution frame, enlarged, and the key frames around a
frame, moved to its time. The network predicts x0 as a correction of these.
"""

import math

import einops
import jax
from jaxtyping import Array, Float

CHANNELS = 3  # of a pixel


def patch_size(channels: int) -> int:
    """Returns the side of the squares of pixels that latents of so many channels are."""
    return math.isqrt(channels // CHANNELS)


def folded(pixels: Float[Array, "b f H W 3"], p: int) -> Float[Array, "b f h w c"]:
    """Folds squares of p x p pixels into channels, as `VAE.encode` does without levels."""
    return einops.rearrange(pixels, "b f (h p) (w q) c -> b f h w (p q c)", p=p, q=p)


def enlarged(x: Float[Array, "b f h w c_in"], channels: int) -> Float[Array, "b f h w c_out"]:
    """Enlarges the low-resolution frames behind x_t by bicubic interpolation, as latents of `channels`."""
    low_res, p = x[..., channels:], patch_size(channels)
    batch, frames, height, width, _ = low_res.shape
    large = jax.image.resize(low_res, (batch, frames, height * p, width * p, CHANNELS), "cubic")
    return folded(large, p)
