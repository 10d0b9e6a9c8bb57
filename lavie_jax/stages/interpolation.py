"""Temporal interpolation: K key frames to 4 (K - 1) + 1 frames (LaVie, sec. 3.3).

The latents of the key frames, duplicated to the target frame rate, are concatenated to the noisy latents. All frames
are generated, including the key frames. The model is trained on clips of 61 frames, from 16 key frames; longer clips
are denoised in overlapping windows of that length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from lavie_jax import random
from lavie_jax.diffusion.making import state_arrays
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.stages.base import STAGE as BASE
from lavie_jax.stages.clips import ClipInfo, check_memory, padded
from lavie_jax.stages.conditioning import Condition, ConditionSetup, EncodedClips
from lavie_jax.stages.settings import InterpolationSettings, check_derived
from lavie_jax.stages.stage import CONDITION_STREAM, LINEAR_BETAS, LoadedStage, Stage, StageWeights
from lavie_jax.stages.windows import Window, grid, overlapping, whole

KEY_FRAME_SPACING = 4  # frames from one key frame to the next
SHARED_KEYS = 4  # most key frames that a window shares with the next one


def interpolated_length(key_frames: int) -> int:
    """4 (K - 1) + 1, the number of frames made from K key frames."""
    return KEY_FRAME_SPACING * (key_frames - 1) + 1


class Interpolation(Stage):
    """61 frames at 24 fps from 16 key frames at 8 fps."""

    name = "interpolation"
    noise_number = 1
    sampling = {
        "height": 320, "width": 512, "frames": 61, "fps": 24, "sampler": "respaced_ddim", "steps": 50, "guidance": 4.0,
        "prompt_suffix": ", 4k.", "negative_prompt": "None",
    }  # fmt: skip
    presets = {
        "balanced": {"steps": 20},
        "fast": {"sampler": "dpm++2m", "steps": 10},
    }
    schedule = Schedule(**LINEAR_BETAS)
    null_caption = "None"
    unet_fields = {"temporal_attention": "after_ff", "spatial_attention": "sparse_causal"}
    condition_latents = 1
    image_model = None
    inflates = "base"
    encodes_clip = True
    original = "lavie_interpolation.pt"
    memory_advice = "a clip of a smaller height and width, or fewer window keys"

    def sampling_from(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Adapts the released settings to the size, length and rate of the base model's clips, given in `source`."""
        base = {**BASE.sampling, **source}
        return {
            **self.sampling,
            "height": base["height"],
            "width": base["width"],
            "frames": interpolated_length(base["frames"]),
            "fps": base["fps"] * self.sampling["fps"] / BASE.sampling["fps"],
        }

    # ---- training ----

    def check_training_frames(self, frames: int) -> None:
        """Raises UserError unless clips of `frames` frames begin and end with a key frame."""
        if frames and (frames - 1) % KEY_FRAME_SPACING:
            low = frames - (frames - 1) % KEY_FRAME_SPACING
            raise UserError(
                f"data.frames = {frames}: interpolation trains on clips that begin and end with a key frame, of "
                f"{KEY_FRAME_SPACING} (K - 1) + 1 frames, such as {low} or {low + KEY_FRAME_SPACING}."
            )

    def training_inputs(
        self, clips: EncodedClips, setup: ConditionSetup, rng: random.Key, level_rng: random.Key
    ) -> dict[str, Array]:
        """Returns `key_latents` of frames 0, 4, 8, ...

        They are sampled independently of the target latents, because sampling encodes the key frames separately too.
        """
        keys = jax.tree.map(lambda x: x[..., ::KEY_FRAME_SPACING, :, :, :], clips)
        return {"key_latents": keys.sample(rng, setup.vae)}

    def condition(self, inputs: Mapping[str, Any]) -> Condition:
        """Uses `key_latents` (B, K, h, w, C): frame i of 4 (K - 1) + 1 sees key frame (i + 1) // 4."""
        key_latents = inputs["key_latents"]
        source = (np.arange(interpolated_length(key_latents.shape[1])) + 1) // KEY_FRAME_SPACING
        return Condition(concat=key_latents[:, source])

    # ---- sampling ----

    def default_clip(self, weights: StageWeights) -> ClipInfo:
        sampling = weights.sampling
        keys = (sampling["frames"] - 1) // KEY_FRAME_SPACING + 1
        return ClipInfo(frames=keys, height=sampling["height"], width=sampling["width"], fps=sampling["fps"])

    def resolve(self, weights: StageWeights, given: Mapping[str, Any], clip: ClipInfo) -> InterpolationSettings:
        """By default, the frame rate is that of the weights or, for a user's clip, the one that keeps its duration."""
        if clip.frames < 2:
            raise UserError(f"interpolation needs at least 2 key frames, not {clip.frames}")
        size = {"frames": interpolated_length(clip.frames), "height": clip.height, "width": clip.width}
        check_derived(given, size)
        if clip.own and given.get("fps") is None:
            size["fps"] = min(KEY_FRAME_SPACING * clip.fps, 1000)
        settings = InterpolationSettings.make(weights.sampling, {**given, **size})
        # bytes per frame: its pixels, and float32 arrays of latents: state, prediction, new state and condition
        arrays = 2 * state_arrays(settings.sampler) + 2
        latent = 4 * weights.unet.config.out_channels * arrays / weights.vae.config.factor**2
        check_memory(clip, 3 + KEY_FRAME_SPACING * (3 + latent))
        return settings

    def padding(self, weights: StageWeights) -> int:
        return weights.vae.config.factor

    def latent_shape(self, weights: StageWeights, settings: InterpolationSettings) -> tuple[int, int, int, int]:
        factor = weights.vae.config.factor
        sides = (-(-side // factor) for side in (settings.height, settings.width))
        return settings.frames, *sides, weights.unet.config.out_channels

    def windows(self, shape: Sequence[int], settings: InterpolationSettings) -> list[Window]:
        """Returns windows that start at key frames, as training clips do."""
        keys = settings.window_keys
        size, overlap = map(interpolated_length, (keys, min(SHARED_KEYS, keys // 2)))
        return grid(overlapping(shape[0], size, overlap, stride=KEY_FRAME_SPACING), whole(shape[1]), whole(shape[2]))

    def prepare(
        self, model: LoadedStage, settings: InterpolationSettings, seed: int, frames: UInt8[np.ndarray, "k H W 3"]
    ) -> tuple[Float[np.ndarray, "t h w c"], None]:
        """Encodes every key frame once."""
        frames = padded(frames, self.padding(model.weights))
        noise = None
        if settings.key_latents == "sample":
            side = self.latent_shape(model.weights, settings)[1:]
            noise = np.asarray(model.frame_noise(seed, CONDITION_STREAM, range(len(frames)), side))
        key_latents = rearrange(model.encode(frames, noise), "k h w c -> 1 k h w c")
        return np.asarray(self.condition({"key_latents": key_latents}).concat[0]), None

    def finish(
        self,
        decoded: UInt8[np.ndarray, "n H W 3"],
        start: int,
        settings: InterpolationSettings,
        frames: UInt8[np.ndarray, "k h w 3"],
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Crops decoded frames, and copies the given key frames into them if `keep_key_frames` is set."""
        decoded = super().finish(decoded, start, settings, frames)
        if settings.keep_key_frames:
            decoded = decoded.copy()
            first = -start % KEY_FRAME_SPACING
            keys = range((start + first) // KEY_FRAME_SPACING, (start + len(decoded) - 1) // KEY_FRAME_SPACING + 1)
            decoded[first::KEY_FRAME_SPACING] = frames[keys.start : keys.stop]
        return decoded


STAGE = Interpolation()
