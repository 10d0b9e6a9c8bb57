"""What the condition of each stage is fed in training, made from the very frames that the stage is to produce.

    base            nothing
    interpolation   every 4th frame's latent, as the key frames of sampling are            LaVie sec. 3.3
    vsr             the frames at low resolution, and how much noise is added to them      LaVie sec. 3.4

How these inputs enter the UNet is `stages.Stage.condition`. Everything here works on a clip (B, T, ...) and on
images (B, M, 1, ...), which are clips of one frame.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from lavie_jax.errors import UserError
from lavie_jax.models.vae import VAEConfig, sample_posterior
from lavie_jax.samples.settings import MAX_NOISE_LEVEL
from lavie_jax.stages import KEY_FRAME_SPACING


class Clips(NamedTuple):
    """Frames as pixels in [-1, 1], None of sets of latents, and the VAE's posterior of each, unscaled."""

    pixels: Float[Array, "*n t H W 3"] | None
    mean: Float[Array, "*n t h w c"]
    logvar: Float[Array, "*n t h w c"]

    def cut(self, *index: slice | None) -> "Clips":
        """Behind the batch axis, as arrays are indexed."""
        return jax.tree.map(lambda x: x[:, *index], self)

    def certain(self) -> "Clips":
        """With a posterior of which every draw is the mean."""
        return self._replace(logvar=jnp.full_like(self.logvar, -jnp.inf))

    def draw(self, rng: Array, vae: VAEConfig) -> Float[Array, "*n t h w c"]:
        """Scaled latents: one draw from the posterior of every frame."""
        return sample_posterior(self.mean, self.logvar, rng) * vae.scaling_factor


def no_inputs(clips: Clips, vae: VAEConfig, rng: Array, level_rng: Array) -> dict:
    """Base: the text alone."""
    return {}


def key_frames(clips: Clips, vae: VAEConfig, rng: Array, level_rng: Array) -> dict:
    """Interpolation: `key_latents` of frames 0, 4, 8, ...

    They are draws of their own, not those of the targets: sampling, too, encodes the key frames once more.
    """
    keys = jax.tree.map(lambda x: x[..., ::KEY_FRAME_SPACING, :, :, :], clips)
    return {"key_latents": keys.draw(rng, vae)}


def low_resolution(clips: Clips, vae: VAEConfig, rng: Array, level_rng: Array) -> dict:
    """Super-resolution: `low_res` frames of the latents' size, `low_res_noise`, and a `noise_level` for each row.

    Each low-resolution pixel is the mean of the square that it stands for. The paper does not say how levels are
    drawn; here MAX_NOISE_LEVEL times the cube of a uniform number, because those one samples with are low (half of
    all are below 44, the released model's default is 50). The images of a row have the level of its clip, because the
    UNet takes one a row.
    """
    low_res = reduce(clips.pixels, "... (h i) (w j) c -> ... h w c", "mean", i=vae.factor, j=vae.factor)
    lead = low_res.shape[:-4]
    level = (jax.random.uniform(level_rng, lead[:1]) ** 3 * (MAX_NOISE_LEVEL + 1)).astype(jnp.int32)
    level = jnp.broadcast_to(level.reshape(-1, *(1,) * (len(lead) - 1)), lead)
    return {"low_res": low_res, "low_res_noise": jax.random.normal(rng, low_res.shape), "noise_level": level}


INPUTS: dict[str, Callable[[Clips, VAEConfig, Array, Array], dict]] = {
    "base": no_inputs,
    "interpolation": key_frames,
    "vsr": low_resolution,
}


def check_frames(stage: str, frames: int) -> None:
    """UserError for a clip that does not begin and end with a key frame."""
    if stage == "interpolation" and frames and (frames - 1) % KEY_FRAME_SPACING:
        low = frames - (frames - 1) % KEY_FRAME_SPACING
        raise UserError(
            f"data.frames = {frames}: interpolation trains on clips that begin and end with a key frame, of "
            f"{KEY_FRAME_SPACING} (K - 1) + 1 frames, such as {low} or {low + KEY_FRAME_SPACING}."
        )
