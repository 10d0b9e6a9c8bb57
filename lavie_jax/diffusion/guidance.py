"""Classifier-free guidance (arXiv 2207.12598), with the rescaling of arXiv 2305.08891.

Half of the work of guidance can be saved in many evaluations. At high and at low noise levels guidance adds little or
does harm, and the prompt alone is enough (the guidance interval of arXiv 2404.07724). In between, the difference that
guidance scales varies slowly, and that of an earlier evaluation can be used again.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lavie_jax.errors import UserError

NONE, COMPUTED, REUSED = "none", "computed", "reused"  # how an evaluation gets the prediction without the prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance over a whole chain.

    Attributes:
        scale: see `guide`.
        rescale: see `guide`.
        low: the lowest timestep with guidance.
        high: the highest timestep with guidance; None for no limit.
        every: of so many consecutive evaluations with guidance, the first computes both halves. The others compute the
            half with the prompt only, and take its difference to the other half from the first.
    """

    scale: float
    rescale: float = 0.0
    low: float = 0
    high: float | None = None
    every: int = 1

    def plan(self, timesteps: np.ndarray) -> tuple[str, ...]:
        """Returns NONE, COMPUTED or REUSED for each evaluation of a chain, given their timesteps, `(evaluations,)`.

        Raises:
            UserError: the scale asks for guidance, and no timestep of the chain is between `low` and `high`.
        """
        high = np.inf if self.high is None else self.high
        guided = (self.low <= timesteps) & (timesteps <= high) & (self.scale != 1)
        if self.scale != 1 and not guided.any():
            raise UserError(
                f"guidance_low = {self.low:g} and guidance_high = {high:g} contain none of the sampler's timesteps, "
                f"which are {timesteps.min():g} to {timesteps.max():g}: widen them, or set guidance to 1"
            )
        count, modes = 0, []
        for inside in guided:
            modes.append(NONE if not inside else REUSED if count % self.every else COMPUTED)
            count = count + 1 if inside else 0
        return tuple(modes)


def guide(
    cond: Float[Array, "b ..."], uncond: Float[Array, "b ..."], scale: float | Array, rescale: float = 0.0
) -> Float[Array, "b ..."]:
    """Returns the guided prediction, extrapolated from `uncond` through `cond`.

    Args:
        cond: prediction with the prompt, `(B, ...)`.
        uncond: prediction with the negative or empty prompt, same shape.
        scale: 0 is `uncond`, 1 is `cond`; larger values follow the prompt more closely.
        rescale: phi in [0, 1]. Large scales inflate the contrast. phi = 1 restores the standard deviation of `cond` in
            each sample, values in between blend (sec. 3.4, eq. 14-16, arXiv 2305.08891, which recommends 0.7).

    Returns:
        `(B, ...)`, float32.
    """
    cond, uncond = cond.astype(jnp.float32), uncond.astype(jnp.float32)
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, keepdims=True) / guided.std(axes, keepdims=True)
    return guided * (rescale * ratio + 1 - rescale)
