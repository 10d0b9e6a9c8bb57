"""A perceptual part of a stage's loss: LPIPS (arXiv 1801.03924) of the predicted frames, for latents that are pixels.

An absolute or squared error alone is lowest for the median or mean of all possible frames, which is blurred. This part
is lower for sharp frames: with it, the network invents a texture where it cannot know the details.
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lavie_jax.data.config import DataConfig, latent_paths
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models.lpips import LPIPS, MIN_SIDE
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.weights.metric_weights import LPIPS_WEIGHTS, load_weights

FROZEN = "lpips"  # the name of its parameters among the frozen ones


def check(vae: VAEConfig, schedule: Schedule, data: DataConfig) -> None:
    """Raises UserError for fields of a stage's config with which predictions are not frames, or too small."""
    for wrong, advice in (
        (vae.block_out_channels, "needs latents that are pixels: set vae.block_out_channels=()"),
        (schedule.prediction != "sample", "needs a network that predicts x0: set schedule.prediction='sample'"),
        (latent_paths(data), "is computed from frames: set data.source to a source of videos"),
        (
            min(min(size) for size in data.sizes) < MIN_SIDE,
            f"needs frames of at least {MIN_SIDE} pixels a side: set data.height and data.width",
        ),
    ):
        if wrong:
            raise UserError(f"loss.perceptual {advice}.")


def load() -> dict[str, Any]:
    """Returns the parameters of LPIPS. Raises UserError if the package that contains them is missing."""
    return load_weights(LPIPS_WEIGHTS._replace(metric="loss.perceptual", flag=""))


def abstract() -> Any:
    """Returns the shapes of the parameters, for planning."""
    image = jnp.zeros((1, 64, 64, 3))
    return jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"]


def distances(
    params: Any, vae: VAE, prediction: Float[Array, "b f h w c"], target: Float[Array, "b f h w c"]
) -> Float[Array, "b f"]:
    """Returns LPIPS between each frame of the predicted and of the true latents."""
    frames = [
        einops.rearrange(vae.apply({}, x / vae.config.scaling_factor, method="decode"), "b f H W c -> (b f) H W c")
        for x in (prediction, jax.lax.stop_gradient(target))
    ]
    each, _ = LPIPS().apply({"params": jax.tree.map(jnp.float32, params)}, *frames)
    return einops.rearrange(each, "(b f) -> b f", b=prediction.shape[0])
