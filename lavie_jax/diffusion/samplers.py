"""Samplers: walking back from noise to data.

A sampler is a falling sequence of noise levels and a rule for one step between two of them. At step i it
asks the network about x_t at `timesteps[i]`, reads the answer as estimates of the clean array x0 and of the
noise eps in it (`schedule.py`), and moves from abar = `levels[i]` to the less noisy `levels[i + 1]`:

    ddpm           DDPM: a draw from the posterior q(x_s | x_t, x0)           eq. 6-7, arXiv 2006.11239
    ddim           DDIM: x0 and eps mixed anew, deterministic                 eq. 12, arXiv 2010.02502
    respaced_ddim  DDIM on timesteps that include both ends                   interpolation stage
    euler          Euler's method on the probability-flow ODE in sigma        algorithm 1, arXiv 2206.00364
    dpm++2m        DPM-Solver++(2M): second order, one evaluation a step      algorithm 2, arXiv 2211.01095

One step is a pure function of a small dict of arrays, so a chain can be scanned, jitted with a traced step
number, or saved to disk in the middle and resumed:

    sampler = make_sampler("ddim", 50, schedule)
    state = sampler.init(noise)
    for i in range(sampler.steps):
        state = sampler.step(state, i, denoise)
    x0 = state["x"]

Coefficients are computed in float64 on the host (DDPM says why not there) and applied in float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from lavie_jax.diffusion.schedule import Schedule, split_prediction
from lavie_jax.errors import UserError, suggest

State = dict[str, Array]
Denoise = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What all samplers share. A sampler is hashable: it can be a static argument of `jax.jit`.

    Attributes:
        steps: number of network evaluations.
        schedule: the schedule that the network was trained with.
        needs_noise: whether `step` takes fresh noise.
    """

    steps: int
    schedule: Schedule
    needs_noise: ClassVar[bool] = False

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """What the network is asked about, `(steps,)`, falling; whole numbers unless the class says so."""
        raise NotImplementedError

    @functools.cached_property
    def levels(self) -> np.ndarray:
        """abar before each step and after the last, float64 `(steps + 1,)`, rising."""
        return np.append(self.schedule.alphas_cumprod[self.timesteps], self.final_level)

    @property
    def final_level(self) -> float:
        """abar where the chain ends: 1 is data without any noise."""
        return 1.0

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the state at the start."""
        return 1.0

    def init(self, noise: Float[ArrayLike, "b ..."]) -> State:
        """The state before step 0. `noise` is standard normal; `state["x"]` is x_t, float32."""
        return {"x": jnp.asarray(noise, jnp.float32) * self.init_noise_sigma}

    def step(
        self, state: State, i: int | Array, denoise: Denoise, noise: Float[ArrayLike, "b ..."] | None = None
    ) -> State:
        """One step of the chain.

        Args:
            state: what `init` or the step before returned.
            i: step number in [0, steps), may be traced.
            denoise: `denoise(x_t, t) -> prediction`, x_t float32 `(B, ...)`, t `(B,)` (int32, or float32
                where `timesteps` are fractional); the prediction is of the schedule's type, in x_t's shape.
            noise: standard normal, in x's shape; only where `needs_noise`.

        Returns:
            The next state, in the same structure, shapes and dtypes; after the last step `["x"]` is x0.
        """
        raise NotImplementedError

    def _estimate(self, x_t: Array, i: int | Array, denoise: Denoise) -> tuple[Array, Array]:
        """The network's (x0, eps) for x_t at step i."""
        # float64 becomes float32 and int64 int32 here, whatever jax_enable_x64 says
        dtype = jnp.int32 if np.issubdtype(self.timesteps.dtype, np.integer) else jnp.float32
        t = jnp.broadcast_to(jnp.asarray(self.timesteps, dtype)[i], x_t.shape[:1])
        prediction = denoise(x_t, t).astype(jnp.float32)
        alpha, sigma = _row(i, np.sqrt(self.levels), np.sqrt(1 - self.levels))
        return split_prediction(self.schedule.prediction, prediction, x_t, alpha, sigma)


class DDPM(Sampler):
    """Ancestral sampling: each step draws from the posterior q(x_s | x_t, x0), s < t.

    With abar_t = abar_s * a and b = 1 - a (eq. 6-7 and algorithm 2, arXiv 2006.11239):

        mean      sqrt(abar_s) b / (1 - abar_t) x0  +  sqrt(a) (1 - abar_s) / (1 - abar_t) x_t
        variance  (1 - abar_s) / (1 - abar_t) b

    The last step, to abar = 1, adds no noise. The base stage's default.
    """

    needs_noise = True

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        return _leading(self.steps, self.schedule.steps, offset=0)

    def step(self, state, i, denoise, noise=None):
        if noise is None:
            raise ValueError("ddpm draws noise at every step: call step(state, i, denoise, noise)")
        x0, _ = self._estimate(state["x"], i, denoise)
        # In float32, unlike all else: 1 - a cancels, and the released sampler's rounding moves the outcome by
        # 1e-5 at 100 steps and 1e-4 at 500.
        abar_t, abar_s = self.levels[:-1].astype(np.float32), self.levels[1:].astype(np.float32)
        a = abar_t / abar_s
        variance = (1 - abar_s) / (1 - abar_t) * (1 - a)
        of_x0, of_x_t, of_noise = _row(
            i,
            np.sqrt(abar_s) * (1 - a) / (1 - abar_t),
            np.sqrt(a) * (1 - abar_s) / (1 - abar_t),
            np.sqrt(variance),
        )
        return {"x": of_x0 * x0 + of_x_t * state["x"] + of_noise * noise}


class DDIM(Sampler):
    """Deterministic: the same x0 and eps, mixed for the next level (eq. 12 with eta = 0, arXiv 2010.02502).

    The chain ends at the schedule's own first level, abar_0, not at 1. Also the VSR stage's sampler.
    """

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        return _leading(self.steps, self.schedule.steps, offset=1)

    @property
    def final_level(self) -> float:
        return self.schedule.alphas_cumprod[0]

    def step(self, state, i, denoise, noise=None):
        x0, eps = self._estimate(state["x"], i, denoise)
        alpha, sigma = _row(i, np.sqrt(self.levels[1:]), np.sqrt(1 - self.levels[1:]))
        return {"x": alpha * x0 + sigma * eps}


class RespacedDDIM(DDIM):
    """DDIM on a chain respaced from the first to the last timestep, which ends at abar = 1.

    The interpolation stage's sampler (respacing: sec. 4, arXiv 2102.09672).
    """

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        stride = (self.schedule.steps - 1) / max(self.steps - 1, 1)
        # The original adds the stride up, and sums that end near .5 decide how some timesteps round.
        places = np.add.accumulate(np.append(0.0, np.full(self.steps - 1, stride)))
        return np.rint(places).astype(np.int64)[::-1]

    @property
    def final_level(self) -> float:
        return 1.0


class Euler(Sampler):
    """Euler's method on dx/dsigma = eps, where x = x0 + sigma eps (Euler steps of alg. 1, arXiv 2206.00364).

    Here the state is x_t / sqrt(abar_t), of variance up to sigma_max^2 + 1; the network still sees x_t, that
    is x / sqrt(sigma^2 + 1). Timesteps are evenly spaced and fractional, and sigma = sqrt((1 - abar) / abar)
    is interpolated at them. On equal levels this and DDIM are one and the same.
    """

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        return np.linspace(self.schedule.steps - 1, 0, self.steps)

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """Noise over signal before each step and after the last (0), float64 `(steps + 1,)`."""
        abar = self.schedule.alphas_cumprod
        sigmas = np.interp(self.timesteps, np.arange(self.schedule.steps), np.sqrt((1 - abar) / abar))
        return np.append(sigmas, 0.0)

    @functools.cached_property
    def levels(self) -> np.ndarray:
        return 1 / (self.sigmas**2 + 1)

    @property
    def init_noise_sigma(self) -> float:
        return float(self.sigmas.max())

    def step(self, state, i, denoise, noise=None):
        (scale,) = _row(i, np.sqrt(self.levels))
        _, eps = self._estimate(scale * state["x"], i, denoise)
        (move,) = _row(i, np.diff(self.sigmas))
        return {"x": state["x"] + move * eps}


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) (algorithm 2, arXiv 2211.01095): for few steps, 10 to 25.

    Solves the probability-flow ODE in lambda = log(alpha / sigma), half the log-SNR. Over a step h in lambda,
    x0 is extrapolated along the line through this estimate and the one before:

        x_s = sigma_s / sigma_t x_t  +  alpha_s (1 - e^-h) ((1 + c) x0 - c x0_before),   c = h / (2 h_before)

    The first step has no past, and the last goes to lambda = infinity: both take c = 0, which is a DDIM step.
    The state keeps the estimate before as `state["x0"]`. Timesteps are quadratic (appendix D.2, arXiv
    2010.02502), dense near the data: on Gaussian mixtures, guided and not, 10 to 40 steps came nearer to the
    exact solution than with timesteps evenly spaced.
    """

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        i = np.arange(self.steps, 0, -1)
        quadratic = np.rint((self.schedule.steps - 1) * (i / self.steps) ** 2).astype(np.int64)
        return np.maximum(quadratic, i - 1)  # many steps would crowd at t = 0: no two are alike

    def init(self, noise):
        state = super().init(noise)
        return {**state, "x0": jnp.zeros_like(state["x"])}

    def step(self, state, i, denoise, noise=None):
        x0, _ = self._estimate(state["x"], i, denoise)
        alpha, sigma = np.sqrt(self.levels), np.sqrt(1 - self.levels)
        decay = (sigma[1:] / alpha[1:]) / (sigma[:-1] / alpha[:-1])  # e^-h
        h = -np.log(decay[:-1])
        c = np.zeros(self.steps)
        c[1:-1] = h[1:] / (2 * h[:-1])
        shrink, of_x0, c = _row(i, sigma[1:] / sigma[:-1], alpha[1:] * (1 - decay), c)
        return {"x": shrink * state["x"] + of_x0 * ((1 + c) * x0 - c * state["x0"]), "x0": x0}


_SAMPLERS = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "respaced_ddim": RespacedDDIM,
    "dpm++2m": DPMSolver2M,
}
SAMPLERS = tuple(_SAMPLERS)


def make_sampler(name: str, steps: int, schedule: Schedule) -> Sampler:
    """The sampler called `name`, one of `SAMPLERS`, with `steps` network evaluations.

    Raises:
        UserError: the name is unknown, or `steps` is not a whole number from 1 to the schedule's.
    """
    if name not in _SAMPLERS:
        raise UserError(f"unknown sampler {name!r}{suggest(name, SAMPLERS)}")
    if not isinstance(steps, int) or not 1 <= steps <= schedule.steps:
        raise UserError(f"steps must be a whole number from 1 to {schedule.steps}, not {steps!r}")
    return _SAMPLERS[name](steps, schedule)


def _leading(steps: int, train_steps: int, *, offset: int) -> np.ndarray:
    """i * (train_steps // steps) + offset, falling: the spacing that diffusers calls "leading"."""
    timesteps = np.arange(steps)[::-1] * (train_steps // steps)
    # With as many steps as the schedule has, there is no room for the offset.
    return timesteps + min(offset, train_steps - 1 - timesteps[0])


def _row(i: int | Array, *tables: np.ndarray) -> tuple[Array, ...]:
    """Entry i, maybe traced, of each float64 table, in float32."""
    return tuple(jnp.asarray(table, jnp.float32)[i] for table in tables)
