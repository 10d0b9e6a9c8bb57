"""Prediction: a prompt and any known frames of a clip to the whole clip (SEINE, arXiv 2310.20700; LaVie, sec. 4.4).

The UNet is the base's, with more input channels: a mask, 1 where a frame is to be generated, and the latents of the
masked clip, in which such frames are mid-grey. One model animates a picture (the first frame is known), makes a
transition between two (the first and the last), continues a clip (its last frames), and starts from text (none). The
known frames are generated too: the result shows the model's rendering of them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Array, Float, UInt8

from lavie_jax import random
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.stages.base import STAGE as BASE
from lavie_jax.stages.clips import ClipInfo, to_float
from lavie_jax.stages.conditioning import Condition, ConditionSetup, EncodedClips
from lavie_jax.stages.settings import KnownFrames, PredictionSettings
from lavie_jax.stages.stage import CONDITION_STREAM, LINEAR_BETAS, LoadedStage, Stage, StageWeights
from lavie_jax.stages.windows import Window, grid, whole


def masked_clip(
    known: Mapping[int, UInt8[np.ndarray, "H W 3"]], frames: int, height: int, width: int
) -> tuple[Float[np.ndarray, "t H W 3"], Float[np.ndarray, " t"]]:
    """Returns what the VAE encodes, in [-1, 1] and mid-grey (0) at unknown frames, and the mask, 0 at known frames."""
    clip, mask = np.zeros((frames, height, width, 3), np.float32), np.ones(frames, np.float32)
    for index, picture in known.items():
        clip[index], mask[index] = to_float(picture), 0
    return clip, mask


def draw_masks(key: Array, rows: int, frames: int, known: KnownFrames) -> Float[Array, "rows frames"]:
    """Returns masks of training clips, 0 where a frame is known, whose modes have the weights `known`."""
    mode_key, count_key, order_key, share_key = jax.random.split(key, 4)
    mode = jax.random.categorical(mode_key, jnp.log(jnp.asarray(known.weights, jnp.float32)), shape=(rows, 1))
    few = jnp.floor(frames / 2 * jax.random.uniform(count_key, (rows, 1)) ** 2)  # N - 1
    index, uniform = jnp.arange(frames), jax.random.uniform(order_key, (rows, frames))
    each_side = jnp.floor(few / 2)  # N / 2 - 1, at least one on each side
    modes = {
        "first": index <= few,
        "first_and_last": (index <= each_side) | (index >= frames - 1 - each_side),
        "share": jnp.argsort(jnp.argsort(uniform, axis=1), axis=1) <= few,
        "uniform": uniform < jax.random.uniform(share_key, (rows, 1)),
        "none": jnp.zeros((rows, frames), bool),
    }
    by_mode = jnp.stack([modes[field.name] for field in dataclasses.fields(known)])
    return 1.0 - jnp.take_along_axis(by_mode, mode[None], axis=0)[0]


class Prediction(Stage):
    """16 frames of 320x512 at 8 fps, any of which may be known."""

    name = "prediction"
    noise_number = 3
    sampling = {
        "height": 320, "width": 512, "frames": 16, "fps": 8, "sampler": "respaced_ddpm", "steps": 250, "guidance": 8.0,
        "prompt_suffix": "", "negative_prompt": "",
    }  # fmt: skip
    schedule = Schedule(**LINEAR_BETAS)
    unet_fields = BASE.unet_fields
    condition_latents = 1
    condition_masks = 1
    image_model = None
    inflates = "base"
    encodes_clip = True
    memory_advice = "fewer frames, or a smaller height and width"

    def sampling_from(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Adapts the released settings to the size, length and rate of the base model's clips, given in `source`."""
        size = ("height", "width", "frames", "fps")
        return {**self.sampling, **{name: source[name] for name in size if name in source}}

    # ---- training ----

    def training_inputs(
        self, clips: EncodedClips, setup: ConditionSetup, rng: random.Key, level_rng: random.Key
    ) -> dict[str, Array]:
        """`mask` and `masked_latents` of modes that the clips draw (`KnownFrames`); nothing of an image is known.

        The latents are sampled independently of the target's, because known frames are encoded anew in sampling too.
        """
        lead, count = clips.mean.shape[:-4], clips.mean.shape[-4]
        mask_rng, latent_rng = random.split(rng)
        if len(lead) > 1:  # images, as clips of one frame
            mask = jnp.ones((*lead, count))
        else:
            mask = random.rows(
                mask_rng, lead[0], functools.partial(draw_masks, frames=count, known=setup.options["known"])
            )
        unknown = mask[..., None, None, None] > 0.5
        grey = jax.tree.map(lambda x: x[0, 0], setup.grey)
        masked = EncodedClips(
            None, jnp.where(unknown, grey.mean, clips.mean), jnp.where(unknown, grey.logvar, clips.logvar)
        )
        return {"mask": mask, "masked_latents": masked.sample(latent_rng, setup.vae)}

    def condition(self, inputs: Mapping[str, Any]) -> Condition:
        """From `mask` (B, T), 1 = to be generated, and `masked_latents` (B, T, h, w, C), those of grey frames too."""
        latents = jnp.asarray(inputs["masked_latents"])
        mask = repeat(
            jnp.asarray(inputs["mask"], latents.dtype), "b t -> b t h w 1", h=latents.shape[2], w=latents.shape[3]
        )
        return Condition(concat=jnp.concatenate([mask, latents], axis=-1))

    # ---- sampling ----

    def resolve(self, weights: StageWeights, given: Mapping[str, Any], clip: ClipInfo | None) -> PredictionSettings:
        return PredictionSettings.make(weights.sampling, given)

    def latent_shape(self, weights: StageWeights, settings: PredictionSettings) -> tuple[int, int, int, int]:
        factor = weights.vae.config.factor
        return settings.frames, settings.height // factor, settings.width // factor, weights.unet.config.out_channels

    def windows(self, shape: Sequence[int], settings: PredictionSettings) -> list[Window]:
        return grid(*map(whole, shape[:3]))

    def prepare(
        self, model: LoadedStage, settings: PredictionSettings, seed: int, frames: UInt8[np.ndarray, "t H W 3"] | None
    ) -> tuple[Float[np.ndarray, "t h w c"], None]:
        """Encodes the masked clip, in which the last `known_frames` of the clip before come first."""
        last = [] if frames is None else frames[-settings.known_frames :]
        clip, mask = masked_clip(dict(enumerate(last)), settings.frames, settings.height, settings.width)
        noise = None
        if settings.known_latents == "sample":
            side = self.latent_shape(model.weights, settings)[1:]
            noise = np.asarray(model.frame_noise(seed, CONDITION_STREAM, range(settings.frames), side))
        masked_latents = model.encode(clip, noise)
        return np.asarray(self.condition({"mask": mask[None], "masked_latents": masked_latents[None]}).concat[0]), None


STAGE = Prediction()
