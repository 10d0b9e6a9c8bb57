"""Base stage: a prompt to key frames (LaVie, sec. 3.1 and 3.2). The UNet is conditioned on the text only.

`long="free_noise"` makes clips longer than those in training, without further training (FreeNoise, arXiv 2310.15169):
later frames start from shuffled noise of earlier ones, and temporal attention works in windows (docs/long_video.md).
With `strength`, denoising starts from the user's clip (SDEdit). docs/prompts.md describes `strength`, `free_init` and
`free_u`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8

from lavie_jax.diffusion.free_noise import noise_sources, shuffle_count, shuffles
from lavie_jax.diffusion.making import adds_noise
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models.free_u import FreeU
from lavie_jax.models.temporal_windows import AttentionWindows
from lavie_jax.stages.clips import ClipInfo, check_sides, fitted
from lavie_jax.stages.settings import BaseSettings
from lavie_jax.stages.stage import LINEAR_BETAS, LoadedStage, Stage, StageWeights
from lavie_jax.stages.windows import Window, grid, whole

LONG_SAMPLER = "ddim"  # FreeNoise's; fresh noise at every step would undo the rescheduling
SHUFFLE_STREAM = 2**32 - 2  # of the noise whose order shuffles the frames


class Base(Stage):
    """16 key frames of 320x512 at 8 fps. A clip is denoised in a single window."""

    name = "base"
    noise_number = 0
    sampling = {
        "height": 320, "width": 512, "frames": 16, "fps": 8, "sampler": "ddpm", "steps": 50, "guidance": 7.5,
        "prompt_suffix": "", "negative_prompt": "",
    }  # fmt: skip
    presets = {
        "balanced": {"sampler": "dpm++2m", "steps": 25},
        "fast": {"sampler": "dpm++2m", "steps": 15},
    }
    schedule = Schedule(**LINEAR_BETAS)
    unet_fields = {"temporal_attention": "before_ff", "temporal_position": True}
    batched = True  # a clip is small enough that a device can take several
    original = "lavie_base.pt"
    memory_advice = "a smaller batch size, fewer frames, or a smaller height and width"

    def resolve(self, weights: StageWeights, given: Mapping[str, Any], clip: ClipInfo | None) -> BaseSettings:
        """A user's clip determines the frame rate and, up to the length in training, the number of frames."""
        derived = {} if clip is None else self._from_clip(weights, given, clip)
        settings: BaseSettings = BaseSettings.make(weights.sampling, {**given, **derived})
        if clip is None and settings.strength is not None:
            raise UserError("strength: it belongs to a clip that is made anew, which is not given: give an input clip")
        if settings.free_init and (settings.long or settings.strength is not None):
            other = "long" if settings.long else "strength"
            raise UserError(f"free_init starts every pass from noise of its own and cannot be used with {other}")
        check_sides(settings.height, settings.width, weights.vae.config.factor)
        if settings.long is None and settings.long_window is not None and given.get("long_window") is not None:
            raise UserError(f"long_window = {settings.long_window} is for long = free_noise, which is not given")
        return settings if settings.long is None else self._resolve_long(weights, given, settings)

    def _from_clip(self, weights: StageWeights, given: Mapping[str, Any], clip: ClipInfo) -> dict[str, Any]:
        """Returns the settings that follow from a clip of the user."""
        if given.get("strength") is None:
            raise UserError(
                "a clip for base needs strength, above 0 to 1: how much of it is made anew, such as 0.6; other stages "
                "(--stages) enlarge, interpolate or continue it"
            )
        frames, trained = given.get("frames"), weights.sampling["frames"]
        if frames is not None and frames > clip.frames:
            raise UserError(f"frames: {frames} are more than the {clip.frames} of the clip")
        if frames is None and clip.frames > trained and given.get("long") is None:
            raise UserError(
                f"the clip has {clip.frames} frames, but this model makes {trained}: give frames = {trained} for the "
                "first ones, or long = free_noise for all"
            )
        derived = {"frames": clip.frames} if frames is None else {}
        return derived | ({"fps": clip.fps} if given.get("fps") is None else {})

    def _resolve_long(self, weights: StageWeights, given: Mapping[str, Any], settings: BaseSettings) -> BaseSettings:
        """Sets the window and the sampler. Raises UserError if model, clip or sampler do not support it."""
        trained = weights.sampling.get("long_window") or weights.sampling["frames"]
        window = settings.long_window or trained
        if weights.unet.config.temporal_attention == "none" or trained < 2:
            raise UserError(f"long: {settings.long} needs a model that was trained on videos; this one makes images")
        if window > trained:
            raise UserError(
                f"long_window: {window} frames are more than this model was trained on; use at most {trained}"
            )
        if settings.frames < window:
            raise UserError(
                f"long: {settings.long} makes clips of at least one window, {window} frames, not {settings.frames}: "
                "give more frames, or leave out long"
            )
        sampler = settings.sampler
        if adds_noise(sampler):
            if given.get("sampler") is not None or sampler == "lcm":  # a model that was distilled for it
                raise UserError(
                    f"long: {settings.long} needs a sampler without fresh noise at every step, such as {LONG_SAMPLER}, "
                    f"not {sampler}"
                )
            sampler = LONG_SAMPLER
        return dataclasses.replace(settings, long_window=window, sampler=sampler)

    def is_image(self, settings: BaseSettings) -> bool:
        """Whether the output is a single frame, for which the joint model's image path is used."""
        return settings.frames == 1

    def latent_shape(self, weights: StageWeights, settings: BaseSettings) -> tuple[int, int, int, int]:
        """Returns the shape (T, h, w, C) of the latents."""
        factor = weights.vae.config.factor
        return settings.frames, settings.height // factor, settings.width // factor, weights.unet.config.out_channels

    def windows(self, shape: Sequence[int], settings: BaseSettings) -> list[Window]:
        """Returns one window of the whole clip."""
        return grid(*map(whole, shape[:3]))

    def start(
        self, model: LoadedStage, settings: BaseSettings, frames: UInt8[np.ndarray, "_t _H _W 3"] | None
    ) -> Float[np.ndarray, "t h w c"] | None:
        """Encodes the user's clip, from which the tail of the chain starts (SDEdit, arXiv 2108.01073)."""
        if frames is None or settings.first_step == 0:
            return None
        size = settings.height, settings.width
        return model.encode(np.stack([fitted(np.asarray(frame), *size) for frame in frames[: settings.frames]]))

    def free_u(self, settings: BaseSettings) -> FreeU | None:
        """Returns the factors of FreeU, or None."""
        if settings.free_u is None:
            return None
        b1, b2, s1, s2 = settings.free_u_factors
        return FreeU(backbone=(b1, b2), skip=(s1, s2))

    def passes(self, settings: BaseSettings) -> int:
        """Returns how many times the chain is run: once more for each iteration of FreeInit."""
        return 1 + settings.free_init

    def attention_windows(self, settings: BaseSettings) -> AttentionWindows | None:
        """Returns windows that start every quarter of their length, as in FreeNoise."""
        if settings.long is None:
            return None
        return AttentionWindows(settings.long_window, max(1, settings.long_window // 4))

    def noise(
        self,
        model: LoadedStage,
        settings: BaseSettings,
        seed: int,
        stream: int,
        frames: range,
        shape: tuple[int, int, int, int],
    ) -> Float[Array, "t h w c"]:
        """Returns the noise of some frames; with FreeNoise, frames beyond its window repeat shuffled noise."""
        part = slice(frames.start, frames.stop)
        windows = self.attention_windows(settings)
        if windows is None:
            return model.noise(seed, stream, shape)[part]
        blocks = shuffle_count(shape[0], windows.size, windows.stride)
        scores = np.asarray(model.noise(seed, SHUFFLE_STREAM, (blocks, windows.stride)))
        sources = noise_sources(windows.size, shuffles(shape[0], windows.size, scores))
        return model.noise(seed, stream, (windows.size, *shape[1:]))[sources[part]]


STAGE = Base()
