"""Training the UNet of a stage: joint image-video fine-tuning (LaVie section 3.2, Eq. 3).

The VAE is frozen and encodes within the step, one draw from its posterior an image. The text encoder is
frozen too, or, in a small world whose words no released encoder knows as a world of their own, trained
along. What a stage feeds its UNet is in `stages.py`, the loss in `diffusion/loss.py`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from lavie_jax import stages, weights
from lavie_jax.diffusion.loss import joint_loss, min_snr_weight
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText
from lavie_jax.models.unet import UNet
from lavie_jax.models.vae import VAE, sample_posterior
from lavie_jax.training.optimizer import check_number
from lavie_jax.training.step import Batch, Losses, Task
from lavie_jax.weights.names import ZERO_AT_FIRST


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionLoss:
    """The loss of a stage. The paper gives neither alpha nor a weighting over timesteps."""

    alpha: float = 1.0  # of the images in L = L_video + alpha L_image (Eq. 3)
    min_snr_gamma: float = 0.0  # min-SNR weighting (arXiv 2303.09556); 0 = none
    high_noise: float = 0.0  # weight (1 + h) (t / steps)^h: what a clip shows is decided at high noise; 0 = none
    # (m, s): t / steps = sigmoid(normal(m, s)), "logit-normal" (arXiv 2403.03206, sec. 3.1); () = uniform
    logit_normal: tuple[float, ...] = ()
    held_out_timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)

    def __post_init__(self):
        for name in ("alpha", "min_snr_gamma", "high_noise"):
            check_number(f"loss.{name}", getattr(self, name), low=0)
        if self.logit_normal and not (len(self.logit_normal) == 2 and self.logit_normal[1] > 0):
            raise UserError(
                f"loss.logit_normal is (mean, scale) with a scale above 0, or () for none; given {self.logit_normal}."
            )
        if not self.held_out_timesteps:
            raise UserError("loss.held_out_timesteps: at least one timestep is needed.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The networks of a stage; all compute in `dtype`."""

    unet: UNet
    text_encoder: CLIPText
    vae: VAE
    schedule: Schedule


def make_diffusion_task(
    stage: str,
    models: Models,
    loss: DiffusionLoss,
    *,
    frames: int,
    images: int,
    size: tuple[int, int],
    regime: str,
    train_text_encoder: bool,
    start: Any,
    frozen: Mapping[str, Any],
    sampling: Mapping[str, Any],
    tokenizer: Any,
) -> Task:
    """The task of every config but the VAE's. Parameters: {"unet": ..., "text_encoder": ... if trained}.

    Args:
      stage: "base" (the others bring conditions of their own).
      models: the networks.
      loss: weights of the loss.
      frames, images: T and M of the batches; either may be 0.
      size: (H, W) of the frames, in pixels.
      regime: see `optimizer.REGIMES`.
      train_text_encoder: along with the UNet; otherwise it comes with `frozen`.
      start: parameters to start from, or None.
      frozen: parameters of "vae", and of "text_encoder" if that is not trained.
      sampling: the sampling settings to write into the exported weights folder.
      tokenizer: what `weights.save_folder` takes, for the same folder.
    """
    definition = stages.STAGES[stage]
    vae, schedule = models.vae, models.schedule
    if not all(0 <= t < schedule.steps for t in loss.held_out_timesteps):
        raise UserError(f"loss.held_out_timesteps {loss.held_out_timesteps} must be from 0 to {schedule.steps - 1}.")

    def init(rng: jax.Array) -> Any:
        """T = 1 at initialisation even without videos: the parameters of the temporal layers must exist."""
        rngs = jax.random.split(rng)
        latents = jnp.zeros(
            (1, 1, size[0] // vae.config.factor, size[1] // vae.config.factor, vae.config.latent_channels)
        )
        text = jnp.zeros((1, 2, models.unet.config.cross_attention_dim))
        params = {"unet": models.unet.init(rngs[0], latents, jnp.zeros((1,), jnp.int32), text)["params"]}
        if train_text_encoder:
            params["text_encoder"] = models.text_encoder.init(rngs[1], jnp.zeros((1, 2), jnp.int32))["params"]
        return params

    def encode(params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[Array, stages.Text]:
        parts = [batch[k] for k, n in (("video", frames), ("images", images)) if n]
        latents = encode_frames(vae, frozen["vae"], jnp.concatenate(parts, axis=1), rng)
        text_params = params["text_encoder"] if train_text_encoder else frozen["text_encoder"]
        return latents, encode_text(
            models.text_encoder,
            text_params,
            batch["tokens"] if frames else None,
            batch["image_tokens"] if images else None,
        )

    def losses(params: Any, pair: stages.TrainingPair, text: stages.Text) -> tuple[jax.Array, Losses]:
        prediction = stages.predict(models.unet, params["unet"], pair, text)
        weight = timestep_weight(schedule, pair.frame_t, loss)
        return joint_loss(prediction, pair.target, weight, frames, loss.alpha)

    def named(parts: Losses) -> Losses:
        return {f"{k}_loss": v for k, v in parts.items() if {"video": frames, "image": images}[k]}

    def train_loss(params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Losses]:
        vae_rng, pair_rng = jax.random.split(rng)
        latents, text = encode(params, frozen, batch, vae_rng)
        pair = definition.training_pair(
            latents, {}, pair_rng, images=images, schedule=schedule, draw=timestep_distribution(schedule, loss)
        )
        value, parts = losses(params, pair, text)
        return value, named(parts)

    def held_out(params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> Losses:
        """The losses at each of the fixed timesteps, with the same noise every time; and their mean."""
        vae_rng, noise_rng = jax.random.split(rng)
        latents, text = encode(params, frozen, batch, vae_rng)
        eps = jax.random.normal(noise_rng, latents.shape)

        def at(step: Array) -> Losses:
            t = jnp.full((latents.shape[0],), step)
            image_t = jnp.full((latents.shape[0], images), step)
            pair = definition.training_pair_at(latents, {}, t, image_t, eps, schedule=schedule)
            return named(losses(params, pair, text)[1])

        by_t = jax.lax.map(at, jnp.asarray(loss.held_out_timesteps))
        each = {f"{k}_t{t}": v[i] for k, v in by_t.items() for i, t in enumerate(loss.held_out_timesteps)}
        return {**{k: v.mean() for k, v in by_t.items()}, **each}

    def export(path: Path, params: Any, values: Mapping[str, float]) -> None:
        text_params = params["text_encoder"] if train_text_encoder else frozen["text_encoder"]
        weights.save_folder(
            path,
            stage=stage,
            sampling=dict(sampling),
            unet=(models.unet.config, params["unet"]),
            vae=(vae.config, frozen["vae"]),
            text_encoder=(models.text_encoder.config, text_params),
            tokenizer=tokenizer,
            schedule=schedule,
            overwrite=True,
        )

    return Task(
        init=init, start=start, frozen=frozen, loss=train_loss, held_out=held_out, export=export,
        regime=regime, images_only=frames == 0,
    )  # fmt: skip


def encode_frames(
    vae: VAE, params: Any, frames: Float[Array, "b f H W 3"], rng: jax.Array
) -> Float[Array, "b f h w c"]:
    """Scaled latents: one draw from the posterior of every frame. No gradient."""
    draw = sample_posterior(*vae.apply({"params": params}, frames, method="encode"), rng)
    return jax.lax.stop_gradient(draw * vae.config.scaling_factor)


def encode_text(
    encoder: CLIPText,
    params: Any,
    tokens: Int[Array, "b l"] | None,
    image_tokens: Int[Array, "b m l"] | None,
) -> stages.Text:
    """The captions of the videos and of the images, through the encoder in one call."""
    parts = [] if tokens is None else [tokens[:, None]]
    every = jnp.concatenate(parts if image_tokens is None else [*parts, image_tokens], axis=1)
    text = encoder.apply({"params": params}, einops.rearrange(every, "b n l -> (b n) l"))
    text = einops.rearrange(text, "(b n) l d -> b n l d", b=every.shape[0])
    video = None if tokens is None else text[:, 0]
    return stages.Text(video, None if image_tokens is None else text[:, len(parts) :])


def timestep_distribution(schedule: Schedule, loss: DiffusionLoss) -> stages.DrawTimesteps:
    """(rng, shape) -> the timesteps that a step trains, int32: uniform, or more of some than of others."""
    if not loss.logit_normal:
        return stages.uniform_timesteps(schedule)
    mean, scale = loss.logit_normal

    def draw(rng: jax.Array, shape: tuple[int, ...]) -> Array:
        part = jax.nn.sigmoid(mean + scale * jax.random.normal(rng, shape))
        return jnp.clip((part * schedule.steps).astype(jnp.int32), 0, schedule.steps - 1)

    return draw


def timestep_weight(schedule: Schedule, t: Int[Array, "b f"], loss: DiffusionLoss) -> Float[Array, "b f"]:
    """The loss weight of each frame's timestep."""
    weight = jnp.ones(t.shape)
    if loss.min_snr_gamma:
        weight *= min_snr_weight(schedule, t, loss.min_snr_gamma)
    if loss.high_noise:
        weight *= (1.0 + loss.high_noise) * ((t + 0.5) / schedule.steps) ** loss.high_noise
    return weight


def image_as_video(params: Mapping[str, Any]) -> dict[str, Any]:
    """The UNet of an image model, inflated (LaVie section 3.1): temporal attention adds nothing at first.

    What writes into the residual stream is set to zero, weights and biases, so that a clip of T copies of
    one image comes out as that image does in the image model.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    zeroed = {k: np.zeros_like(v) if ZERO_AT_FIRST.search(k) else v for k, v in flat.items()}
    return traverse_util.unflatten_dict(zeroed, sep="/")
