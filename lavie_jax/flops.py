"""FLOPs of a traced program, and the peak FLOP/s of chips.

Matrix products and convolutions are counted; the rest is negligible. Counting happens before any compiler: loops count
as often as they run, custom kernels as often as their grid has cells, summed over all devices. The compiler's own
count includes neither.
"""

import math
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.sharding import Mesh

from lavie_jax.models.attention import MOVES_ALONE

# Peak bfloat16 FLOP/s of a chip, from Google's documentation (docs.cloud.google.com/tpu/docs).
PEAKS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}  # jax's names


def peak_flops(mesh: Mesh, tflops: float) -> float:
    """Peak FLOP/s of all devices of a mesh together.

    Args:
        mesh: the devices.
        tflops: peak of one device in TFLOP/s; 0 = look it up in `PEAKS`.

    Returns:
        FLOP/s, or 0 if the devices are not in `PEAKS`.
    """
    return mesh.size * (tflops * 1e12 or PEAKS.get(KINDS.get(mesh.devices.flat[0].device_kind, ""), 0.0))


def count_flops(jaxpr: Any) -> float:
    """FLOPs of a (closed) jaxpr. A multiply-add is 2; a `while` counts as one iteration, a `cond` as its most expensive
    branch."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        if MOVES_ALONE in str(equation.source_info.name_stack):
            return 0.0
        (left, _), _ = params["dimension_numbers"]
        contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * contracted
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        spec = params["dimension_numbers"].rhs_spec  # (out, in, *spatial)
        receptive = math.prod(kernel[axis] for axis in spec[1:])
        dilation = math.prod(params["lhs_dilation"])  # the zeros it inserts are not multiplied
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * receptive / dilation
    inner = [count_flops(sub) for sub in _subprograms(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner) * _repetitions(name, params)


def _repetitions(name: str, params: dict) -> float:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its body is the work of one device, or of those that share the axes left to the compiler
        axes = params.get("newly_manual_axes") or params["manual_axes"]  # the name changed between versions of jax
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return float(np.prod([n for n in params["grid_mapping"].grid if isinstance(n, int)]))
    return 1


def _subprograms(params: dict) -> list[Any]:
    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    values = (v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,)))
    return [v for v in values if isinstance(v, kinds)]
