"""Training the VAE of Moving Shapes (arXiv 2112.10752, section 3.1, without the adversarial loss).

Large flat backgrounds are easy to reconstruct and would dominate the loss, so the error of each pixel is weighted by
how much its neighbourhood differs from the colour of the image's border.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lavie_jax import weights
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.vae import VAE, VAEConfig, sample_posterior
from lavie_jax.stages.clips import pixels_to_float
from lavie_jax.training.optimizer import check_number
from lavie_jax.training.step import Batch, Losses, Task, check_same


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Settings of the VAE's loss, all chosen on Moving Shapes."""

    kl: float = 1e-4  # weight of the KL divergence per latent value
    detail: float = 10.0  # extra weight of pixels that differ from the border
    crop: int = 0  # train on squares of this side around such pixels; 0 = whole frames

    def __post_init__(self):
        for name in ("kl", "detail", "crop"):
            check_number(f"loss.{name}", getattr(self, name), low=0)


def make_autoencoder_task(
    config: VAEConfig,
    loss: AutoencoderLoss,
    *,
    side: tuple[int, int],
    dtype: DTypeLike,
    init_from: str = "",
) -> Task:
    """Makes the task of `configs/moving_shapes/vae.py`. Images and video frames of a batch count the same.

    Args:
      config: the architecture; its `scaling_factor` is replaced by 1 / std of the latents at export.
      loss: settings of the loss.
      side: (H, W) of the frames.
      dtype: dtype of the computation.
      init_from: a weights folder whose VAE to start from, or "".

    Raises:
      UserError: sizes that do not fit the VAE; another architecture in `init_from`.
    """
    for name, length in (("height", side[0]), ("width", side[1]), ("loss.crop", loss.crop)):
        if length % config.factor:
            raise UserError(f"{name} = {length} is not a multiple of the VAE's factor {config.factor}.")
    if loss.crop > min(side):
        raise UserError(f"loss.crop = {loss.crop} is larger than the frames, {side[0]}x{side[1]}.")
    start = None
    if init_from:
        part = weights.load_part(init_from, "vae", dtype=np.float32)
        check_same(part.config, config, init_from, ignore="scaling_factor")
        start = part.params
    vae = VAE(config, dtype=dtype)

    def init(rng: jax.Array) -> Any:
        return vae.init(rng, **registry.example_inputs(config))["params"]

    def train_loss(params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Losses]:
        crop_rng, rng = jax.random.split(rng)
        images = all_frames(batch)
        if loss.crop:
            images = crop_detail(images, loss.crop, crop_rng)
        values, _ = _evaluate(params, images, rng)
        return values["reconstruction"] + loss.kl * values["kl"], values

    def held_out(params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> Losses:
        values, latents = _evaluate(params, all_frames(batch), rng)
        return {**values, "latent_std": latents.std()}

    def _evaluate(params: Any, images: Array, rng: jax.Array) -> tuple[Losses, Array]:
        mean, logvar = vae.apply({"params": params}, images, method="encode")
        latents = sample_posterior(mean, logvar, rng)
        error = vae.apply({"params": params}, latents, method="decode") - images
        weight = detail_weight(images, loss.detail)
        values = {
            # L1 keeps edges sharp, L2 punishes wrong colours.
            "reconstruction": (weight * (jnp.abs(error) + jnp.square(error))).mean(),
            "kl": 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean(),
            "psnr": -10.0 * jnp.log10(jnp.square(error / 2).mean()),
        }
        return values, latents

    def export(path: Path, params: Any, values: Mapping[str, float]) -> None:
        # Diffusion needs latents of unit variance (arXiv 2112.10752, appendix G).
        scaled = dataclasses.replace(config, scaling_factor=1.0 / float(values["latent_std"]))
        weights.save_folder(path, stage="vae", vae=(scaled, params), overwrite=True)

    return Task(
        init=init, start=start, frozen={}, loss=train_loss, held_out=held_out, export=export,
        judged_by="reconstruction",
    )  # fmt: skip


def all_frames(batch: Batch) -> Float[Array, "n h w c"]:
    """Returns the frames of the videos and the images of a batch as one batch of images in [-1, 1]."""
    parts = [batch[k] for k in ("video", "images") if k in batch and batch[k].shape[1]]
    return pixels_to_float(jnp.concatenate([einops.rearrange(x, "b f h w c -> (b f) h w c") for x in parts]))


def detail(images: Float[Array, "n h w c"]) -> Float[Array, "n h w 1"]:
    """Returns 0 where the 5x5 neighbourhood has the colour of the image's border, up to 1 where it differs."""
    border = jnp.concatenate(
        [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1
    )  # (N, 2 (H + W), C)
    colour = jnp.median(border, axis=1)[:, None, None]
    distance = jnp.abs(images - colour).max(axis=-1, keepdims=True)
    near = nn.max_pool(distance, (5, 5), padding="SAME")
    return jnp.clip(near / 0.2, 0.0, 1.0)


def detail_weight(images: Float[Array, "n h w c"], extra: float) -> Float[Array, "n h w 1"]:
    """Returns 1 + extra * detail, scaled to mean 1 over each image."""
    weight = 1.0 + extra * detail(images)
    return weight / weight.mean(axis=(1, 2, 3), keepdims=True)


def crop_detail(images: Float[Array, "n h w c"], side: int, rng: jax.Array) -> Float[Array, "n s s c"]:
    """Returns a square of each image, centred up to half its side away from a random pixel with detail."""
    height, width = images.shape[1:3]
    pixel_rng, shift_rng = jax.random.split(rng)
    weight = einops.rearrange(detail(images), "n h w 1 -> n (h w)") + 1e-3
    pixel = jax.random.categorical(pixel_rng, jnp.log(weight))
    shift = jax.random.randint(shift_rng, (2, len(images)), -side, 1)
    # Shifted by up to half a side around the pixel, then clipped to the frame.
    top = jnp.clip(pixel // width + shift[0], 0, height - side)
    left = jnp.clip(pixel % width + shift[1], 0, width - side)
    slice_one = lambda image, y, x: jax.lax.dynamic_slice(image, (y, x, 0), (side, side, image.shape[-1]))  # noqa: E731
    return jax.vmap(slice_one)(images, top, left)
