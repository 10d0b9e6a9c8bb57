"""Exponential moving average of the parameters: what is evaluated, sampled from and shipped."""

from typing import Any

import jax
import jax.numpy as jnp


def update(ema: Any, params: Any, step: jax.Array, *, decay: float) -> Any:
    """`ema + (1 - d) (params - ema)`, with d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d makes an early average follow the parameters instead of their random start.

    Args:
      ema: tree like `params`, float32.
      params: the parameters after update number `step`.
      step: number of updates done, from 0.
      decay: the final decay, e.g. 0.9999; 0 keeps no average.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
