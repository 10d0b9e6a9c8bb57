"""Multiplications and additions of a traced program: those of matrix products and convolutions, which are nearly all.

Counted before any compiler: loops as often as they run, custom kernels as often as their grid has places, on all
devices together. The compiler's own count knows neither.
"""

import math
from typing import Any

import jax
import jax.extend.core
import numpy as np


def count_operations(jaxpr: Any) -> float:
    """Of a (closed) jaxpr; a multiplication and an addition are 2. A `while` counts as one round, a `cond` as its
    dearest branch."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return float(sum(_of_equation(equation) for equation in jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * contracted
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        spec = params["dimension_numbers"].rhs_spec  # (out, in, *places)
        inside = math.prod(kernel[axis] for axis in spec[1:])
        dilation = math.prod(params["lhs_dilation"])  # of whose places the others are zero, and not worked off
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * inside / dilation
    inner = [count_operations(sub) for sub in _subprograms(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * _rounds(name, params)


def _rounds(name: str, params: dict) -> float:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its body is one device's work
        return params["mesh"].size
    if name == "pallas_call":
        return float(np.prod([n for n in params["grid_mapping"].grid if isinstance(n, int)]))
    return 1


def _subprograms(params: dict) -> list[Any]:
    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    values = (v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,)))
    return [v for v in values if isinstance(v, kinds)]
