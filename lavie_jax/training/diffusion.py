"""Training the UNet of a stage: joint image-video fine-tuning (LaVie section 3.2, Eq. 3).

The VAE is frozen and encodes inside the step: one sample of its posterior per image, or the mode. The text encoder is
frozen too, except on Moving Shapes, where a small one is trained with the UNet. `stages/` defines the inputs
of a stage's UNet and computes them from a batch, `diffusion/loss.py` has the loss.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from lavie_jax import parallel, random, weights
from lavie_jax.diffusion.loss import joint_loss, min_snr_weight
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.unet import UNet
from lavie_jax.models.vae import VAE, VAE_PIXELS
from lavie_jax.stages import conditioning
from lavie_jax.stages.clips import pixels_to_float
from lavie_jax.stages.conditioning import ConditionSetup, EncodedClips, Text, TrainingPair
from lavie_jax.stages.stage import Stage
from lavie_jax.training import lora, perceptual
from lavie_jax.training.distillation import TEACHER, Distillation
from lavie_jax.training.optimizer import ADAPTER, check_number
from lavie_jax.training.step import AVERAGE, Batch, Losses, Task
from lavie_jax.weights.names import ZERO_AT_FIRST


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionLoss:
    """Settings of a stage's loss. The paper gives neither alpha nor a weighting of timesteps."""

    alpha: float = 1.0  # weight of images in L = L_video + alpha L_image (Eq. 3)
    min_snr_gamma: float = 0.0  # min-SNR weighting (arXiv 2303.09556); 0 = none
    high_noise: float = 0.0  # weight (1 + h) (t / steps)^h: the content of a clip is decided at high noise; 0 = none
    # (m, s): t / steps = sigmoid(normal(m, s)), "logit-normal" (arXiv 2403.03206, sec. 3.1); () = uniform
    logit_normal: tuple[float, ...] = ()
    absolute: bool = False  # absolute instead of squared errors: sharper where the target is determined
    perceptual: float = 0.0  # weight of the LPIPS of each frame, added to its error (`perceptual.py`); 0 = none
    posterior_mean: bool = False  # train on the mode of the VAE's posterior instead of samples of it
    held_out_timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)

    def __post_init__(self):
        for name in ("alpha", "min_snr_gamma", "high_noise", "perceptual"):
            check_number(f"loss.{name}", getattr(self, name), low=0)
        if self.logit_normal and not (len(self.logit_normal) == 2 and self.logit_normal[1] > 0):
            raise UserError(
                f"loss.logit_normal must be (mean, scale) with scale > 0, or () for none; given {self.logit_normal}."
            )
        if not self.held_out_timesteps:
            raise UserError("loss.held_out_timesteps is empty: name at least one timestep.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The networks and the schedule of a stage."""

    unet: UNet
    text_encoder: registry.TextEncoder
    vae: VAE
    schedule: Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageLoss:
    """The loss of one stage on batches of T `frames` and M `images`; either may be 0.

    `options` are the stage's own training settings, {config group: dataclass}.
    `params` are {"unet": ..., "text_encoder": ... if trained}, `frozen` is {"vae": ..., "text_encoder": ... if not}.
    With `adapter`, `params` also have one, which changes the UNet. With `distillation`, `frozen` also has its teacher,
    and with `loss.perceptual` the network of LPIPS.
    """

    stage: Stage
    models: Models
    loss: DiffusionLoss
    frames: int
    images: int
    train_text_encoder: bool
    options: Mapping[str, Any]
    adapter: lora.LoraConfig | None = None
    distillation: Distillation | None = None

    def init(self, rng: jax.Array) -> Any:
        """Returns random parameters, including the temporal layers' even if there are no videos."""
        names = ("unet", "text_encoder") if self.train_text_encoder else ("unet",)
        networks = {name: getattr(self.models, name) for name in names}
        rngs = dict(zip(("unet", "text_encoder"), jax.random.split(rng)))
        inputs = {name: registry.example_inputs(network.config) for name, network in networks.items()}
        params = {name: network.init(rngs[name], **inputs[name])["params"] for name, network in networks.items()}
        return params | ({ADAPTER: lora.initial(params["unet"], self.adapter, rng)} if self.adapter else {})

    def train(self, params: Any, frozen: Any, batch: Batch, rng: random.Key) -> tuple[jax.Array, Losses]:
        """Returns the loss at random timesteps, and its parts."""
        input_rng, pair_rng = random.split(rng)
        latents, inputs, image_inputs = self._encode(frozen, batch, input_rng)
        schedule = self.models.schedule
        pair = self.stage.training_pair(
            latents, inputs, pair_rng, images=self.images, image_inputs=image_inputs, schedule=schedule,
            sample_timesteps=timestep_distribution(schedule, self.loss),
        )  # fmt: skip
        return self._losses(params, frozen, pair, self._text(params, frozen, batch))

    def held_out(self, params: Any, frozen: Any, batch: Batch, rng: random.Key) -> Losses:
        """Returns the losses at each of the fixed timesteps, with the same noise every time, and their means."""
        input_rng, noise_rng = random.split(rng)
        latents, inputs, image_inputs = self._encode(frozen, batch, input_rng)
        text = self._text(params, frozen, batch)
        eps = random.normal(noise_rng, latents.shape)

        def at(step: Array) -> Losses:
            """Returns the losses at one timestep, the same for all rows."""
            t = jnp.full((latents.shape[0],), step)
            image_t = jnp.full((latents.shape[0], self.images), step)
            pair = self.stage.training_pair_at(
                latents, inputs, t, image_t, eps, image_inputs=image_inputs, schedule=self.models.schedule
            )
            return self._losses(params, frozen, pair, text)[1]

        by_t = jax.lax.map(at, jnp.asarray(self.loss.held_out_timesteps))
        each = {f"{k}_t{t}": v[i] for k, v in by_t.items() for i, t in enumerate(self.loss.held_out_timesteps)}
        return {**{k: v.mean() for k, v in by_t.items()}, **each}

    def _encode(self, frozen: Any, batch: Batch, rng: random.Key) -> tuple[Array, dict | None, dict | None]:
        """Returns latents of the frames and the images, and the inputs of their conditions. No gradient."""
        vae, make_inputs = self.models.vae, self.stage.training_inputs
        clips = self._clips(frozen, batch)
        every = clips.without_variance() if self.loss.posterior_mean else clips
        latent_rng, video_rng, image_rng, level_rng = random.split(rng, 4)
        latents = every.sample(latent_rng, vae.config)
        video, images = every.select(slice(None, self.frames)), every.select(slice(self.frames, None), None)
        setup = ConditionSetup(vae.config, self._grey(frozen, every), self.options)
        inputs = make_inputs(video, setup, video_rng, level_rng) if self.frames else None
        image_inputs = make_inputs(images, setup, image_rng, level_rng) if self.images else None
        return jax.lax.stop_gradient((latents, inputs, image_inputs))

    def _clips(self, frozen: Any, batch: Batch) -> EncodedClips:
        """Returns the clip's frames, then the images: encoded here, or read as latents, which needs no `frozen`."""
        encoded = [batch[key] for key in ("video_latents", "image_latents") if key in batch]
        if encoded:
            mean, std = jnp.split(jnp.concatenate(encoded, axis=1), 2, axis=-1)
            return EncodedClips(None, mean, 2 * jnp.log(std))
        kinds = {"video": self.frames, "images": self.images}
        pixels = jnp.concatenate([batch[kind] for kind, count in kinds.items() if count], axis=1)
        pixels = pixels_to_float(pixels)
        return EncodedClips(pixels, *encode_frames(self.models.vae, frozen["vae"], pixels))

    def _grey(self, frozen: Any, clips: EncodedClips) -> EncodedClips | None:
        """Encodes a mid-grey frame of the clips' size, for a stage that shows it in place of unknown frames."""
        if not self.stage.condition_masks:
            return None
        factor, (height, width) = self.models.vae.config.factor, clips.mean.shape[-3:-1]
        pixels = jnp.zeros((1, 1, height * factor, width * factor, 3))
        grey = EncodedClips(None, *encode_frames(self.models.vae, frozen["vae"], pixels))
        return grey.without_variance() if self.loss.posterior_mean else grey

    def _text(self, params: Any, frozen: Any, batch: Batch) -> Text:
        if "text" in batch or "image_text" in batch:
            return Text(batch.get("text"), batch.get("image_text"))
        return encode_text(
            self.models.text_encoder,
            (params if self.train_text_encoder else frozen)["text_encoder"],
            batch["tokens"] if self.frames else None,
            batch["image_tokens"] if self.images else None,
            batch.get("token_mask") if self.frames else None,
            batch.get("image_token_mask") if self.images else None,
        )

    def _losses(self, params: Any, frozen: Any, pair: TrainingPair, text: Text) -> tuple[jax.Array, Losses]:
        unet = lora.with_lora(params, self.adapter) if self.adapter else params["unet"]
        predict, target = functools.partial(conditioning.predict, self.models.unet), pair.target
        if self.distillation is None:
            prediction = predict(unet, pair, text)
        else:
            prediction, target = self.distillation.compare(
                predict, self.models.schedule, pair, text, self._null_text(frozen, text), student=unet,
                average=frozen.get(AVERAGE, params)["unet"], teacher=frozen[TEACHER],
            )  # fmt: skip
        weight = timestep_weight(self.models.schedule, pair.frame_t, self.loss)
        value, parts = joint_loss(prediction, target, weight, self.frames, self.loss.alpha, absolute=self.loss.absolute)
        if self.loss.perceptual:
            distances = perceptual.distances(frozen[perceptual.FROZEN], self.models.vae, prediction, target)
            weighted = self.loss.perceptual * distances
            more, added = joint_loss(
                weighted, jnp.zeros_like(weighted), None, self.frames, self.loss.alpha, absolute=True
            )
            value, parts = value + more, jax.tree.map(jnp.add, parts, added)
        present = {"video": self.frames, "image": self.images}
        losses = {f"{k}_loss": v for k, v in parts.items() if present[k]}
        return value, losses | ({"lpips": distances.mean()} if self.loss.perceptual else {})

    def _null_text(self, frozen: Any, text: Text) -> Text:
        """Returns the teacher's negative prompt in place of each of the captions `text`."""
        tokens, mask = jax.tree.map(jnp.asarray, (self.distillation.null_tokens, self.distillation.null_mask))
        one = encode_text(self.models.text_encoder, frozen["text_encoder"], tokens, None, mask, None)
        like = lambda null, given: None if given is None else jnp.broadcast_to(null, given.shape)  # noqa: E731
        return Text(
            like(one.video, text.video), like(one.video, text.images),
            like(one.video_mask, text.video_mask), like(one.video_mask, text.image_mask),
        )  # fmt: skip


def make_diffusion_task(
    losses: StageLoss,
    *,
    regime: str,
    start: Any,
    frozen: Mapping[str, Any],
    sampling: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    tokenizer: Any,
) -> Task:
    """Makes the task of every config except the VAE's.

    Args:
        losses: the stage, its networks, and the contents of a batch.
        regime: see `optimizer.REGIMES`.
        start: parameters to start from, or None.
        frozen: parameters of "vae", and of "text_encoder" if that is not trained.
        sampling: sampling settings for the exported weights folder.
        presets: its presets; {} for those of the stage.
        tokenizer: the tokenizer for the exported weights folder, see `weights.save_folder`.
    """
    models = losses.models

    def export(path: Path, params: Any, values: Mapping[str, float]) -> None:
        """Writes a weights folder of the stage, or its adapter; the held-out values are not part of them."""
        if losses.adapter is not None:
            lora.export(path, params, losses.adapter)
            return
        text_params = (params if losses.train_text_encoder else frozen)["text_encoder"]
        weights.save_folder(
            path,
            stage=losses.stage.name,
            sampling=dict(sampling),
            presets=presets,
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
        init=losses.init, start=start, frozen=frozen, loss=losses.train, plain_loss=plain.train,
        held_out=losses.held_out, export=export, regime=regime, images_only=losses.frames == 0,
        judged_by="video_loss" if losses.frames else "image_loss",
    )  # fmt: skip


def encode_frames(
    vae: VAE, params: Any, frames: Float[Array, "b f H W 3"]
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
    """Returns the mean and log-variance of every frame's posterior, unscaled.

    Large batches go through the encoder a few frames at a time: its activations take hundreds of megabytes for one
    frame of 320x512.
    """

    def encode(images):
        return vae.apply({"params": params}, images, method="encode")

    batch, count, height, width, _ = frames.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else parallel.batch_ways(mesh)  # those that share the rows
    at_once = max(1, VAE_PIXELS * devices // (batch * height * width))
    parts = -(-count // at_once)
    if parts == 1:
        return encode(frames)
    # `lax.map(batch_size=)` would put the frames of a part before the rows. Each device has some of the rows, and would
    # have to gather all of them.
    padded = jnp.pad(frames, [(0, 0), (0, -count % parts), *[(0, 0)] * 3])
    moments = jax.lax.map(encode, einops.rearrange(padded, "b (parts f) h w c -> parts b f h w c", parts=parts))
    return jax.tree.map(lambda x: einops.rearrange(x, "parts b f h w c -> b (parts f) h w c")[:, :count], moments)


def encode_text(
    encoder: registry.TextEncoder,
    params: Any,
    tokens: Int[Array, "b l"] | None,
    image_tokens: Int[Array, "b m l"] | None,
    token_mask: Bool[Array, "b l"] | None = None,
    image_token_mask: Bool[Array, "b m l"] | None = None,
) -> Text:
    """Encodes the captions of the videos and of the images in one call."""
    parts = [] if tokens is None else [tokens[:, None]]
    every = jnp.concatenate(parts if image_tokens is None else [*parts, image_tokens], axis=1)
    masks = () if not encoder.takes_mask else (_every_mask(token_mask, image_token_mask),)
    flat = (einops.rearrange(x, "b n l -> (b n) l") for x in (every, *masks))
    text = encoder.apply({"params": params}, *flat)
    text = einops.rearrange(text, "(b n) l d -> b n l d", b=every.shape[0])
    return Text(
        None if tokens is None else text[:, 0],
        None if image_tokens is None else text[:, len(parts) :],
        token_mask if encoder.takes_mask else None,
        image_token_mask if encoder.takes_mask else None,
    )


def _every_mask(token_mask: Array | None, image_token_mask: Array | None) -> Bool[Array, "b n l"]:
    parts = [] if token_mask is None else [token_mask[:, None]]
    return jnp.concatenate(parts if image_token_mask is None else [*parts, image_token_mask], axis=1)


def timestep_distribution(schedule: Schedule, loss: DiffusionLoss) -> conditioning.SampleTimesteps:
    """Returns the function (rng, shape) -> int32 timesteps of a training step: uniform or logit-normal."""
    if not loss.logit_normal:
        return conditioning.uniform_timesteps(schedule)
    mean, scale = loss.logit_normal

    def sample(rng: random.Key, shape: tuple[int, ...]) -> Array:
        fraction = jax.nn.sigmoid(mean + scale * random.normal(rng, shape))
        return jnp.clip((fraction * schedule.steps).astype(jnp.int32), 0, schedule.steps - 1)

    return sample


def timestep_weight(schedule: Schedule, t: Int[Array, "b f"], loss: DiffusionLoss) -> Float[Array, "b f"]:
    """Returns the loss weight of each frame's timestep."""
    weight = jnp.ones(t.shape)
    if loss.min_snr_gamma:
        weight *= min_snr_weight(schedule, t, loss.min_snr_gamma)
    if loss.high_noise:
        weight *= (1.0 + loss.high_noise) * ((t + 0.5) / schedule.steps) ** loss.high_noise
    return weight


def image_as_video(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inflated UNet of an image model (LaVie section 3.1), whose temporal attention adds nothing at first.

    Weights and biases of the temporal layers' outputs are set to zero, so that the network treats a clip of T copies of
    an image as the image model treats that image.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    zeroed = {k: np.zeros_like(v) if ZERO_AT_FIRST.search(k) else v for k, v in flat.items()}
    return traverse_util.unflatten_dict(zeroed, sep="/")
