"""Video super-resolution: every frame at four times the size (LaVie, sec. 3.4).

The clip is denoised as one: one noise field for all frames, and windows over time, where memory asks for it over
space too, whose predictions are blended at every step. LaVie's own way is there too, chunks of 8 frames that know
nothing of each other and leave a cut after every chunk.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from lavie_jax.cascade.denoising import Clip
from lavie_jax.cascade.model import CONDITION_STREAM, StageModel, to_float
from lavie_jax.cascade.pixels import check_memory, padded
from lavie_jax.cascade.windows import Window, cut, grid, overlapping
from lavie_jax.diffusion import Schedule
from lavie_jax.errors import UserError
from lavie_jax.samples.settings import Source, VSRSettings, check_given
from lavie_jax.stages import LOW_RES_SCHEDULE, STAGES
from lavie_jax.weights import Weights

WHOLE_FRAME = 320 * 512  # low-resolution pixels up to which a window is whole frames wide, when no tile is given
TILE = 384  # side of the tiles of larger frames
TILE_OVERLAP = 4  # tiles share one part in so many


def resolve(weights: Weights, given: Mapping[str, Any], source: Source) -> VSRSettings:
    """The stage's settings; UserError for those that the model cannot make. The rate is the source's."""
    factor = weights.vae.config.factor
    size = {"frames": source.frames, "height": factor * source.height, "width": factor * source.width}
    check_given(given, size)
    if given.get("fps") is None:
        size["fps"] = source.fps
    settings = VSRSettings.make(weights.sampling, {**given, **size})
    if settings.tile is None:
        tile = 0 if source.height * source.width <= WHOLE_FRAME else TILE
        settings = dataclasses.replace(settings, tile=tile)
    most = min(weights.unet.config.num_class_embeds, low_res_schedule(weights).steps) - 1
    if settings.noise_level > most:
        raise UserError(f"noise_level: this model knows 0 to {most}, given {settings.noise_level}")
    # its own bytes, and in float32 noised frames, state (of some samplers twice), prediction and the new state
    check_memory(source, 3 + 4 * (3 + 5 * weights.unet.config.out_channels))
    return settings


def low_res_schedule(weights: Weights) -> Schedule:
    """Of the noise on the low-resolution frames: the folder's, or the released model's."""
    return weights.low_res_schedule or LOW_RES_SCHEDULE


def multiple(weights: Weights) -> int:
    """What the sides of the low-resolution frames are padded to: the UNet halves them once a level."""
    return 2 ** (len(weights.unet.config.block_out_channels) - 1)


def latent_shape(weights: Weights, settings: VSRSettings) -> tuple[int, int, int, int]:
    """(T, h, w, C), of padded frames: the sides of latents are those of low-resolution frames."""
    factor, step = weights.vae.config.factor, multiple(weights)
    sides = (-(-side // factor // step) * step for side in (settings.height, settings.width))
    return settings.frames, *sides, weights.unet.config.out_channels


def windows(shape: Sequence[int], settings: VSRSettings) -> list[Window]:
    """Of latents (T, h, w, C), whose sides are the low-resolution frames'."""
    if settings.windows == "official":
        frames = cut(shape[0], settings.window_frames)
    else:
        frames = overlapping(shape[0], settings.window_frames, settings.overlap_frames)
    tile = settings.tile or max(shape[1:3])
    return grid(frames, *(overlapping(side, tile, tile // TILE_OVERLAP) for side in shape[1:3]))


def prepare(
    model: StageModel,
    settings: VSRSettings,
    seed: int,
    text: Float[np.ndarray, "l d"],
    null_text: Float[np.ndarray, "l d"],
    frames: UInt8[np.ndarray, "t H W 3"],
) -> Clip:
    """The clip before its first step, its low-resolution frames noised."""
    frames = padded(frames, multiple(model.weights))
    size = settings.window_frames
    schedule, level = low_res_schedule(model.weights), np.int32(settings.noise_level)

    def noised(numbers):
        noise = model.frame_noise(seed, CONDITION_STREAM, numbers, frames.shape[1:])
        return _noised(frames[numbers.start : numbers.stop], noise, level, schedule=schedule)

    pieces = [range(i, min(i + size, len(frames))) for i in range(0, len(frames), size)]
    shape = latent_shape(model.weights, settings)
    side = shape[1:]
    return Clip(
        text=text,
        null_text=null_text,
        shape=shape,
        noise=lambda stream, numbers: model.frame_noise(seed, stream, numbers, side),
        concat=np.concatenate([np.asarray(noised(piece)) for piece in pieces]),
        noise_level=settings.noise_level,
    )


def finish(
    made: UInt8[np.ndarray, "n h w 3"], start: int, settings: VSRSettings, frames: UInt8[np.ndarray, "t H W 3"]
) -> UInt8[np.ndarray, "n H4 W4 3"]:
    """Decoded frames, of which the first has number `start`, as they leave the stage."""
    return made[:, : settings.height, : settings.width]


@functools.partial(jax.jit, static_argnames="schedule")
def _noised(
    frames: UInt8[Array, "t h w 3"], noise: Float[Array, "t h w 3"], level: Int[Array, ""], *, schedule: Schedule
) -> Float[Array, "t h w 3"]:
    inputs = {"low_res": to_float(frames)[None], "low_res_noise": noise[None], "noise_level": jnp.asarray(level)[None]}
    return STAGES["vsr"].condition({**inputs, "low_res_schedule": schedule}).concat[0]
