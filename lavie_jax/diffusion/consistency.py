"""Latent consistency models (LCM, arXiv 2310.04378): every point of a chain is mapped to the chain's end at once.

The network's prediction gives an estimate of x0, and the consistency function is a mixture of it and x_t that equals
x_0 at t = 0 whatever the network is (eq. 9):

    f(x_t, t) = skip(t) x_t + out(t) x0

`training/distillation.py` trains such networks.
"""

import numpy as np
from jaxtyping import ArrayLike

from lavie_jax.diffusion.samplers import Sampler, entries

SIGMA_DATA = 0.5  # as in the paper, where it is also the scale of the timesteps in `boundary_weights`
TIMESTEP_SCALE = 10.0


def boundary_weights(t: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    """Returns skip(t) and out(t) of whole timesteps: 1 and 0 at t = 0, and soon 0 and 1."""
    scaled = TIMESTEP_SCALE * t
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm**0.5


class LCM(Sampler):
    """Multistep consistency sampling (algorithm 3, arXiv 2310.04378): x0 at once, noised again for the next step.

    For networks that were distilled for it, in 1 to 8 steps. With any other, samples are blurred.
    """

    default_spacing = "trailing"
    needs_noise = True

    def update(self, state, i, prediction, noise=None):
        """Takes the estimate of x0, and noises it again to the next level."""
        if noise is None:
            raise ValueError("lcm needs fresh noise at every step: call update(state, i, prediction, noise)")
        x0, _ = self._x0_and_eps(state, i, prediction)
        skip, out, alpha, sigma = entries(
            i, *boundary_weights(self.timesteps), np.sqrt(self.levels[1:]), np.sqrt(1 - self.levels[1:])
        )
        return {"x": alpha * (skip * state["x"] + out * x0) + sigma * noise}
