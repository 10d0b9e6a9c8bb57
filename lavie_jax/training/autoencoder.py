"""Training the VAE of Moving Shapes (arXiv 2112.10752, section 3.1, without the adversarial loss).

Large flat backgrounds are easy to reconstruct and would dominate the loss, so the error of each pixel is weighted by
how much its neighbourhood differs from the colour of the image's border.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lavie_jax import random, weights
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.vae import VAE, VAEConfig
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
        check_same(part.config, config, init_from, ignore=("scaling_factor",))
        start = part.params
    vae = VAE(config, dtype=dtype)

    def init(rng: jax.Array) -> Any:
        return vae.init(rng, **registry.example_inputs(config))["params"]

    def train_loss(params: Any, frozen: Any, batch: Batch, rng: random.Key) -> tuple[jax.Array, Losses]:
        """Returns the reconstruction error plus the weighted KL divergence, of crops of all frames and images."""
        crop_rng, rng = random.split(rng)
        images, rows = all_frames(batch), Rows.of(batch)
        if loss.crop:
            images = crop_detail(images, loss.crop, crop_rng, rows)
        values, _ = _evaluate(params, images, rows, rng)
        return values["reconstruction"] + loss.kl * values["kl"], values

    def held_out(params: Any, frozen: Any, batch: Batch, rng: random.Key) -> Losses:
        values, latents = _evaluate(params, all_frames(batch), Rows.of(batch), rng)
        return {**values, "latent_mean": latents.mean(), "latent_std": latents.std()}

    def _evaluate(params: Any, images: Array, rows: Rows, rng: random.Key) -> tuple[Losses, Array]:
        """Returns the losses of every image as means, and the sampled latents."""
        mean, logvar = vae.apply({"params": params}, images, method="encode")
        eps = rows.draw(rng, lambda key, count: jax.random.normal(key, (count, *mean.shape[1:])))
        latents = mean + jnp.exp(0.5 * logvar) * eps
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
        average=average_of_parts, judged_by="reconstruction",
    )  # fmt: skip


class Rows(NamedTuple):
    """The frames of a batch: those of the clips of all rows, then the images of all rows.

    Attributes:
        count: number of rows.
        frames: number of frames of a row's clip.
        images: number of images of a row.
    """

    count: int
    frames: int
    images: int

    @classmethod
    def of(cls, batch: Batch) -> "Rows":
        """Returns the rows of `batch`."""
        frames, images = (batch[k].shape[1] if k in batch else 0 for k in ("video", "images"))
        return cls(next(iter(batch.values())).shape[0], frames, images)

    def draw(self, key: random.Key, draw: Callable[[Array, int], Array]) -> Array:
        """Returns the random numbers of all frames; `draw(key, frames)` returns those of that many frames."""

        def by_row(key: Array, count: int) -> Array:
            """Returns `draw` for `count` rows of frames and images, grouped by row."""
            every = draw(key, count * (self.frames + self.images))
            video, images = jnp.split(every, [count * self.frames])
            parts = [(video, self.frames), (images, self.images)]
            return jnp.concatenate([einops.rearrange(x, "(b n) ... -> b n ...", n=n) for x, n in parts if n], axis=1)

        each = random.rows(key, self.count, by_row)
        video, images = jnp.split(each, [self.frames], axis=1)
        return jnp.concatenate([einops.rearrange(x, "b f ... -> (b f) ...") for x in (video, images)])


def average_of_parts(values: Losses) -> Losses:
    """Returns the values of a batch from those of its parts, (parts,): means of what is a mean over frames."""
    means = {name: x.mean() for name, x in values.items()}
    means["psnr"] = -10.0 * jnp.log10((10.0 ** (-values["psnr"] / 10.0)).mean())
    if "latent_std" in values:
        square = jnp.square(values["latent_std"]) + jnp.square(values["latent_mean"] - means["latent_mean"])
        means["latent_std"] = jnp.sqrt(square.mean())
    return means


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


def crop_detail(
    images: Float[Array, "n h w c"], side: int, rng: random.Key, rows: Rows | None = None
) -> Float[Array, "n s s c"]:
    """Returns a square of each image, centred up to half its side away from a random pixel with detail.

    `rows` are those of the batch that the images are from; None for images that are a row each.
    """
    height, width = images.shape[1:3]
    rows = rows or Rows(len(images), 0, 1)
    pixel_rng, shift_rng = random.split(rng)
    weight = einops.rearrange(detail(images), "n h w 1 -> n (h w)") + 1e-3
    # A sample of the categorical distribution, by the Gumbel-max trick, and as `jax.random.categorical` takes it.
    gumbel = rows.draw(pixel_rng, lambda key, count: jax.random.gumbel(key, (count, height * width)))
    pixel = jnp.argmax(gumbel + jnp.log(weight), axis=-1)
    shift = rows.draw(shift_rng, lambda key, count: jax.random.randint(key, (2, count), -side, 1).T).T
    # Shifted by up to half a side around the pixel, then clipped to the frame.
    top = jnp.clip(pixel // width + shift[0], 0, height - side)
    left = jnp.clip(pixel % width + shift[1], 0, width - side)
    slice_one = lambda image, y, x: jax.lax.dynamic_slice(image, (y, x, 0), (side, side, image.shape[-1]))  # noqa: E731
    return jax.vmap(slice_one)(images, top, left)
