"""Training the UNet of a stage: joint image-video fine-tuning (LaVie section 3.2, Eq. 3).

The VAE is frozen and encodes within the step, one draw from its posterior an image (or its mean). The text encoder is
frozen too, or, in a small world whose words no released encoder knows as a world of their own, trained
along. What a stage feeds its UNet is in `stages/`,
the loss in `diffusion/loss.py`.
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

from lavie_jax import weights
from lavie_jax.diffusion.loss import joint_loss, min_snr_weight
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText
from lavie_jax.models.unet import UNet
from lavie_jax.models.vae import VAE, VAE_PIXELS
from lavie_jax.stages import conditioning
from lavie_jax.stages.conditioning import EncodedClips, Text, TrainingPair
from lavie_jax.stages.stage import Stage
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
    posterior_mean: bool = False  # learn the mean of the VAE's posterior, not draws from it: nothing is left to chance
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLoss:
    """The loss of one stage on batches of T `frames` and M `images`; either may be 0.

    Parameters are {"unet": ..., "text_encoder": ... if trained}, frozen ones {"vae": ..., "text_encoder": ... if not}.
    """

    stage: Stage
    models: Models
    loss: DiffusionLoss
    frames: int
    images: int
    train_text_encoder: bool

    def init(self, rng: jax.Array, size: tuple[int, int]) -> Any:
        """T = 1 at initialisation even without videos: the parameters of the temporal layers must exist."""
        rngs = jax.random.split(rng)
        unet, factor = self.models.unet, self.models.vae.config.factor
        x = jnp.zeros((1, 1, size[0] // factor, size[1] // factor, unet.config.in_channels))
        t, text = jnp.zeros((1,), jnp.int32), jnp.zeros((1, 2, unet.config.cross_attention_dim))
        level = None if unet.config.num_class_embeds is None else t
        params = {"unet": unet.init(rngs[0], x, t, text, noise_level=level)["params"]}
        if self.train_text_encoder:
            params["text_encoder"] = self.models.text_encoder.init(rngs[1], jnp.zeros((1, 2), jnp.int32))["params"]
        return params

    def train(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Losses]:
        """The loss at random timesteps, and its parts."""
        input_rng, pair_rng = jax.random.split(rng)
        latents, inputs, image_inputs = self._encode(frozen, batch, input_rng)
        schedule = self.models.schedule
        pair = self.stage.training_pair(
            latents, inputs, pair_rng, images=self.images, image_inputs=image_inputs, schedule=schedule,
            sample_timesteps=timestep_distribution(schedule, self.loss),
        )  # fmt: skip
        return self._losses(params, pair, self._text(params, frozen, batch))

    def held_out(self, params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> Losses:
        """The losses at each of the fixed timesteps, with the same noise every time; and their mean."""
        input_rng, noise_rng = jax.random.split(rng)
        latents, inputs, image_inputs = self._encode(frozen, batch, input_rng)
        text = self._text(params, frozen, batch)
        eps = jax.random.normal(noise_rng, latents.shape)

        def at(step: Array) -> Losses:
            t = jnp.full((latents.shape[0],), step)
            image_t = jnp.full((latents.shape[0], self.images), step)
            pair = self.stage.training_pair_at(
                latents, inputs, t, image_t, eps, image_inputs=image_inputs, schedule=self.models.schedule
            )
            return self._losses(params, pair, text)[1]

        by_t = jax.lax.map(at, jnp.asarray(self.loss.held_out_timesteps))
        each = {f"{k}_t{t}": v[i] for k, v in by_t.items() for i, t in enumerate(self.loss.held_out_timesteps)}
        return {**{k: v.mean() for k, v in by_t.items()}, **each}

    def _encode(self, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[Array, dict | None, dict | None]:
        """Latents of the clip's frames and the images, and the inputs of their conditions. No gradient."""
        vae, make_inputs = self.models.vae, self.stage.training_inputs
        clips = self._clips(frozen, batch)
        every = clips.without_variance() if self.loss.posterior_mean else clips
        latent_rng, video_rng, image_rng, level_rng = jax.random.split(rng, 4)
        latents = every.sample(latent_rng, vae.config)
        video, images = every.select(slice(None, self.frames)), every.select(slice(self.frames, None), None)
        inputs = make_inputs(video, vae.config, video_rng, level_rng) if self.frames else None
        image_inputs = make_inputs(images, vae.config, image_rng, level_rng) if self.images else None
        return jax.lax.stop_gradient((latents, inputs, image_inputs))

    def _clips(self, frozen: Any, batch: Batch) -> EncodedClips:
        """The clip's frames, then the images: encoded here, or, without any use of `frozen`, when the data was made."""
        encoded = [batch[key] for key in ("video_latents", "image_latents") if key in batch]
        if encoded:
            mean, std = jnp.split(jnp.concatenate(encoded, axis=1), 2, axis=-1)
            return EncodedClips(None, mean, 2 * jnp.log(std))
        kinds = {"video": self.frames, "images": self.images}
        pixels = jnp.concatenate([batch[kind] for kind, count in kinds.items() if count], axis=1)
        return EncodedClips(pixels, *encode_frames(self.models.vae, frozen["vae"], pixels))

    def _text(self, params: Any, frozen: Any, batch: Batch) -> Text:
        if "text" in batch or "image_text" in batch:
            return Text(batch.get("text"), batch.get("image_text"))
        return encode_text(
            self.models.text_encoder,
            (params if self.train_text_encoder else frozen)["text_encoder"],
            batch["tokens"] if self.frames else None,
            batch["image_tokens"] if self.images else None,
        )

    def _losses(self, params: Any, pair: TrainingPair, text: Text) -> tuple[jax.Array, Losses]:
        prediction = conditioning.predict(self.models.unet, params["unet"], pair, text)
        weight = timestep_weight(self.models.schedule, pair.frame_t, self.loss)
        value, parts = joint_loss(prediction, pair.target, weight, self.frames, self.loss.alpha)
        present = {"video": self.frames, "image": self.images}
        return value, {f"{k}_loss": v for k, v in parts.items() if present[k]}


def make_diffusion_task(
    losses: StageLoss,
    *,
    size: tuple[int, int],
    regime: str,
    start: Any,
    frozen: Mapping[str, Any],
    sampling: Mapping[str, Any],
    tokenizer: Any,
) -> Task:
    """The task of every config but the VAE's.

    Args:
      losses: the stage, its networks, and what a batch holds.
      size: (H, W) of the frames, in pixels.
      regime: see `optimizer.REGIMES`.
      start: parameters to start from, or None.
      frozen: parameters of "vae", and of "text_encoder" if that is not trained.
      sampling: the sampling settings to write into the exported weights folder.
      tokenizer: what `weights.save_folder` takes, for the same folder.
    """
    models, timesteps = losses.models, losses.loss.held_out_timesteps
    if not all(0 <= t < models.schedule.steps for t in timesteps):
        raise UserError(f"loss.held_out_timesteps {timesteps} must be from 0 to {models.schedule.steps - 1}.")

    def export(path: Path, params: Any, values: Mapping[str, float]) -> None:
        text_params = (params if losses.train_text_encoder else frozen)["text_encoder"]
        weights.save_folder(
            path,
            stage=losses.stage.name,
            sampling=dict(sampling),
            unet=(models.unet.config, params["unet"]),
            vae=(models.vae.config, frozen["vae"]),
            text_encoder=(models.text_encoder.config, text_params),
            tokenizer=tokenizer,
            schedule=models.schedule,
            low_res_schedule=losses.stage.low_res_schedule,
            overwrite=True,
        )

    plain = dataclasses.replace(losses, models=dataclasses.replace(models, unet=models.unet.clone(remat="none")))
    return Task(
        init=lambda rng: losses.init(rng, size), start=start, frozen=frozen, loss=losses.train, plain_loss=plain.train,
        held_out=losses.held_out, export=export, regime=regime, images_only=losses.frames == 0,
        judged_by="video_loss" if losses.frames else "image_loss",
    )  # fmt: skip


def encode_frames(
    vae: VAE, params: Any, frames: Float[Array, "b f H W 3"]
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
    """Mean and log-variance of every frame's posterior, unscaled.

    Large batches go through the encoder a few frames at a time: what it keeps of one frame of 320x512 is hundreds of
    megabytes.
    """

    def encode(images):
        return vae.apply({"params": params}, images, method="encode")

    batch, count, height, width, _ = frames.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size  # over which the rows are split
    at_once = max(1, VAE_PIXELS * devices // (batch * height * width))
    parts = -(-count // at_once)
    if parts == 1:
        return encode(frames)
    # Not by `lax.map(batch_size=)`, whose vmap folds a part's frames before the rows: devices that each have some of
    # the rows would have to gather them all.
    padded = jnp.pad(frames, [(0, 0), (0, -count % parts), *[(0, 0)] * 3])
    moments = jax.lax.map(encode, einops.rearrange(padded, "b (parts f) h w c -> parts b f h w c", parts=parts))
    return jax.tree.map(lambda x: einops.rearrange(x, "parts b f h w c -> b (parts f) h w c")[:, :count], moments)


def encode_text(
    encoder: CLIPText,
    params: Any,
    tokens: Int[Array, "b l"] | None,
    image_tokens: Int[Array, "b m l"] | None,
) -> Text:
    """The captions of the videos and of the images, through the encoder in one call."""
    parts = [] if tokens is None else [tokens[:, None]]
    every = jnp.concatenate(parts if image_tokens is None else [*parts, image_tokens], axis=1)
    text = encoder.apply({"params": params}, einops.rearrange(every, "b n l -> (b n) l"))
    text = einops.rearrange(text, "(b n) l d -> b n l d", b=every.shape[0])
    video = None if tokens is None else text[:, 0]
    return Text(video, None if image_tokens is None else text[:, len(parts) :])


def timestep_distribution(schedule: Schedule, loss: DiffusionLoss) -> conditioning.SampleTimesteps:
    """(rng, shape) -> the timesteps that a step trains, int32: uniform, or more of some than of others."""
    if not loss.logit_normal:
        return conditioning.uniform_timesteps(schedule)
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
