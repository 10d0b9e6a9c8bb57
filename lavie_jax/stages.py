"""The three stages of the cascade: what each feeds its UNet besides noise, and what it learns to predict.

    base            text                          -> 16 key frames               LaVie sec. 3.1, 3.2
    interpolation   text + key frames             -> 61 frames                   LaVie sec. 3.3
    vsr             text + low-resolution frames  -> frames of 4 times the size  LaVie sec. 3.4

A stage's `condition` is written once and serves sampling (`denoiser`) and training (`training_pair`) alike.
Latents are scaled, (B, T, h, w, C); noise is always handed in, never drawn inside a condition, so that a sample
depends on its own seed alone.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lavie_jax.diffusion.guidance import guide
from lavie_jax.diffusion.schedule import Schedule

KEY_FRAME_SPACING = 4  # frames for each key frame but the last


class Condition(NamedTuple):
    """What goes into the UNet besides x_t, t and text."""

    concat: Float[Array, "b t h w c"] | None = None  # joined to x_t along the channels
    noise_level: Int[Array, " b"] | None = None  # of the low-resolution frames (super-resolution)


class Text(NamedTuple):
    """Encoded captions: of the video (None without one), and of each image beside it (None without any)."""

    video: Float[Array, "b l d"] | None
    images: Float[Array, "b m l d"] | None = None


class TrainingPair(NamedTuple):
    """What one training step shows the UNet, and what it should answer."""

    x_t: Float[Array, "b frames h w c"]
    t: Int[Array, " b"]
    image_t: Int[Array, "b m"]
    target: Float[Array, "b frames h w c"]
    condition: Condition

    @property
    def frame_t(self) -> Int[Array, "b frames"]:
        """The timestep of every frame: the video's for its T frames, then each image's."""
        frames = self.x_t.shape[1] - self.image_t.shape[1]
        return _frame_timesteps(self.t, self.image_t, frames)


def _frame_timesteps(t, image_t, frames):
    return jnp.concatenate([jnp.broadcast_to(t[:, None], (t.shape[0], frames)), image_t], axis=1)


def no_condition(inputs: dict) -> Condition:
    """Base: the text alone. LaVie sec. 3.1."""
    return Condition()


def key_frame_condition(inputs: dict) -> Condition:
    """Interpolation: the latents of the key frames, duplicated to the target frame rate. LaVie sec. 3.3.

    inputs: `key_latents` (B, K, h, w, C). Frame i of 4 (K - 1) + 1 sees key frame (i + 1) // 4; every frame is
    synthesised anew, the key frames too.
    """
    key_latents = inputs["key_latents"]
    source = (np.arange(KEY_FRAME_SPACING * (key_latents.shape[1] - 1) + 1) + 1) // KEY_FRAME_SPACING
    return Condition(concat=key_latents[:, source])


def low_res_condition(inputs: dict) -> Condition:
    """Super-resolution: the low-resolution frames, noised, and the level of that noise. LaVie sec. 3.4.

    inputs: `low_res` (B, T, H, W, 3) in [-1, 1]; `low_res_noise` of the same shape, standard normal;
    `noise_level` (B,) int, a timestep of `low_res_schedule` (default: the released model's).
    """
    schedule = inputs.get("low_res_schedule", LOW_RES_SCHEDULE)
    noised = schedule.add_noise(inputs["low_res"], inputs["low_res_noise"], inputs["noise_level"])
    return Condition(concat=noised, noise_level=inputs["noise_level"])


LOW_RES_SCHEDULE = Schedule(kind="scaled_linear", beta_start=1e-4, beta_end=0.02)


DrawTimesteps = Callable[[Array, tuple[int, ...]], Array]  # (rng, shape) -> int32 timesteps


def uniform_timesteps(schedule: Schedule) -> DrawTimesteps:
    """Every timestep as often as any other (Eq. 2)."""
    return lambda rng, shape: jax.random.randint(rng, shape, 0, schedule.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its official sampling settings, its schedule, its condition."""

    name: str
    sampling: dict  # defaults of what a user may set; also written into a weights folder
    null_caption: str  # what caption dropout puts in a caption's place
    schedule: Schedule
    condition: Callable[[dict], Condition]

    def training_pair(
        self,
        latents: Float[Array, "b frames h w c"],
        inputs: dict | None,
        rng: Array,
        *,
        images: int = 0,
        image_inputs: dict | None = None,
        schedule: Schedule | None = None,
        draw: DrawTimesteps | None = None,
    ) -> TrainingPair:
        """Draw timesteps and noise, and make x_t and the target of LaVie's Eq. 1 to 3.

        `latents` holds T video frames, then M = `images` images. `inputs` is what `condition` wants of the video,
        None when T = 0; `image_inputs` of each image, as of a clip of one frame: (B, M, 1, ...), levels (B, M). The
        video's frames share one timestep, every image has its own. `schedule` overrides the stage's (a model with other
        betas or another prediction), `draw` the uniform distribution of the timesteps.
        """
        schedule = schedule or self.schedule
        draw = draw or uniform_timesteps(schedule)
        t_rng, image_rng, noise_rng = jax.random.split(rng, 3)
        batch = latents.shape[0]
        t, image_t = draw(t_rng, (batch,)), draw(image_rng, (batch, images))
        eps = jax.random.normal(noise_rng, latents.shape)
        return self.training_pair_at(latents, inputs, t, image_t, eps, image_inputs=image_inputs, schedule=schedule)

    def training_pair_at(
        self,
        latents: Float[Array, "b frames h w c"],
        inputs: dict | None,
        t: Int[Array, " b"],
        image_t: Int[Array, "b m"],
        eps: Float[Array, "b frames h w c"],
        *,
        image_inputs: dict | None = None,
        schedule: Schedule | None = None,
    ) -> TrainingPair:
        """`training_pair` at given timesteps and noise: what a held-out loss wants."""
        schedule = schedule or self.schedule
        frame_t = _frame_timesteps(t, image_t, latents.shape[1] - image_t.shape[1])
        x_t = schedule.add_noise(latents, eps, frame_t)
        target = schedule.target(latents, eps, frame_t)
        return TrainingPair(x_t, t, image_t, target, self._joint_condition(inputs, image_inputs))

    def _joint_condition(self, inputs: dict | None, image_inputs: dict | None) -> Condition:
        """The clip's condition, and behind it that of every image. A row has one noise level, that of its clip."""
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


def predict(unet, params: dict, pair: TrainingPair, text: Text) -> Float[Array, "b frames h w c"]:
    """The UNet's answer to a training pair."""
    x = pair.x_t if pair.condition.concat is None else jnp.concatenate([pair.x_t, pair.condition.concat], axis=-1)
    images = {} if text.images is None else {"image_text": text.images, "image_t": pair.image_t}
    return unet.apply({"params": params}, x, pair.t, text.video, noise_level=pair.condition.noise_level, **images)


def denoiser(
    unet,
    params: dict,
    text: Float[Array, "b l d"],
    null_text: Float[Array, "b l d"],
    condition: Condition,
    *,
    guidance: float,
    rescale: float = 0.0,
    image: bool = False,
    in_turn: bool = False,
) -> Callable[[Array, Array], Array]:
    """denoise(x_t, t): the UNet under classifier-free guidance (arXiv 2207.12598).

    x_t (B, T, h, w, C), t a scalar or (B,). With `guidance` 1 the unconditional half is left out. `image` takes T = 1
    down the joint model's image path, without temporal layers. Both halves go through the UNet in one call, or with
    `in_turn` one after the other: the same result in half the memory.
    """

    def predict(x_t, t, text, condition):
        x = x_t if condition.concat is None else jnp.concatenate([x_t, condition.concat], axis=-1)
        texts = (None, text[:, None]) if image else (text, None)
        return unet.apply({"params": params}, x, t, *texts, noise_level=condition.noise_level)

    def denoise(x_t, t):
        t = jnp.broadcast_to(t, x_t.shape[:1])
        if guidance == 1.0:
            return predict(x_t, t, text, condition)
        if in_turn:  # a loop, because the compiler would be free to run two calls side by side
            halves = jax.lax.map(lambda half: predict(x_t, t, half, condition), jnp.stack([text, null_text]))
        else:
            twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), (x_t, t, condition))
            halves = jnp.split(predict(twice[0], twice[1], jnp.concatenate([text, null_text]), twice[2]), 2)
        return guide(*halves, guidance, rescale)

    return denoise


_LINEAR_BETAS = {"kind": "linear", "beta_start": 1e-4, "beta_end": 0.02}  # not Stable Diffusion's scaled_linear

STAGES = {
    "base": Stage(
        name="base",
        sampling={
            "height": 320, "width": 512, "frames": 16, "fps": 8, "sampler": "ddpm", "steps": 50, "guidance": 7.5,
            "prompt_suffix": "", "negative_prompt": "",
        },
        null_caption="",
        schedule=Schedule(**_LINEAR_BETAS),
        condition=no_condition,
    ),
    "interpolation": Stage(
        name="interpolation",
        sampling={
            "height": 320, "width": 512, "frames": 61, "fps": 24, "sampler": "respaced_ddim", "steps": 50,
            "guidance": 4.0, "prompt_suffix": ", 4k.", "negative_prompt": "None",
        },
        null_caption="None",
        schedule=Schedule(**_LINEAR_BETAS),
        condition=key_frame_condition,
    ),
    "vsr": Stage(
        name="vsr",
        sampling={
            "height": 1280, "width": 2048, "frames": 61, "fps": 24, "sampler": "ddim", "steps": 50, "guidance": 5.0,
            "prompt_suffix": "", "negative_prompt": "blur, worst quality", "noise_level": 50,
        },
        null_caption="None",
        schedule=Schedule(**_LINEAR_BETAS, prediction="v_prediction"),
        condition=low_res_condition,
    ),
}  # fmt: skip


def interpolated_sampling(base: Mapping[str, Any]) -> dict[str, Any]:
    """The interpolation stage's sampling settings for clips that a base stage with the settings `base` makes.

    The released ones are for its 16 frames of 320x512, 8 a second.
    """
    settings, released = STAGES["interpolation"].sampling, STAGES["base"].sampling
    return {
        **settings,
        "height": base["height"],
        "width": base["width"],
        "frames": KEY_FRAME_SPACING * (base["frames"] - 1) + 1,
        "fps": base["fps"] * settings["fps"] / released["fps"],
    }
