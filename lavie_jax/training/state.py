"""The training state: its shapes with their shardings, then its arrays, which are never whole on one device.

    state    {"params", "opt_state", "ema", "step", "skipped"}: what an update changes. Only trained parameters are in
             it; "skipped" counts the latest steps in a row without a finite loss and gradients.
    frozen   what an update reads: the frozen models, by name, in the dtype of the computation, and under `UNTRAINED`
             the parameters of the trained networks that are not trained, in float32.

Untrained parameters come from `init_from` again when a run resumes. Without `init_from` they are random, and a
checkpoint contains them, because another version of jax or another device may generate other numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lavie_jax import parallel
from lavie_jax.training.step import UNTRAINED, Task


def make_state(params: Any, task: Task, tx: optax.GradientTransformation) -> dict[str, Any]:
    """Returns the state before the first update. The EMA is a copy of its own, because both are donated."""
    trained, _ = task.split(params)
    return {
        "params": trained,
        "opt_state": tx.init(flatten_dict(trained, sep="/")),
        "ema": jax.tree.map(jnp.copy, trained),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def abstract_params(task: Task) -> Any:
    """Returns the shapes of all parameters of the trained networks."""
    if task.start is None:
        return jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), task.start)


def abstract_state(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> dict[str, Any]:
    """Returns the state as ShapeDtypeStructs with shardings."""
    return _placed(jax.eval_shape(lambda params: make_state(params, task, tx), abstract_params(task)), mesh)


def abstract_untrained(task: Task, mesh: Mesh) -> dict[str, Any]:
    """Returns {UNTRAINED: ShapeDtypeStructs with shardings}, or {} if all parameters are trained."""
    return _placed(_untrained(task, abstract_params(task)), mesh)


def abstract_random(task: Task, mesh: Mesh) -> dict[str, Any]:
    """Returns the part of `abstract_untrained` that a checkpoint contains, see `init_state`."""
    return abstract_untrained(task, mesh) if task.start is None else {}


def abstract_frozen(task: Task, mesh: Mesh, dtype: DTypeLike, *, models: bool = True) -> dict[str, Any]:
    """Returns what the update reads as ShapeDtypeStructs with shardings; see `place_frozen` for the arguments."""
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), dict(task.frozen) if models else {})
    return _placed(cast, mesh) | abstract_untrained(task, mesh)


def init_state(task: Task, tx: optax.GradientTransformation, mesh: Mesh, *, seed: int) -> tuple[dict, dict]:
    """Makes the arrays of a new run.

    Returns:
        The state, and {UNTRAINED: parameters} if some are not trained and were initialised at random: they belong into
        `frozen` and into checkpoints. Otherwise {}.
    """

    def create(init: Any) -> tuple[dict, dict]:
        """Runs under `jit`, so that every array is created where its sharding puts it."""
        if task.start is not None:
            return make_state(init, task, tx), {}
        params = task.init(init)
        return make_state(params, task, tx), _untrained(task, params)

    init = jax.random.key(seed)
    if task.start is not None:
        trained, _ = task.split(task.start)
        init = parallel.put(trained, parallel.shardings(trained, mesh))
    shardings = jax.tree.map(lambda x: x.sharding, (abstract_state(task, tx, mesh), abstract_random(task, mesh)))
    # This runs once, and on a CPU a fast program takes four times as long to compile (30 seconds for a small UNet).
    unoptimized = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(create, out_shardings=shardings, compiler_options=unoptimized)(init)


def place_frozen(task: Task, mesh: Mesh, dtype: DTypeLike, *, models: bool = True) -> dict[str, Any]:
    """Puts what the update reads on the devices, except untrained parameters that are initialised at random.

    Args:
        task: what is trained.
        mesh: the devices.
        dtype: dtype of the computation, to which frozen models are cast.
        models: whether the frozen models are needed: not by a run on latents, which were made with them.
    """
    frozen = jax.tree.map(lambda x: np.asarray(x, dtype), dict(task.frozen)) if models else {}
    frozen |= start_untrained(task)
    return parallel.put(frozen, parallel.shardings(frozen, mesh))


def start_untrained(task: Task) -> dict[str, Any]:
    """Returns {UNTRAINED: parameters} of `task.start`, or {} if it has none."""
    return {} if task.start is None else _untrained(task, task.start)


def _untrained(task: Task, params: Any) -> dict[str, Any]:
    _, untrained = task.split(params)
    return {UNTRAINED: untrained} if untrained else {}


def _placed(shapes: Any, mesh: Mesh) -> Any:
    shardings = parallel.shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
