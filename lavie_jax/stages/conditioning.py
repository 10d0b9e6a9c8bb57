"""Calls a stage's UNet: on the input of a training step, and with guidance in sampling.

Both use the same `Condition`, from `Stage.condition`. Latents are scaled, (B, T, h, w, C). Noise is always an argument
and never generated inside a condition, so that a sample depends only on its own seed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from lavie_jax import random
from lavie_jax.diffusion.guidance import guide
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.models.unet import deep_features
from lavie_jax.models.vae import VAEConfig, sample_posterior


class Condition(NamedTuple):
    """Inputs of the UNet other than x_t, t and text."""

    concat: Float[Array, "b t h w c"] | None = None  # concatenated to x_t along the channels
    noise_level: Int[Array, " b"] | None = None  # of the low-resolution frames (super-resolution)


class KnownLatents(NamedTuple):
    """Which frames of a clip are known, and the latents of all its frames. Only those of known frames are used."""

    known: Bool[ArrayLike, " t"]
    latents: Float[ArrayLike, "t h w c"]


class Text(NamedTuple):
    """Encoded captions of the videos and of the images; None if the batch has no videos or no images.

    A video has one caption, or one for each of its frames, (B, T, L, D). The masks are True at tokens and False at
    padding. None means no padding, as in CLIP's captions.
    """

    video: Float[Array, "b *t l d"] | None
    images: Float[Array, "b m l d"] | None = None
    video_mask: Bool[Array, "b *t l"] | None = None
    image_mask: Bool[Array, "b m l"] | None = None


class Prompts(NamedTuple):
    """Encoded prompts: hidden states (B, L, D), and a mask (B, L) as in `Text`."""

    hidden: Float[ArrayLike, "*b l d"]
    mask: Bool[ArrayLike, "*b l"] | None = None

    @property
    def per_frame(self) -> bool:
        """Whether these are the prompts of a clip's frames, (T, L, D), rather than a single prompt, (L, D)."""
        return self.hidden.ndim == 3

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.hidden.shape[-2]

    def padded(self, length: int) -> "Prompts":
        """Pads the prompts to `length` with masked tokens, which have no effect."""
        mask = np.ones(self.hidden.shape[:-1], bool) if self.mask is None else np.asarray(self.mask)
        more = [(0, 0)] * (mask.ndim - 1) + [(0, length - self.length)]
        return Prompts(np.pad(self.hidden, [*more, (0, 0)]), np.pad(mask, more))

    def repeated(self, frames: int) -> "Prompts":
        """Repeats one prompt for each of `frames` frames."""
        return jax.tree.map(lambda x: np.broadcast_to(x, (frames, *x.shape)), self)

    def mixed(self, weights: Float[np.ndarray, "t k"]) -> "Prompts":
        """Mixes K prompts to a text for each of T frames. A token is real if it is real in any mixed prompt."""
        hidden = np.tensordot(weights, np.asarray(self.hidden, np.float32), 1).astype(self.hidden.dtype)
        return Prompts(hidden, None if self.mask is None else (weights > 0) @ self.mask)


def travel_weights(at: Sequence[int], frames: int, length: int) -> Float[np.ndarray, "t k"]:
    """Returns the weights of K prompts in each frame: linear between the prompts' frames `at`, constant outside.

    Args:
        at: the frame of each prompt, ascending, in a clip of `frames` frames.
        frames: length of that clip.
        length: number of frames in the result, whose clip shows the same at another frame rate.
    """
    time = np.linspace(0, frames - 1, length)
    return np.stack([np.interp(time, at, alone) for alone in np.eye(len(at))], axis=-1).astype(np.float32)


class EncodedClips(NamedTuple):
    """Frames as pixels in [-1, 1] (None in a set of latents), and the VAE's unscaled posterior of each frame.

    A clip is (B, T, ...). Images are clips of one frame, (B, M, 1, ...).
    """

    pixels: Float[Array, "*n t H W 3"] | None
    mean: Float[Array, "*n t h w c"]
    logvar: Float[Array, "*n t h w c"]

    def select(self, *index: slice | None) -> "EncodedClips":
        """Indexes the axes after the batch axis."""
        return jax.tree.map(lambda x: x[:, *index], self)

    def without_variance(self) -> "EncodedClips":
        """The same clips with zero posterior variance, so that every sample equals the mean."""
        return self._replace(logvar=jnp.full_like(self.logvar, -jnp.inf))

    def sample(self, rng: random.Key, vae: VAEConfig) -> Float[Array, "*n t h w c"]:
        """Scaled latents: one sample of the posterior of every frame."""
        return sample_posterior(self.mean, self.logvar, rng) * vae.scaling_factor


class ConditionSetup(NamedTuple):
    """Inputs of a training clip's condition, besides the clip.

    Attributes:
        vae: configuration of the VAE that encoded the clip.
        grey: a mid-grey frame (1, 1, ...), of a stage with masks in its condition.
        options: the stage's training settings by config group, see `StageInfo.training`.
    """

    vae: VAEConfig
    grey: EncodedClips | None = None
    options: Mapping[str, Any] = {}


class TrainingPair(NamedTuple):
    """Input and target of the UNet in one training step."""

    x_t: Float[Array, "b frames h w c"]
    t: Int[Array, " b"]
    image_t: Int[Array, "b m"]
    target: Float[Array, "b frames h w c"]
    condition: Condition

    @property
    def frame_t(self) -> Int[Array, "b frames"]:
        """The timestep of every frame: the video's for its T frames, then each image's."""
        return frame_timesteps(self.t, self.image_t, self.x_t.shape[1] - self.image_t.shape[1])


def frame_timesteps(t: Int[Array, " b"], image_t: Int[Array, "b m"], frames: int) -> Int[Array, "b frames"]:
    """The timestep of each of T `frames`, then of each of M images."""
    return jnp.concatenate([jnp.broadcast_to(t[:, None], (t.shape[0], frames)), image_t], axis=1)


SampleTimesteps = Callable[[random.Key, tuple[int, ...]], Array]  # (rng, shape) -> int32 timesteps


def uniform_timesteps(schedule: Schedule) -> SampleTimesteps:
    """Samples every timestep with the same probability (Eq. 2)."""
    return lambda rng, shape: random.integers(rng, shape, 0, schedule.steps)


def predict(unet, params: dict, pair: TrainingPair, text: Text) -> Float[Array, "b frames h w c"]:
    """The UNet's prediction for a training pair."""
    return _call(unet, params, pair.x_t, pair.t, text, pair.condition, image_t=pair.image_t)()


class Evaluation(NamedTuple):
    """A prediction, and the parts of its computation that later evaluations reuse.

    Attributes:
        prediction: the guided prediction.
        change: the conditional minus the unconditional prediction.
        deep: features of the UNet's deep layers (`deep_features`): with the text and, under guidance, also without it.
    """

    prediction: Float[Array, "b t h w c"]
    change: Float[Array, "b t h w c"] | None = None
    deep: Float[Array, "b halves t h_deep w_deep c_deep"] | None = None


def denoiser(
    unet,
    params: dict,
    text: Prompts,
    null_text: Prompts,
    condition: Condition,
    *,
    guidance: float,
    rescale: float = 0.0,
    image: bool = False,
    sequential_guidance: bool = False,
    change: Float[Array, "b t h w c"] | None = None,
    keep_change: bool = False,
    deep: Float[Array, "b halves t h_deep w_deep c_deep"] | None = None,
    cache_depth: int | None = None,
) -> Callable[[Array, Array], Evaluation]:
    """Returns denoise(x_t, t), the UNet with classifier-free guidance (arXiv 2207.12598).

    Args:
        unet: the network, whose `apply` is called.
        params: its parameters.
        text: encoded prompts, one for each video or for each of its frames.
        null_text: encoded negative or empty prompts, likewise.
        condition: the stage's condition.
        guidance: the guidance scale; 1 leaves out the unconditional half.
        rescale: see `guide`.
        image: for T = 1, takes the image path of the joint model, without temporal layers.
        sequential_guidance: calls the UNet once for each half instead of once for both: half the memory.
        change: `Evaluation.change` of an earlier evaluation. If given, it is reused, and the unconditional half is not
            computed.
        keep_change: whether to return `Evaluation.change`, for later evaluations.
        deep: `Evaluation.deep` of an earlier evaluation, which replaces the deep layers. It must have as many halves as
            are predicted now.
        cache_depth: number of skip connections that are computed if `deep` is given. If `deep` is None,
            `Evaluation.deep` of this evaluation is returned. None: no features are returned or reused.

    Returns:
        A function of x_t (B, T, h, w, C) and t, a scalar or (B,).
    """
    by_half = None if deep is None else rearrange(deep, "b halves ... -> halves b ...")

    def predict_half(x_t, t, text, condition, deep=None):
        """Returns the prediction, and its deep features if later evaluations may reuse them, else None."""
        each = jax.tree.map(lambda x: x[:, None], text)
        half = Text(None, each.hidden, None, each.mask) if image else Text(text.hidden, None, text.mask)
        call = _call(unet, params, x_t, t, half, condition)
        if cache_depth is None:
            return call(), None
        if deep is not None:
            return call(deep=deep, depth=cache_depth), None
        prediction, kept = call(mutable="intermediates")
        return prediction, deep_features(unet.config, kept["intermediates"], cache_depth)

    def denoise(x_t, t) -> Evaluation:
        """Predicts with and without the text, and combines both by guidance."""
        t = jnp.broadcast_to(t, x_t.shape[:1])
        if guidance == 1.0 or change is not None:
            cond, kept = predict_half(x_t, t, text, condition, None if by_half is None else by_half[0])
            kept = None if kept is None else kept[:, None]
            if change is None:
                return Evaluation(cond, deep=kept)
            cond = cond.astype(jnp.float32)
            return Evaluation(guide(cond, cond - change, guidance, rescale), deep=kept)
        if sequential_guidance:  # a loop, because the compiler would be free to run two calls at the same time
            texts = jax.tree.map(lambda *halves: jnp.stack(halves), text, null_text)
            one = lambda half: predict_half(x_t, t, half[0], condition, half[1])  # noqa: E731
            halves, kept = jax.lax.map(one, (texts, by_half))
            kept = None if kept is None else rearrange(kept, "halves b ... -> b halves ...")
        else:
            twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), (x_t, t, condition))
            texts = jax.tree.map(lambda *halves: jnp.concatenate(halves), text, null_text)
            both = None if by_half is None else rearrange(by_half, "halves b ... -> (halves b) ...")
            halves, kept = predict_half(twice[0], twice[1], texts, twice[2], both)
            halves = jnp.split(halves, 2)
            kept = None if kept is None else rearrange(kept, "(halves b) ... -> b halves ...", halves=2)
        cond, uncond = halves
        guided = guide(cond, uncond, guidance, rescale)
        new_change = cond.astype(jnp.float32) - uncond.astype(jnp.float32) if keep_change else None
        return Evaluation(guided, new_change, kept)

    return denoise


def _call(
    unet, params: dict, x_t: Array, t: Array, text: Text, condition: Condition, image_t: Array | None = None
) -> Callable[..., Any]:
    """Returns the UNet's `apply` with all arguments bound except those of the feature cache."""
    x = x_t if condition.concat is None else jnp.concatenate([x_t, condition.concat], axis=-1)
    inputs = {
        "image_text": text.images,
        "image_t": None if text.images is None else image_t,
        "noise_level": condition.noise_level,
        "text_mask": text.video_mask,
        "image_text_mask": text.image_mask,
    }
    given = {k: v for k, v in inputs.items() if v is not None}
    return functools.partial(unet.apply, {"params": params}, x, t, text.video, **given)
