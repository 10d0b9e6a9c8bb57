"""Temporal interpolation: K key frames to 4 (K - 1) + 1 frames (LaVie, sec. 3.3).

16 key frames make the 61 frames that the model is trained with; more go through windows of that length, which share
key frames. Every key frame is encoded once, with one draw from the VAE's posterior, or to its mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from lavie_jax.cascade.denoising import Clip
from lavie_jax.cascade.model import CONDITION_STREAM, StageModel
from lavie_jax.cascade.pixels import check_memory, padded
from lavie_jax.cascade.windows import Window, grid, overlapping, whole
from lavie_jax.errors import UserError
from lavie_jax.samples.settings import InterpolationSettings, Source, check_given
from lavie_jax.stages import KEY_FRAME_SPACING, STAGES
from lavie_jax.weights import Weights

WINDOW_KEYS, SHARED_KEYS = 16, 4


def resolve(weights: Weights, given: Mapping[str, Any], source: Source) -> InterpolationSettings:
    """The stage's settings; UserError for those that the model cannot make.

    The rate is the weights' own after the base stage; a user's clip keeps its duration.
    """
    if source.frames < 2:
        raise UserError(f"interpolation needs at least 2 key frames, given {source.frames}")
    size = {"frames": KEY_FRAME_SPACING * (source.frames - 1) + 1, "height": source.height, "width": source.width}
    check_given(given, size)
    if source.own and given.get("fps") is None:
        size["fps"] = min(KEY_FRAME_SPACING * source.fps, 1000)
    settings = InterpolationSettings.make(weights.sampling, {**given, **size})
    # of each frame: its pixels, and in float32 at the latents' size state, prediction, new state and condition
    latent = 4 * weights.unet.config.out_channels * 5 / weights.vae.config.factor**2
    check_memory(source, 3 + KEY_FRAME_SPACING * (3 + latent))
    return settings


def multiple(weights: Weights) -> int:
    """What the sides of the key frames are padded to."""
    return weights.vae.config.factor


def latent_shape(weights: Weights, settings: InterpolationSettings) -> tuple[int, int, int, int]:
    """(T, h, w, C), of padded frames."""
    factor = weights.vae.config.factor
    sides = (-(-side // factor) for side in (settings.height, settings.width))
    return settings.frames, *sides, weights.unet.config.out_channels


def windows(shape: Sequence[int], settings: InterpolationSettings) -> list[Window]:
    """Of latents (T, h, w, C). Windows start at key frames, so that each is a clip as in training."""
    size, overlap = (KEY_FRAME_SPACING * (keys - 1) + 1 for keys in (WINDOW_KEYS, SHARED_KEYS))
    return grid(overlapping(shape[0], size, overlap, stride=KEY_FRAME_SPACING), whole(shape[1]), whole(shape[2]))


def prepare(
    model: StageModel,
    settings: InterpolationSettings,
    seed: int,
    text: Float[np.ndarray, "l d"],
    null_text: Float[np.ndarray, "l d"],
    frames: UInt8[np.ndarray, "k H W 3"],
) -> Clip:
    """The clip before its first step, its key frames encoded."""
    frames = padded(frames, multiple(model.weights))
    shape = latent_shape(model.weights, settings)
    side = shape[1:]
    drawn = settings.key_latents == "draw"
    noise = np.asarray(model.frame_noise(seed, CONDITION_STREAM, range(len(frames)), side)) if drawn else None
    key_latents = rearrange(model.encode(frames, noise), "k h w c -> 1 k h w c")
    concat = np.asarray(STAGES["interpolation"].condition({"key_latents": key_latents}).concat[0])
    return Clip(
        text=text,
        null_text=null_text,
        shape=shape,
        noise=lambda stream, numbers: model.frame_noise(seed, stream, numbers, side),
        concat=concat,
    )


def finish(
    made: UInt8[np.ndarray, "n h w 3"],
    start: int,
    settings: InterpolationSettings,
    frames: UInt8[np.ndarray, "k H W 3"],
) -> UInt8[np.ndarray, "n H W 3"]:
    """Decoded frames, of which the first has number `start`, as they leave the stage."""
    made = made[:, : settings.height, : settings.width]
    if settings.keep_key_frames:
        made = made.copy()
        first = -start % KEY_FRAME_SPACING
        keys = range((start + first) // KEY_FRAME_SPACING, (start + len(made) - 1) // KEY_FRAME_SPACING + 1)
        made[first::KEY_FRAME_SPACING] = frames[keys.start : keys.stop]
    return made
