"""Samplers: from noise to data along a falling sequence of noise levels.

    ddpm           ancestral sampling from the posterior q(x_s | x_t, x0)       eq. 6-7, arXiv 2006.11239
    respaced_ddpm  DDPM on timesteps that include both ends, larger variance    prediction stage
    ddim           deterministic: x0 and eps, mixed for the next level          eq. 12, arXiv 2010.02502
    respaced_ddim  DDIM on timesteps that include both ends                     interpolation stage
    euler          Euler's method on the probability-flow ODE in sigma          algorithm 1, arXiv 2206.00364
    heun           Heun's method: second order, two evaluations per step        algorithm 1, arXiv 2206.00364
    dpm++2m        DPM-Solver++(2M): second order, multistep                    algorithm 2, arXiv 2211.01095
    unipc          UniPC-2: dpm++2m, corrected by the next evaluation           algorithm 1, arXiv 2302.04867
    lcm            x0 at once, noised again: distilled networks, 1 to 8 steps   algorithm 3, arXiv 2310.04378

A sampler never calls the network. It provides the network's input and consumes the prediction:

    sampler = make_sampler("ddim", 50, schedule)
    state = sampler.init(noise)
    for i in range(sampler.evaluations):
        x_t, t = sampler.model_input(state, i)
        state = sampler.update(state, i, network(x_t, t))
    x0 = state["x"]

`i` counts network evaluations. The state is a small dict of arrays and `update` is a pure function, so a chain can be
scanned with a traced `i`, or saved to disk between any two evaluations and resumed. Noise levels are written as
abar = alpha^2 = 1 - sigma^2 (`schedule.py`). This file has the interface and the first-order samplers. The others are
in `second_order.py` and `consistency.py`, the timesteps in `spacing.py`, and `make_sampler` in `making.py`.

Coefficients are computed in float64 on the host (except DDPM's, see there) and applied in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Shaped

from lavie_jax.diffusion.schedule import Schedule, join_prediction, split_prediction
from lavie_jax.diffusion.spacing import spaced_timesteps

State = dict[str, Array | np.ndarray]
Denoise = Callable[[ArrayLike, ArrayLike], Array]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The interface of all samplers. Samplers hash by their fields: they can be static arguments of `jax.jit`.

    Attributes:
        steps: number of steps of the whole chain, each from one noise level to the next.
        schedule: the schedule that the network was trained with.
        spacing: how the timesteps are spaced, one of `SPACINGS`.
        first: index of the first step that is run, see `tail`.
        default_spacing: the spacing that `make_sampler` uses if none is given.
        leading_offset: the offset of "leading" spacing.
        fractional: whether the network is evaluated at fractional timesteps.
        needs_noise: whether `update` takes fresh noise.
        state_arrays: number of arrays in the state, each in the shape of x.
    """

    steps: int
    schedule: Schedule
    spacing: str
    first: int = 0
    default_spacing: ClassVar[str]
    leading_offset: ClassVar[int] = 0
    fractional: ClassVar[bool] = False
    needs_noise: ClassVar[bool] = False
    state_arrays: ClassVar[int] = 1

    @property
    def evaluations(self) -> int:
        """Number of network evaluations of the chain."""
        return self.steps - self.first

    def tail(self, first: int) -> "Sampler":
        """Returns the sampler of the chain from step `first` on, which starts from noised data (`add_noise`)."""
        return dataclasses.replace(self, first=first)

    @functools.cached_property
    def step_timesteps(self) -> np.ndarray:
        """The timestep at which each step starts, in decreasing order."""
        timesteps = spaced_timesteps(
            self.spacing, self.steps, self.schedule, offset=self.leading_offset, fractional=self.fractional
        )
        return timesteps[self.first :]

    @property
    def timesteps(self) -> np.ndarray:
        """The timestep of each network evaluation, `(evaluations,)`."""
        return self.step_timesteps

    @functools.cached_property
    def levels(self) -> np.ndarray:
        """abar before each step and after the last, float64, in increasing order."""
        return np.append(self.schedule.alphas_cumprod[self.step_timesteps], self.final_level)

    @property
    def final_level(self) -> float:
        """abar at the end of the chain; 1 is data without any noise."""
        return 1.0

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of `state["x"]` at the start."""
        return 1.0

    @property
    def residual_noise(self) -> float:
        """Standard deviation of the fresh noise that the result still contains."""
        return 0.0

    def init(self, noise: Float[ArrayLike, "b ..."]) -> State:
        """Returns the state before evaluation 0, float32, given standard normal `noise`."""
        return {"x": jnp.asarray(noise, jnp.float32) * self.init_noise_sigma}

    def add_noise(self, x0: Float[ArrayLike, "b ..."], noise: Float[ArrayLike, "b ..."]) -> Float[Array, "b ..."]:
        """Returns `state["x"]` before evaluation 0 of a chain that starts from noised data, float32."""
        alpha, sigma = entries(0, np.sqrt(self.levels), np.sqrt(1 - self.levels))
        return alpha * jnp.asarray(x0, jnp.float32) + sigma * jnp.asarray(noise, jnp.float32)

    def model_input(self, state: State, i: int | Array) -> tuple[Float[ArrayLike, "b ..."], Shaped[ArrayLike, " b"]]:
        """Returns the inputs of the network.

        Args:
            state: the return value of `init` or of the previous `update`. NumPy arrays stay on the host if `i` is an
                int.
            i: index of the evaluation in [0, evaluations), may be traced.

        Returns:
            x_t, float32 `(B, ...)`, of unit variance for data of unit variance, and t `(B,)`, int32, or float32 where
            timesteps are fractional.
        """
        dtype = np.int32 if np.issubdtype(self.timesteps.dtype, np.integer) else np.float32
        (t,) = entries(i, self.timesteps, dtype=dtype)
        x_t = self._x_t(state, i)
        return x_t, t * np.ones(x_t.shape[:1], dtype)  # a product broadcasts NumPy and traced values alike

    def update(
        self,
        state: State,
        i: int | Array,
        prediction: Float[ArrayLike, "b ..."],
        noise: Float[ArrayLike, "b ..."] | None = None,
    ) -> State:
        """Returns the state after evaluation i; after the last, `["x"]` is x0.

        Args:
            state: the state that `model_input` was called with.
            i: index of the evaluation in [0, evaluations), may be traced.
            prediction: the network's output for `model_input(state, i)`, of the schedule's prediction type.
            noise: standard normal, in the shape of x; only if `needs_noise`.

        Returns:
            The next state, in the same structure, shapes and dtypes.
        """
        raise NotImplementedError

    def prediction_of(self, state: State, i: int | Array, x0: Float[ArrayLike, "b ..."]) -> Float[Array, "b ..."]:
        """Returns the prediction for `model_input(state, i)` that corresponds to `x0`, for known data."""
        alpha, sigma = self._alpha_sigma(i)
        x0 = jnp.asarray(x0, jnp.float32)
        eps = (self._x_t(state, i) - alpha * x0) / sigma
        return join_prediction(self.schedule.prediction, x0, eps, alpha, sigma)

    def _x_t(self, state: State, i: int | Array) -> ArrayLike:
        return state["x"]

    def _level_index(self, i: int | Array | np.ndarray) -> int | Array | np.ndarray:
        """The index in `levels` of evaluation i."""
        return i

    def _alpha_sigma(self, i: int | Array) -> tuple[ArrayLike, ArrayLike]:
        """Returns alpha and sigma of evaluation i, float32."""
        return entries(self._level_index(i), np.sqrt(self.levels), np.sqrt(1 - self.levels))

    def _x0_and_eps(self, state: State, i: int | Array, prediction: ArrayLike) -> tuple[Array, Array]:
        alpha, sigma = self._alpha_sigma(i)
        kind, prediction = self.schedule.prediction, jnp.asarray(prediction, jnp.float32)
        return split_prediction(kind, prediction, jnp.asarray(self._x_t(state, i)), alpha, sigma)


class DDPM(Sampler):
    """Ancestral sampling: each step samples the posterior q(x_s | x_t, x0), s < t.

    With abar_t = abar_s * a and b = 1 - a (eq. 6-7 and algorithm 2, arXiv 2006.11239):

        mean      sqrt(abar_s) b / (1 - abar_t) x0  +  sqrt(a) (1 - abar_s) / (1 - abar_t) x_t
        variance  (1 - abar_s) / (1 - abar_t) b

    The last step, to abar = 1, adds no noise. The base stage's default.
    """

    default_spacing = "leading"
    needs_noise = True
    # float32, unlike everywhere else: 1 - a cancels, and the rounding of the released sampler changes its samples by
    # 1e-5 at 100 steps and by 1e-4 at 500.
    coefficient_dtype: ClassVar[DTypeLike] = np.float32

    def update(self, state, i, prediction, noise=None):
        """Samples from the posterior of the next level, given x_t and the estimate of x0."""
        if noise is None:
            raise ValueError("ddpm needs fresh noise at every step: call update(state, i, prediction, noise)")
        x0, _ = self._x0_and_eps(state, i, prediction)
        levels = self.levels.astype(self.coefficient_dtype)
        abar_t, abar_s = levels[:-1], levels[1:]
        a = abar_t / abar_s
        x0_weight, x_t_weight, std = entries(
            i,
            np.sqrt(abar_s) * (1 - a) / (1 - abar_t),
            np.sqrt(a) * (1 - abar_s) / (1 - abar_t),
            np.sqrt(self._variance(abar_t, abar_s)),
        )
        return {"x": x0_weight * x0 + x_t_weight * state["x"] + std * noise}

    def _variance(self, abar_t: np.ndarray, abar_s: np.ndarray) -> np.ndarray:
        """The variance of the fresh noise of each step."""
        return (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)


class RespacedDDPM(DDPM):
    """DDPM on a schedule respaced to fewer timesteps, with the variance b ("fixed large", arXiv 2102.09672, sec. 3.1).

    b is the upper bound of the variance, and the posterior's variance the lower bound (sec. 3.2, arXiv 2006.11239). The
    network removes only the schedule's noise: what the last addition exceeds it by remains in the result, so many steps
    are needed. The prediction stage's default.
    """

    default_spacing = "linspace"
    coefficient_dtype = np.float64

    @property
    def residual_noise(self) -> float:
        """Standard deviation of the noise in x_t at the last evaluation beyond the schedule's, which remains in x0."""
        if self.evaluations == 1:
            return 0.0
        abar_t, abar_s = self.levels[-3:-2], self.levels[-2:-1]
        return float(np.sqrt(self._variance(abar_t, abar_s) - super()._variance(abar_t, abar_s))[0])

    def _variance(self, abar_t, abar_s):
        return np.where(abar_s < 1, 1 - abar_t / abar_s, 0.0)


class DDIM(Sampler):
    """Deterministic sampling: x0 and eps, mixed for the next level (eq. 12 with eta = 0, arXiv 2010.02502).

        x_s = alpha_s x0 + sigma_s eps

    The chain ends at the schedule's own first level, abar_0, not at 1. The VSR stage's default.
    """

    default_spacing = "leading"
    leading_offset = 1

    @property
    def final_level(self) -> float:
        """abar of the schedule's own first level."""
        return self.schedule.alphas_cumprod[0]

    def update(self, state, i, prediction, noise=None):
        """Mixes x0 and eps for the next level."""
        x0, eps = self._x0_and_eps(state, i, prediction)
        alpha, sigma = entries(i, np.sqrt(self.levels[1:]), np.sqrt(1 - self.levels[1:]))
        return {"x": alpha * x0 + sigma * eps}


class RespacedDDIM(DDIM):
    """DDIM on a schedule respaced to fewer timesteps (sec. 4, arXiv 2102.09672), which ends at abar = 1.

    The interpolation stage's default.
    """

    default_spacing = "linspace"

    @property
    def final_level(self) -> float:
        """1: the chain ends without noise."""
        return 1.0


class Euler(Sampler):
    """Euler's method on dx/dsigma = eps, where x = x0 + sigma eps (Euler steps of algorithm 1, arXiv 2206.00364).

    In this class sigma is the noise relative to the signal, sqrt((1 - abar) / abar), interpolated at fractional
    timesteps. `state["x"]` is x_t / sqrt(abar_t), of variance up to sigma_max^2 + 1; the network gets x_t, that is
    x / sqrt(sigma^2 + 1). On equal levels, Euler and DDIM are the same method.
    """

    default_spacing = "linspace"
    fractional = True

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """sigma before each step and after the last (0), float64."""
        sigmas = np.interp(self.step_timesteps, np.arange(self.schedule.steps), self.schedule.sigmas)
        return np.append(sigmas, 0.0)

    @functools.cached_property
    def levels(self) -> np.ndarray:
        """abar before each step and after the last (1), float64."""
        return 1 / (self.sigmas**2 + 1)

    @property
    def init_noise_sigma(self) -> float:
        """The largest sigma: noise relative to the signal."""
        return float(self.sigmas.max())

    def add_noise(self, x0, noise):
        """Adds noise to x0 up to the first level, in this class's scale."""
        return super().add_noise(x0, noise) / np.float32(np.sqrt(self.levels[0]))

    def _x_t(self, state, i):
        (scale,) = entries(self._level_index(i), np.sqrt(self.levels))
        return scale * state["x"]

    def update(self, state, i, prediction, noise=None):
        """Steps along the slope eps to the next sigma."""
        _, eps = self._x0_and_eps(state, i, prediction)
        (dsigma,) = entries(i, np.diff(self.sigmas))
        return {"x": state["x"] + dsigma * eps}


def sample(
    sampler: Sampler,
    denoise: Denoise,
    noise: Float[ArrayLike, "b ..."],
    noise_at: Callable[[int], Float[ArrayLike, "b ..."]] | None = None,
) -> Float[Array, "b ..."]:
    """Runs a whole chain as a Python loop and returns x0.

    Args:
        sampler: the sampler.
        denoise: `denoise(x_t, t) -> prediction`.
        noise: standard normal, in the shape of x0; the start of the chain.
        noise_at: `noise_at(i)` returns the fresh noise of evaluation i; only called if `sampler.needs_noise`.
    """
    state = sampler.init(noise)
    for i in range(sampler.evaluations):
        prediction = denoise(*sampler.model_input(state, i))
        state = sampler.update(state, i, prediction, noise_at(i) if sampler.needs_noise else None)
    return state["x"]


def entries(i: int | Array, *tables: np.ndarray, dtype: DTypeLike = np.float32) -> tuple[ArrayLike, ...]:
    """Returns entry i of each float64 table, in float32. `i` may be traced; with an int, entries stay on the host."""
    tables = (np.asarray(table, dtype) for table in tables)
    return tuple(jnp.asarray(table)[i] if isinstance(i, jax.Array) else table[i] for table in tables)
