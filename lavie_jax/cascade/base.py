"""Base stage: a prompt to key frames (LaVie, sec. 3.1). One window, all of the clip."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from lavie_jax.cascade.denoising import Clip
from lavie_jax.cascade.model import StageModel
from lavie_jax.cascade.windows import Window, grid, whole
from lavie_jax.samples.settings import Settings, Source
from lavie_jax.weights import Weights


def resolve(weights: Weights, given: Mapping[str, Any], source: Source | None) -> Settings:
    """The stage's settings; UserError for those that the model cannot make."""
    settings = Settings.make(weights.sampling, given)
    settings.check_sides(weights.vae.config.factor)
    return settings


def latent_shape(weights: Weights, settings: Settings) -> tuple[int, int, int, int]:
    """(T, h, w, C)."""
    factor = weights.vae.config.factor
    return settings.frames, settings.height // factor, settings.width // factor, weights.unet.config.out_channels


def windows(shape: Sequence[int], settings: Settings) -> list[Window]:
    """Of latents (T, h, w, C)."""
    return grid(*map(whole, shape[:3]))


def prepare(
    model: StageModel,
    settings: Settings,
    seed: int,
    text: Float[np.ndarray, "l d"],
    null_text: Float[np.ndarray, "l d"],
    frames: None,
) -> Clip:
    """The clip before its first step."""
    shape = latent_shape(model.weights, settings)

    def noise(stream, frames):
        return model.noise(seed, stream, shape)[frames.start : frames.stop]

    return Clip(text=text, null_text=null_text, shape=shape, noise=noise)


def finish(
    made: UInt8[np.ndarray, "n h w 3"], start: int, settings: Settings, frames: None
) -> UInt8[np.ndarray, "n h w 3"]:
    """Decoded frames, of which the first has number `start`, as they leave the stage."""
    return made
