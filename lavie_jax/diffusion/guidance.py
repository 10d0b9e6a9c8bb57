"""Classifier-free guidance (arXiv 2207.12598), with the rescaling of arXiv 2305.08891."""

import jax.numpy as jnp
from jaxtyping import Array, Float


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
