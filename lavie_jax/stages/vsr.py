"""Video super-resolution: every frame at four times the size (LaVie, sec. 3.4).

The UNet is conditioned on the low-resolution frames, to which noise is added, and on the level of that noise. A clip is
denoised as a whole: all windows share its noise, and the predictions in overlapping windows over time (and over
space, for large frames) are blended at every step. LaVie's independent chunks of 8 frames, with a visible cut after
each, are available too.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Int, UInt8

from lavie_jax import random
from lavie_jax.diffusion.making import state_arrays
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.program_cache import cached
from lavie_jax.stages.clips import ClipInfo, check_memory, padded, to_float
from lavie_jax.stages.conditioning import Condition, ConditionSetup, EncodedClips
from lavie_jax.stages.settings import LowResNoise, VSRSettings, check_derived
from lavie_jax.stages.stage import CONDITION_STREAM, LINEAR_BETAS, LoadedStage, Stage, StageWeights
from lavie_jax.stages.windows import Window, cut, grid, overlapping

WHOLE_FRAME = 320 * 512  # low-resolution pixels of the largest frames that are not tiled by default
TILE = 384  # side of the tiles of larger frames
TILE_OVERLAP = 4  # tiles share a quarter of their side


class VSR(Stage):
    """61 frames of 1280x2048 from 320x512."""

    name = "vsr"
    noise_number = 2
    sampling = {
        "height": 1280, "width": 2048, "frames": 61, "fps": 24, "sampler": "ddim", "steps": 50, "guidance": 5.0,
        "prompt_suffix": "", "negative_prompt": "blur, worst quality", "noise_level": 50,
    }  # fmt: skip
    presets = {
        "balanced": {"sampler": "dpm++2m", "steps": 20, "guidance_low": 200, "guidance_high": 900},
        "fast": {"sampler": "dpm++2m", "steps": 8, "guidance_low": 200, "guidance_high": 900},
    }
    schedule = Schedule(**LINEAR_BETAS, prediction="v_prediction")
    low_res_schedule = Schedule(kind="scaled_linear", beta_start=1e-4, beta_end=0.02)
    null_caption = "None"
    unet_fields = {"temporal_attention": "before_ff", "temporal_position": True, "temporal_resblocks": True}
    image_model = "stable-diffusion-x4-upscaler"
    image_channels = 3  # the low-resolution frame
    takes_adapters = False  # it belongs to the Stable Diffusion 2 family
    vae_defaults = {"scaling_factor": 0.08333}
    vae_dtype = jnp.float32  # the x4-upscaler's VAE overflows in half precision
    latents_suffice = False  # training needs pixels, and patches at random positions
    original = "lavie_vsr.pt"
    image_repository = "stabilityai/stable-diffusion-x4-upscaler"
    memory_advice = "smaller windows: a smaller tile, or fewer window frames"

    # ---- training ----

    def training_inputs(
        self, clips: EncodedClips, setup: ConditionSetup, rng: random.Key, level_rng: random.Key
    ) -> dict[str, Array]:
        """Returns `low_res` frames of the latents' size, `low_res_noise`, and a `noise_level` for each row.

        Each low-resolution pixel is the mean of the target pixels that it covers. The paper does not give the
        distribution of the levels. Here a level is the highest one, by default MAX_NOISE_LEVEL, times the cube of a
        uniform random number, so that half of the levels are below 44. Low levels are the ones used in sampling: the
        released model's default is 50. The images of a row have the level of its clip, because the UNet takes one level
        per row. Even level 0 adds a little noise, unless it is the only level.
        """
        low_res = reduce(clips.pixels, "... (h i) (w j) c -> ... h w c", "mean", i=setup.vae.factor, j=setup.vae.factor)
        lead = low_res.shape[:-4]
        highest = setup.options.get("low_res_noise", LowResNoise()).highest
        level = (random.uniform(level_rng, lead[:1]) ** 3 * (highest + 1)).astype(jnp.int32)
        level = jnp.broadcast_to(level.reshape(-1, *(1,) * (len(lead) - 1)), lead)
        noise = random.normal(rng, low_res.shape) if highest else jnp.zeros_like(low_res)
        return {"low_res": low_res, "low_res_noise": noise, "noise_level": level}

    def condition(self, inputs: Mapping[str, Any]) -> Condition:
        """Uses `low_res` (B, T, H, W, 3) in [-1, 1], `low_res_noise` of the same shape, standard normal, and
        `noise_level` (B,) int, a timestep of `low_res_schedule` (default: the released model's)."""
        schedule = inputs.get("low_res_schedule", self.low_res_schedule)
        noised = schedule.add_noise(inputs["low_res"], inputs["low_res_noise"], inputs["noise_level"])
        return Condition(concat=noised, noise_level=inputs["noise_level"])

    # ---- sampling ----

    def default_clip(self, weights: StageWeights) -> ClipInfo:
        sampling, factor = weights.sampling, weights.vae.config.factor
        sides = {name: sampling[name] // factor for name in ("height", "width")}
        return ClipInfo(frames=sampling["frames"], fps=sampling["fps"], **sides)

    def resolve(self, weights: StageWeights, given: Mapping[str, Any], clip: ClipInfo) -> VSRSettings:
        """By default, the frame rate is the clip's."""
        factor = weights.vae.config.factor
        size = {"frames": clip.frames, "height": factor * clip.height, "width": factor * clip.width}
        check_derived(given, size)
        if given.get("fps") is None:
            size["fps"] = clip.fps
        settings: VSRSettings = VSRSettings.make(weights.sampling, {**given, **size})
        if settings.tile is None:
            tile = 0 if clip.height * clip.width <= WHOLE_FRAME else TILE
            settings = dataclasses.replace(settings, tile=tile)
        most = min(weights.unet.config.num_class_embeds, self._low_res_schedule(weights).steps) - 1
        if settings.noise_level > most:
            raise UserError(f"noise_level must be from 0 to {most} for this model, not {settings.noise_level}")
        # bytes per pixel: the clip, and in float32 noised frames, state, prediction and new state
        arrays = 2 * state_arrays(settings.sampler) + 1
        cached = self._cached_bytes(weights, settings)
        check_memory(clip, 3 + 4 * (3 + arrays * weights.unet.config.out_channels) + cached)
        return settings

    def _cached_bytes(self, weights: StageWeights, settings: VSRSettings) -> float:
        """Returns bytes per pixel of the feature cache, in bfloat16, for both halves of guidance."""
        if settings.cache_every == 1:
            return 0
        config = weights.unet.config
        level, layers = divmod(settings.cache_depth, config.layers_per_block + 1)  # all of the levels above, and layers
        width = config.block_out_channels[min(level, len(config.block_out_channels) - 1)]
        pixels = 4.0 ** -(level if layers else level - 1)  # whole levels get features that are enlarged already
        repeated = settings.window_frames / max(1, settings.window_frames - settings.overlap_frames)
        return 2 * 2 * repeated * width * pixels

    def _low_res_schedule(self, weights: StageWeights) -> Schedule:
        return weights.low_res_schedule or self.low_res_schedule

    def padding(self, weights: StageWeights) -> int:
        levels = len(weights.unet.config.block_out_channels)
        return 2 ** (levels - 1)  # the UNet halves the sides between its levels

    def latent_shape(self, weights: StageWeights, settings: VSRSettings) -> tuple[int, int, int, int]:
        """Latents have the sides of the low-resolution frames."""
        factor, step = weights.vae.config.factor, self.padding(weights)
        sides = (-(-side // factor // step) * step for side in (settings.height, settings.width))
        return settings.frames, *sides, weights.unet.config.out_channels

    def windows(self, shape: Sequence[int], settings: VSRSettings) -> list[Window]:
        """Returns windows over time, blended or the original's chunks, and over space for large frames."""
        if settings.windows == "official":
            frames = cut(shape[0], settings.window_frames)
        else:
            frames = overlapping(shape[0], settings.window_frames, settings.overlap_frames)
        tile = settings.tile or max(shape[1:3])
        return grid(frames, *(overlapping(side, tile, tile // TILE_OVERLAP) for side in shape[1:3]))

    def prepare(
        self, model: LoadedStage, settings: VSRSettings, seed: int, frames: UInt8[np.ndarray, "t H W 3"]
    ) -> tuple[Float[np.ndarray, "t H W 3"], int]:
        """Adds noise to the low-resolution frames, `window_frames` of them at a time."""
        frames = padded(frames, self.padding(model.weights))
        size = settings.window_frames
        schedule, level = self._low_res_schedule(model.weights), np.int32(settings.noise_level)
        noiseless = model.weights.unet.config.num_class_embeds == 1  # trained with `LowResNoise.highest` = 0

        def noised(start: int) -> Float[np.ndarray, "n H W 3"]:
            """Returns up to `window_frames` frames from `start` on, scaled to [-1, 1], with noise added."""
            indices = range(start, min(start + size, len(frames)))
            if noiseless:
                noise = jnp.zeros((len(indices), *frames.shape[1:]))
            else:
                noise = model.frame_noise(seed, CONDITION_STREAM, indices, frames.shape[1:])
            return np.asarray(_noised(frames[start : indices.stop], noise, level, schedule=schedule))

        return np.concatenate([noised(start) for start in range(0, len(frames), size)]), settings.noise_level


STAGE = VSR()


@cached
@functools.partial(jax.jit, static_argnames="schedule")
def _noised(
    frames: UInt8[Array, "t h w 3"], noise: Float[Array, "t h w 3"], level: Int[Array, ""], *, schedule: Schedule
) -> Float[Array, "t h w 3"]:
    inputs = {"low_res": to_float(frames)[None], "low_res_noise": noise[None], "noise_level": jnp.asarray(level)[None]}
    return STAGE.condition({**inputs, "low_res_schedule": schedule}).concat[0]
