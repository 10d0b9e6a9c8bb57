"""Base stage: a prompt to key frames (LaVie, sec. 3.1 and 3.2). The UNet is conditioned on the text only."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Array, Float

from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.stages.clips import check_sides
from lavie_jax.stages.settings import BaseSettings
from lavie_jax.stages.stage import LINEAR_BETAS, LoadedStage, Stage, StageWeights
from lavie_jax.stages.windows import Window, grid, whole


class Base(Stage):
    """16 key frames of 320x512 at 8 fps. A clip is denoised in a single window."""

    name = "base"
    noise_number = 0
    sampling = {
        "height": 320, "width": 512, "frames": 16, "fps": 8, "sampler": "ddpm", "steps": 50, "guidance": 7.5,
        "prompt_suffix": "", "negative_prompt": "",
    }  # fmt: skip
    schedule = Schedule(**LINEAR_BETAS)
    unet_fields = {"temporal_attention": "before_ff", "temporal_position": True}
    batched = True  # a clip is small enough that a device can take several
    memory_advice = "a smaller batch size, fewer frames, or a smaller height and width"

    def resolve(self, weights: StageWeights, given: Mapping[str, Any], clip: None) -> BaseSettings:
        settings = BaseSettings.make(weights.sampling, given)
        check_sides(settings.height, settings.width, weights.vae.config.factor)
        return settings

    def is_image(self, settings: BaseSettings) -> bool:
        return settings.frames == 1

    def latent_shape(self, weights: StageWeights, settings: BaseSettings) -> tuple[int, int, int, int]:
        factor = weights.vae.config.factor
        return settings.frames, settings.height // factor, settings.width // factor, weights.unet.config.out_channels

    def windows(self, shape: Sequence[int], settings: BaseSettings) -> list[Window]:
        return grid(*map(whole, shape[:3]))

    def noise(
        self, model: LoadedStage, seed: int, stream: int, frames: range, shape: tuple[int, int, int, int]
    ) -> Float[Array, "t h w c"]:
        return model.noise(seed, stream, shape)[frames.start : frames.stop]


STAGE = Base()
