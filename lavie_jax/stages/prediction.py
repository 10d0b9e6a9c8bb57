"""Prediction: a prompt and any known frames of a clip to the whole clip (SEINE, arXiv 2310.20700; LaVie, sec. 4.4).

The UNet is the base's, with more input channels: a mask, 1 where a frame is to be generated, and the latents of the
masked clip, in which such frames are mid-grey. One model animates a picture (the first frame is known), makes a
transition (the first and the last frame), continues a clip (its last frames are the first ones), or starts from text
(no frame is known). The known frames are generated too: the result shows the model's rendering of them, unless they are
kept.

A long video is a sequence of segments. The last decoded frames of a segment are the known first frames of the next one.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jaxtyping import Array, Float, UInt8

from lavie_jax import random
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.stages.base import STAGE as BASE
from lavie_jax.stages.clips import ClipInfo, check_sides, fitted, to_float
from lavie_jax.stages.conditioning import Condition, ConditionSetup, EncodedClips, KnownLatents
from lavie_jax.stages.settings import KnownFrames, PredictionSettings, check_derived
from lavie_jax.stages.stage import (
    CONDITION_STREAM,
    LINEAR_BETAS,
    Known,
    LoadedStage,
    Segment,
    Stage,
    StageWeights,
)
from lavie_jax.stages.windows import Window, grid, whole


class SegmentInput(NamedTuple):
    """The known frames of a segment.

    Attributes:
        known: known frames in the output's size, by their index in the segment.
        index: index of the segment.
    """

    known: Mapping[int, UInt8[np.ndarray, "H W 3"]]
    index: int = 0


def masked_clip(
    known: Mapping[int, UInt8[np.ndarray, "H W 3"]], frames: int, height: int, width: int
) -> tuple[Float[np.ndarray, "t H W 3"], Float[np.ndarray, " t"]]:
    """Returns the clip to encode, in [-1, 1] and mid-grey (0) at unknown frames, and the mask, 0 at known frames."""
    clip, mask = np.zeros((frames, height, width, 3), np.float32), np.ones(frames, np.float32)
    for index, picture in known.items():
        clip[index], mask[index] = to_float(picture), 0
    return clip, mask


def draw_masks(key: Array, rows: int, frames: int, known: KnownFrames) -> Float[Array, "rows frames"]:
    """Samples masks of training clips, 0 where a frame is known, in modes with the weights `known`."""
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
    presets = {
        "balanced": {"sampler": "respaced_ddim", "steps": 50},
        "fast": {"sampler": "dpm++2m", "steps": 20},
    }
    schedule = Schedule(**LINEAR_BETAS)
    unet_fields = BASE.unet_fields
    condition_latents = 1
    condition_masks = 1
    image_model = None
    inflates = "base"
    encodes_clip = True
    batched = True
    original = "seine.pt"
    memory_advice = "a smaller batch size, fewer frames, or a smaller height and width"

    def sampling_from(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Adapts the released settings to the size, length and rate of the base model's clips, given in `source`."""
        size = ("height", "width", "frames", "fps")
        return {**self.sampling, **{name: source[name] for name in size if name in source}}

    # ---- training ----

    def training_inputs(
        self, clips: EncodedClips, setup: ConditionSetup, rng: random.Key, level_rng: random.Key
    ) -> dict[str, Array]:
        """Returns `mask` and `masked_latents`, for a random mode of each clip (`KnownFrames`). Images are never known.

        The latents are sampled independently of the target's, because sampling encodes known frames separately too.
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
        """Uses `mask` (B, T), 1 = to be generated, and `masked_latents` (B, T, h, w, C), including grey frames."""
        latents = jnp.asarray(inputs["masked_latents"])
        mask = repeat(
            jnp.asarray(inputs["mask"], latents.dtype), "b t -> b t h w 1", h=latents.shape[2], w=latents.shape[3]
        )
        return Condition(concat=jnp.concatenate([mask, latents], axis=-1))

    # ---- sampling ----

    def resolve(self, weights: StageWeights, given: Mapping[str, Any], clip: ClipInfo | None) -> PredictionSettings:
        """The previous stage's clip is the first segment and sets the size. A user's clip sets only the frame rate.

        The frames of a user's clip are cropped and scaled to the size, like pictures.
        """
        derived: dict[str, Any] = {}
        if clip is not None and not clip.own:
            derived = {"height": clip.height, "width": clip.width, "clip_frames": clip.frames}
            check_derived(given, derived)
            if given.get("segments") is None:
                derived["segments"] = max(2, weights.sampling.get("segments", 1))
        if clip is not None and given.get("fps") is None:
            derived["fps"] = clip.fps
        settings: PredictionSettings = PredictionSettings.make(weights.sampling, {**given, **derived})
        check_sides(settings.height, settings.width, weights.vae.config.factor)
        if settings.clip_frames and settings.segments < 2:
            raise UserError("segments must be at least 2 after another stage, whose clip is the first segment, not 1")
        if (clip is not None or settings.segments > 1) and settings.known_frames >= settings.frames:
            raise UserError(
                f"known_frames must be below frames = {settings.frames}, so that there are frames to generate, not "
                f"{settings.known_frames}"
            )
        if clip is not None and clip.frames < settings.known_frames:
            raise UserError(
                f"the clip has {clip.frames} frame{'s' * (clip.frames > 1)}, fewer than known_frames = "
                f"{settings.known_frames}: give a longer clip, or fewer known frames"
            )
        return settings

    def check_known(self, settings: PredictionSettings, clip: ClipInfo | None, known: Known) -> None:
        """Raises UserError for pictures of frames that do not exist or are known already."""
        generated = settings.clip_frames or (0 if clip is None else settings.known_frames)
        for index in known:
            if not 0 <= index < settings.output_frames:
                raise UserError(
                    f"known frame {index} is beyond the clip, whose frames are 0 to {settings.output_frames - 1}"
                )
            if index < generated:
                raise UserError(
                    f"known frame {index} is given twice, by a picture and by the clip that is continued: pictures can "
                    f"be frames {generated} to {settings.output_frames - 1}"
                )

    def segments(self, settings: PredictionSettings) -> list[Segment]:
        """Returns the segments to generate: all, or all but the first if that is the previous stage's clip."""
        segments, start = [], 0
        for index, length in enumerate(settings.segment_lengths()):
            repeated = settings.known_frames if index else 0
            segments.append(Segment(index=index, start=start - repeated, repeated=repeated))
            start += length
        return segments[1:] if settings.clip_frames else segments

    def latent_shape(self, weights: StageWeights, settings: PredictionSettings) -> tuple[int, int, int, int]:
        """Returns the shape (T, h, w, C) of the latents of a segment."""
        factor = weights.vae.config.factor
        return settings.frames, settings.height // factor, settings.width // factor, weights.unet.config.out_channels

    def windows(self, shape: Sequence[int], settings: PredictionSettings) -> list[Window]:
        """Returns one window of the whole segment."""
        return grid(*map(whole, shape[:3]))

    def segment_input(
        self,
        settings: PredictionSettings,
        segment: Segment,
        before: UInt8[np.ndarray, "t H W 3"] | None,
        known: Known,
    ) -> SegmentInput:
        """The last `known_frames` frames of the previous clip or segment come first, then the user's pictures."""
        last = [] if before is None else before[-settings.known_frames :]
        given = dict(enumerate(last))
        own = range(segment.start + len(given), segment.start + settings.frames)
        given |= {index - segment.start: known[index] for index in known if index in own}
        return SegmentInput(
            {index: fitted(np.asarray(picture), settings.height, settings.width) for index, picture in given.items()},
            segment.index,
        )

    def prepare(
        self, model: LoadedStage, settings: PredictionSettings, seed: int, frames: SegmentInput
    ) -> tuple[Float[np.ndarray, "t h w c"], None]:
        """Encodes the masked clip, unknown frames included."""
        clip, mask = masked_clip(frames.known, settings.frames, settings.height, settings.width)
        noise = None
        if settings.known_latents == "sample":
            side, first = self.latent_shape(model.weights, settings)[1:], frames.index * settings.frames
            numbers = range(first, first + settings.frames)
            noise = np.asarray(model.frame_noise(seed, CONDITION_STREAM, numbers, side))
        masked_latents = model.encode(clip, noise)
        return np.asarray(self.condition({"mask": mask[None], "masked_latents": masked_latents[None]}).concat[0]), None

    def known_latents(self, settings: PredictionSettings, concat: Float[np.ndarray, "t h w k"]) -> KnownLatents | None:
        """Returns the known frames' latents for `known_prediction` "exact", else None.

        Keeping them is the replacement method of arXiv 2204.03458, section 3.1, applied to the prediction instead of
        the noisy latents, so that it works with every sampler.
        """
        if settings.known_prediction == "network":
            return None
        return KnownLatents(known=concat[:, 0, 0, 0] < 0.5, latents=concat[..., 1:])

    def finish(
        self, decoded: UInt8[np.ndarray, "n H W 3"], start: int, settings: PredictionSettings, frames: SegmentInput
    ) -> UInt8[np.ndarray, "n H W 3"]:
        """Copies the given frames into the result if `keep_known_frames` is set."""
        if settings.keep_known_frames:
            decoded = decoded.copy()
            for index in range(start, start + len(decoded)):
                if index in frames.known:
                    decoded[index - start] = frames.known[index]
        return decoded


STAGE = Prediction()
