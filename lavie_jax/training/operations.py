"""Multiplications and additions of a traced program: those of matrix products and convolutions, which are nearly all.

Counted before any compiler: loops as often as they run, custom kernels as often as their grid has places, on all
devices together. The compiler's own count knows neither.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.sharding import Mesh

from lavie_jax import parallel
from lavie_jax.models.attention import MOVES_ALONE
from lavie_jax.training.step import Task, make_gradients

# bfloat16 operations a second of a chip, at best, as Google's documentation gives it (docs.cloud.google.com/tpu/docs).
PEAKS = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}  # jax's names


def peak(mesh: Mesh, tflops: float) -> float:
    """Operations a second of all devices of a mesh, at best: `tflops` x 1e12 each, or with 0 as `PEAKS` has it.

    0 where that does not know them.
    """
    return mesh.size * (tflops * 1e12 or PEAKS.get(KINDS.get(mesh.devices.flat[0].device_kind, ""), 0.0))


def of_step(task: Task, params: Any, frozen: Any, batch: Any, mesh: Mesh, *, accumulate: int = 1) -> float:
    """Operations of a step of training, of all devices together: those of frozen models too, recomputed ones not."""
    gradients = make_gradients(dataclasses.replace(task, loss=task.plain_loss or task.loss), accumulate=accumulate)
    trace = parallel.on_mesh(jax.make_jaxpr(gradients), mesh)
    return count_operations(trace(params, frozen, batch, jax.random.key(0)))


def count_operations(jaxpr: Any) -> float:
    """Of a (closed) jaxpr; a multiplication and an addition are 2. A `while` counts as one round, a `cond` as its
    dearest branch."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return float(sum(_of_equation(equation) for equation in jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        if MOVES_ALONE in str(equation.source_info.name_stack):
            return 0.0
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
