"""The forward process: the noise level of each timestep, and the prediction type of the network.

A clean array x0 and Gaussian noise eps mix as (eq. 4, arXiv 2006.11239)

    x_t = alpha_t x0 + sigma_t eps,    alpha_t = sqrt(abar_t),    sigma_t = sqrt(1 - abar_t),

where abar_t, `alphas_cumprod[t]`, falls from almost 1 at t = 0 to almost 0 at the last timestep. The
network predicts one of three quantities, from which the other two follow:

    "epsilon"        eps                             (arXiv 2006.11239)
    "v_prediction"   v = alpha_t eps - sigma_t x0    (arXiv 2202.00512, sec. 4 and appendix D)
    "sample"         x0

The reverse process, from noise to data, is in `samplers.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from lavie_jax.errors import UserError, suggest

BETA_SCHEDULES = ("linear", "scaled_linear")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A variance schedule and the prediction type of its network.

    The defaults are those of every released LaVie model but VSR's, whose `prediction` is "v_prediction".
    Schedules compare and hash by their fields: they can be static arguments of `jax.jit`.

    The methods take integer timesteps `t` in [0, steps), whose axes are the leading axes of the other arrays: `t (B,)`
    gives each sample a timestep, `t (B, F)` each frame of each sample.

    Attributes:
        kind: "linear": betas evenly spaced; "scaled_linear": their square roots are (Stable Diffusion).
        beta_start: variance added at the first timestep, in (0, 1).
        beta_end: variance added at the last timestep, in [beta_start, 1).
        steps: number of training timesteps.
        prediction: what the network predicts: "epsilon", "v_prediction" or "sample".

    Raises:
        UserError: a field is unknown or out of range.
    """

    kind: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    prediction: str = "epsilon"

    def __post_init__(self):
        if self.kind not in BETA_SCHEDULES:
            raise UserError(f"unknown beta schedule {self.kind!r}{suggest(self.kind, BETA_SCHEDULES)}")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"unknown prediction type {self.prediction!r}{suggest(self.prediction, PREDICTIONS)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            given = f"{self.beta_start} and {self.beta_end}"
            raise UserError(f"betas must satisfy 0 < beta_start <= beta_end < 1, not {given}")
        if self.steps < 1:
            raise UserError(f"a schedule needs at least 1 timestep, not {self.steps}")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Schedule":
        """Reads the contents of a diffusers `scheduler_config.json`.

        Absent keys take diffusers' defaults, which are those of this class. Keys about sampling (`steps_offset`,
        `set_alpha_to_one`, `clip_sample`...) are not part of a schedule and are ignored.

        Raises:
            UserError: a value is not supported; the message lists the supported ones.
        """
        where = "scheduler_config.json"
        if config.get("trained_betas") is not None:
            raise UserError(f"{where}: trained_betas is not supported, only those of beta_schedule")
        if config.get("rescale_betas_zero_snr"):
            raise UserError(f"{where}: rescale_betas_zero_snr is not supported, only false")
        fields = {}
        for field in dataclasses.fields(cls):
            key = _JSON_NAMES[field.name]
            value = config.get(key, field.default)
            allowed = (int, float) if field.type is float else field.type
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise UserError(f"{where}: {key} must be {_JSON_TYPES[field.type]}, not {value!r}")
            fields[field.name] = value
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields under diffusers' names; the inverse of `from_json`."""
        return {theirs: getattr(self, ours) for ours, theirs in _JSON_NAMES.items()}

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t, float64 `(steps,)`, falling: the share of x_t's variance that is signal."""
        if self.kind == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.steps)
        else:
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps) ** 2
        return np.cumprod(1 - betas)

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """sigma_t / alpha_t, float64 `(steps,)`, rising: the noise level sigma of arXiv 2206.00364."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def add_noise(
        self, x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], t: Int[ArrayLike, "..."]
    ) -> Float[Array, "b ..."]:
        """Returns x_t, a sample of the forward process (eq. 4, arXiv 2006.11239); float32."""
        alpha, sigma = self._alpha_sigma(t, x0.ndim)
        return alpha * x0 + sigma * eps

    def target(
        self, x0: Float[Array, "b ..."], eps: Float[Array, "b ..."], t: Int[ArrayLike, "..."]
    ) -> Float[Array, "b ..."]:
        """Returns the prediction target of the network for the input `add_noise(x0, eps, t)`."""
        return join_prediction(self.prediction, x0, eps, *self._alpha_sigma(t, x0.ndim))

    def x0_and_eps(
        self, prediction: Float[Array, "b ..."], x_t: Float[Array, "b ..."], t: Int[ArrayLike, "..."]
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """Returns the x0 and eps of `add_noise` that the network's `prediction` for x_t stands for."""
        return split_prediction(self.prediction, prediction, x_t, *self._alpha_sigma(t, x_t.ndim))

    def snr(self, t: Int[ArrayLike, "*times"]) -> Float[Array, "*times"]:
        """Returns the signal-to-noise ratio abar_t / (1 - abar_t), float32, one for each entry of `t`."""
        return jnp.asarray(self.alphas_cumprod / (1 - self.alphas_cumprod), jnp.float32)[t]

    def _alpha_sigma(self, t: Int[ArrayLike, "..."], ndim: int) -> tuple[Array, Array]:
        """Returns (alpha_t, sigma_t) in float32, with trailing axes added up to `ndim`."""
        t = jnp.asarray(t)
        t = t.reshape(t.shape + (1,) * (ndim - t.ndim))
        # The roots are taken in float64: 1 - abar loses half of float32's digits near t = 0.
        alpha = jnp.asarray(np.sqrt(self.alphas_cumprod), jnp.float32)
        sigma = jnp.asarray(np.sqrt(1 - self.alphas_cumprod), jnp.float32)
        return alpha[t], sigma[t]


_JSON_NAMES = {
    "kind": "beta_schedule",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "steps": "num_train_timesteps",
    "prediction": "prediction_type",
}
_JSON_TYPES = {str: "a string", int: "a whole number", float: "a number"}


def split_prediction(
    kind: str,
    prediction: Float[Array, "*shape"],
    x_t: Float[Array, "*shape"],
    alpha: Float[ArrayLike, "..."],
    sigma: Float[ArrayLike, "..."],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Returns (x0, eps) of x_t = alpha x0 + sigma eps, given the network's `prediction` of the given kind."""
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha, prediction
    if kind == "sample":
        return prediction, (x_t - alpha * prediction) / sigma
    # v_prediction: (x_t, v) is (x0, eps) turned by the angle whose cosine is alpha (arXiv 2202.00512, app. D)
    return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction


def join_prediction(
    kind: str,
    x0: Float[Array, "*shape"],
    eps: Float[Array, "*shape"],
    alpha: Float[ArrayLike, "..."],
    sigma: Float[ArrayLike, "..."],
) -> Float[Array, "*shape"]:
    """Returns the prediction of the given kind that stands for x0 and eps; the inverse of `split_prediction`."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    return alpha * eps - sigma * x0
