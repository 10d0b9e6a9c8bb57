"""The interface of a stage. The file of each stage contains a subclass of `Stage` and its instance `STAGE`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from lavie_jax import random
from lavie_jax.diffusion.feature_cache import FeatureCache
from lavie_jax.diffusion.guidance import Guidance
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models.free_u import FreeU
from lavie_jax.models.registry import PARTS
from lavie_jax.models.temporal_windows import AttentionWindows
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.stages.clips import ClipInfo
from lavie_jax.stages.conditioning import (
    Condition,
    ConditionSetup,
    EncodedClips,
    KnownLatents,
    SampleTimesteps,
    TrainingPair,
    frame_timesteps,
    uniform_timesteps,
)
from lavie_jax.stages.settings import STAGE_INFO, Settings, StageInfo
from lavie_jax.stages.windows import Window

CONDITION_STREAM = 2**32 - 1  # noise of a stage's condition; stream 0 starts denoising, i + 1 belongs to step i
LINEAR_BETAS = {"kind": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # not Stable Diffusion's scaled_linear


@runtime_checkable
class StageWeights(Protocol):
    """The part of `weights.Weights` that a stage reads."""

    sampling: Mapping[str, Any]
    unet: Any  # with `config`
    vae: Any  # with `config`
    low_res_schedule: Schedule | None


@runtime_checkable
class LoadedStage(Protocol):
    """The part of `cascade.model.StageModel` that a stage needs to prepare a clip."""

    weights: StageWeights

    def noise(self, seed: int, stream: int, shape: tuple[int, ...]) -> Array:
        """Standard normal noise of a whole clip."""

    def frame_noise(self, seed: int, stream: int, frames: Sequence[int], shape: tuple[int, ...]) -> Array:
        """Standard normal noise of frames, each keyed by its index."""

    def encode(self, frames: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Scaled latents of frames, uint8 or float32 in [-1, 1]: a sample of the posterior if `noise` is given, else
        the mode."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a stage's output that is denoised as one clip. Most stages have one segment.

    Attributes:
        index: index of the segment in the output.
        start: index of its first frame in the output.
        repeated: number of its first frames that the output already has, from the previous clip or segment.
    """

    index: int = 0
    start: int = 0
    repeated: int = 0


Known = Mapping[int, np.ndarray]  # pictures, uint8 (H, W, 3) of any size, by the index of their frame


class Stage:
    """One stage of the cascade: its released settings, the condition of its UNet, and how it processes a clip.

    The methods come in the order in which they are called: `training_inputs`, `condition` and `training_pair` in
    training; `resolve`, `segments`, `latent_shape`, `windows`, `attention_windows`, `free_u`, `passes`,
    `segment_input`, `prepare`, `start`, `noise` and `finish` in sampling.

    Attributes:
        name: see `StageInfo`.
        noise_number: keys the stage's noise, together with the seed. It never changes, so that samples stay the same.
        sampling: the released sampling settings, which a new weights folder gets as its defaults.
        presets: settings by the name of a preset (`settings.PRESETS`), which replace released ones to compute less.
            They are for the released models; a weights folder may have its own.
        schedule: the noise schedule that the released model was trained with.
        low_res_schedule: the schedule of the noise on low-resolution frames, for a stage that has them.
        null_caption: the text that replaces a dropped caption in training.
        unet_fields: fields of `UNetConfig` in which the stage's UNet differs from the image model's.
        condition_latents: number of latents in the condition, for which an inflated UNet gets more input channels.
        condition_masks: number of masks in the condition, for which it gets one input channel each.
        image_model: the image model that the stage's UNet is inflated from; None if it is inflated from another stage.
        image_channels: input channels of that image model in addition to the latent's.
        original: file name of the released checkpoint.
        image_repository: repository on the Hugging Face hub of the image model whose VAE and text encoder it uses.
        inflates: the stage that the UNet is inflated from, or None if it is inflated from an image model.
        vae_defaults: values of fields that are missing in older published configurations of the stage's VAE.
        vae_dtype: dtype of the VAE's computation if it differs from the other networks'.
        takes_adapters: whether LoRA files and embeddings of Stable Diffusion 1.x fit its networks.
        encodes_clip: whether the input clip is encoded by the VAE.
        latents_suffice: whether stored latents and encoded captions can replace pixels and captions in training.
        batched: whether the UNet is called with `batch_size` clips at a time.
        memory_advice: what to reduce when a device runs out of memory.
    """

    name: ClassVar[str]
    noise_number: ClassVar[int]
    sampling: ClassVar[Mapping[str, Any]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    schedule: ClassVar[Schedule]
    low_res_schedule: ClassVar[Schedule | None] = None
    null_caption: ClassVar[str] = ""
    unet_fields: ClassVar[Mapping[str, Any]]
    condition_latents: ClassVar[int] = 0
    condition_masks: ClassVar[int] = 0
    image_model: ClassVar[str | None] = "Stable Diffusion 1.x"
    image_channels: ClassVar[int] = 0
    original: ClassVar[str]
    image_repository: ClassVar[str] = "CompVis/stable-diffusion-v1-4"
    inflates: ClassVar[str | None] = None
    vae_defaults: ClassVar[Mapping[str, Any]] = {}
    vae_dtype: ClassVar[DTypeLike | None] = None
    takes_adapters: ClassVar[bool] = True
    encodes_clip: ClassVar[bool] = False
    latents_suffice: ClassVar[bool] = True
    batched: ClassVar[bool] = False
    memory_advice: ClassVar[str]

    @property
    def info(self) -> StageInfo:
        """The stage's entry in `STAGE_INFO`: the dataclass of its settings, and what it consumes and produces."""
        return STAGE_INFO[self.name]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of its weights folder."""
        return (*PARTS, "tokenizer", "scheduler", *(("low_res_scheduler",) if self.low_res_schedule else ()))

    def condition_channels(self, latent_channels: int) -> int:
        """Returns the number of input channels that the UNet has in addition to the image model's."""
        return self.condition_latents * latent_channels + self.condition_masks

    def sampling_from(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Returns default sampling settings for a model that is inflated from one with the settings `source`."""
        return dict(self.sampling)

    # ---- training ----

    def check_training_frames(self, frames: int) -> None:
        """Raises UserError for a number of frames that the stage cannot be trained on; 0 means images only."""

    def training_inputs(
        self, clips: EncodedClips, setup: ConditionSetup, rng: random.Key, level_rng: random.Key
    ) -> dict[str, Array]:
        """Returns the inputs of `condition`, computed from the target frames.

        Args:
            clips: the target clips of a batch, or its images.
            setup: the VAE's configuration, and inputs that only some stages need.
            rng: key for the condition of these clips.
            level_rng: key for the noise levels, which the clip and the images of a row share.
        """
        return {}

    def condition(self, inputs: Mapping[str, Any]) -> Condition:
        """Returns the UNet's inputs other than x_t, t and text, for both training and sampling."""
        return Condition()

    def training_pair(
        self,
        latents: Float[Array, "b frames h w c"],
        inputs: Mapping[str, Array] | None,
        rng: random.Key,
        *,
        images: int = 0,
        image_inputs: Mapping[str, Array] | None = None,
        schedule: Schedule | None = None,
        sample_timesteps: SampleTimesteps | None = None,
    ) -> TrainingPair:
        """Samples timesteps and noise, and computes x_t and the target of LaVie's Eq. 1 to 3.

        Args:
            latents: T video frames, then M images.
            inputs: the inputs of `condition` for the video, None when T = 0.
            rng: key for timesteps and noise.
            images: M.
            image_inputs: the same for the images, as clips of one frame: (B, M, 1, ...), levels (B, M).
            schedule: overrides the stage's, for a model with other betas or another prediction type.
            sample_timesteps: overrides the uniform distribution. A video's frames share one timestep, every image has
                its own.
        """
        schedule = schedule or self.schedule
        sample_timesteps = sample_timesteps or uniform_timesteps(schedule)
        t_rng, image_rng, noise_rng = random.split(rng, 3)
        batch = latents.shape[0]
        t, image_t = sample_timesteps(t_rng, (batch,)), sample_timesteps(image_rng, (batch, images))
        eps = random.normal(noise_rng, latents.shape)
        return self.training_pair_at(latents, inputs, t, image_t, eps, image_inputs=image_inputs, schedule=schedule)

    def training_pair_at(
        self,
        latents: Float[Array, "b frames h w c"],
        inputs: Mapping[str, Array] | None,
        t: Int[Array, " b"],
        image_t: Int[Array, "b m"],
        eps: Float[Array, "b frames h w c"],
        *,
        image_inputs: Mapping[str, Array] | None = None,
        schedule: Schedule | None = None,
    ) -> TrainingPair:
        """`training_pair` at given timesteps and noise, for held-out losses."""
        schedule = schedule or self.schedule
        frame_t = frame_timesteps(t, image_t, latents.shape[1] - image_t.shape[1])
        x_t = schedule.add_noise(latents, eps, frame_t)
        target = schedule.target(latents, eps, frame_t)
        return TrainingPair(x_t, t, image_t, target, self._joint_condition(inputs, image_inputs))

    def _joint_condition(
        self, inputs: Mapping[str, Array] | None, image_inputs: Mapping[str, Array] | None
    ) -> Condition:
        """Concatenates the conditions of the clip and of all images. A row has one noise level, that of its clip."""
        parts = [] if inputs is None else [self.condition(inputs)]
        if image_inputs:
            rows = next(iter(image_inputs.values())).shape[0]
            flat = jax.tree.map(lambda x: rearrange(x, "b m ... -> (b m) ..."), image_inputs)
            each = jax.tree.map(lambda x: rearrange(x, "(b m) ... -> b m ...", b=rows), self.condition(flat))
            concat = rearrange(each.concat, "b m 1 h w c -> b m h w c")
            parts.append(Condition(concat, None if each.noise_level is None else each.noise_level[:, 0]))
        if len(parts) < 2:
            return parts[0] if parts else Condition()
        clip, images = parts
        return Condition(jnp.concatenate([clip.concat, images.concat], axis=1), clip.noise_level)

    # ---- sampling ----

    def default_clip(self, weights: StageWeights) -> ClipInfo | None:
        """Returns the input clip for an output of the default size; None for a stage that starts from text."""
        return None

    def resolve(self, weights: StageWeights, given: Mapping[str, Any], clip: ClipInfo | None) -> Settings:
        """Returns the stage's settings: the weights' defaults, overridden by `given` and the size and rate of the clip.

        Raises:
            UserError: a setting is impossible for the model, or the clip does not fit into memory.
        """
        raise NotImplementedError

    def is_image(self, settings: Settings) -> bool:
        """Whether the output is an image, which skips the temporal layers."""
        return False

    def check_known(self, settings: Settings, clip: ClipInfo | None, known: Known) -> None:
        """Raises UserError if the frames `known` cannot be given to a stage that `takes_known` frames."""

    def segments(self, settings: Settings) -> Sequence[Segment]:
        """Returns the segments of the output, in the order in which they are generated.

        If the first one repeats frames of the input clip, the output begins with that clip.
        """
        return (Segment(),)

    def padding(self, weights: StageWeights) -> int:
        """Returns the number to whose multiples the height and width of the input clip are padded."""
        return 1

    def latent_shape(self, weights: StageWeights, settings: Settings) -> tuple[int, int, int, int]:
        """Returns the shape (T, h, w, C) of the latents to denoise in a segment, including padding."""
        raise NotImplementedError

    def windows(self, shape: Sequence[int], settings: Settings) -> list[Window]:
        """Returns the windows in which latents of `shape` (T, h, w, C) are denoised."""
        raise NotImplementedError

    def segment_input(
        self, settings: Settings, segment: Segment, before: UInt8[np.ndarray, "t H W 3"] | None, known: Known
    ) -> Any:
        """Returns the argument `frames` of `prepare`, `start` and `finish`.

        Args:
            settings: the stage's settings.
            segment: the segment to generate.
            before: frames of the previous segment; for the first segment, those of the input clip, if there is one.
            known: the frames of the output that the user has given.
        """
        return before

    def prepare(
        self, model: LoadedStage, settings: Settings, seed: int, frames: UInt8[np.ndarray, "t H W 3"] | None
    ) -> tuple[Float[np.ndarray, "t h w c"] | None, int | None]:
        """Returns `concat` and `noise_level` of one clip's condition, computed from the frames of the input clip."""
        return None, None

    def start(self, model: LoadedStage, settings: Settings, frames: Any) -> Float[np.ndarray, "t h w c"] | None:
        """Returns the latents to which noise is added at `Settings.first_step`; None if denoising starts from noise.

        `frames` is what `segment_input` returns.
        """
        return None

    def known_latents(self, settings: Settings, concat: Float[np.ndarray, "t h w k"] | None) -> KnownLatents | None:
        """Returns the frames whose latents are kept in denoising, taken from `prepare`'s `concat`; None for none."""
        return None

    def attention_windows(self, settings: Settings) -> AttentionWindows | None:
        """Returns windows of the temporal attention inside the UNet; None for one window over all frames."""
        return None

    def free_u(self, settings: Settings) -> FreeU | None:
        """Returns FreeU's factors of the inputs of the UNet's up blocks; None for no factors."""
        return None

    def passes(self, settings: Settings) -> int:
        """Returns how often a clip is denoised, see `diffusion/free_init.py`."""
        return 1

    def noise(
        self,
        model: LoadedStage,
        settings: Settings,
        seed: int,
        stream: int,
        frames: range,
        shape: tuple[int, int, int, int],
    ) -> Float[Array, "t h w c"]:
        """Returns standard normal noise for frames of latents of `shape`, keyed by seed, stream and frame index."""
        return model.frame_noise(seed, stream, frames, shape[1:])

    def finish(
        self,
        decoded: UInt8[np.ndarray, "n H W 3"],
        start: int,
        settings: Settings,
        frames: UInt8[np.ndarray, "t h w 3"] | None,
    ) -> UInt8[np.ndarray, "n height width 3"]:
        """Crops decoded frames to the output size; `start` is the index of the first one in the segment."""
        return decoded[:, : settings.height, : settings.width]


def guidance_of(settings: Settings) -> Guidance:
    """Returns the guidance that the settings describe."""
    return Guidance(
        scale=settings.guidance,
        rescale=settings.guidance_rescale,
        low=settings.guidance_low,
        high=settings.guidance_high,
        every=settings.guidance_every,
    )


def feature_cache_of(settings: Settings) -> FeatureCache:
    """Returns the feature cache that the settings describe."""
    return FeatureCache(every=settings.cache_every, depth=settings.cache_depth)


def check_cache_depth(settings: Settings, unet: UNetConfig) -> None:
    """Raises UserError for a feature cache that would leave no layers of this UNet to reuse."""
    deepest = unet.skip_connections - 1
    if settings.cache_every > 1 and settings.cache_depth > deepest:
        raise UserError(f"cache_depth must be from 1 to {deepest} for this model, not {settings.cache_depth}")
