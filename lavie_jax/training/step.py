"""One training update, for any task: gradients, accumulation, optimizer, EMA.

A `Task` describes what is trained (`training/autoencoder.py`, `training/diffusion.py`); this file holds what all tasks
share. `training/state.py` has the state that an update maps to the next one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lavie_jax import parallel, random
from lavie_jax.errors import UserError
from lavie_jax.flops import count_flops
from lavie_jax.models.registry import network_name
from lavie_jax.training import optimizer

Batch = Mapping[str, jax.Array]
Losses = dict[str, jax.Array]

AVERAGE = "average"  # in `frozen` of a loss in training: the EMA of params, for losses whose target depends on it
UNTRAINED = "untrained"  # in `frozen`: the parameters of the trained networks that this run does not train


def mean_of_parts(values: Losses) -> Losses:
    """Returns the mean of each value over the parts of a batch."""
    return {name: x.mean() for name, x in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, as pure functions.

    `params` are all parameters of the trained networks. `split` divides them in two trees, of which only the trained
    one has gradients, optimizer state and an EMA; `join` puts them together again, in front of each of the functions
    below. An adapter is a tree of its own in `params`, the only one that the regime "lora" trains.

    Attributes:
        init: rng -> params, float32.
        start: params (numpy) to start from instead of `init`; None = from scratch.
        frozen: parameters of other networks that the loss needs.
        loss: (params, frozen, batch, rng) -> (loss, {name: value}), means over the batch. `rng` is a `random.Key`: all
            that is drawn for a row must be drawn by `lavie_jax/random.py`, so that it does not depend on the parts
            that a batch is processed in.
        held_out: (params, frozen, batch, rng) -> {name: value}, deterministic, with the same `rng`.
        plain_loss: `loss` without rematerialisation; None = the same.
        export: (path, params in numpy, held-out values) writes a weights folder, or the folder of an adapter.
        average: {name: (parts,)} -> {name: value} of the batch from those of its parts, for the values of `loss` and
            `held_out`; by default their means.
        judged_by: the held-out value by which checkpoints are compared; lower is better.
        regime: which parameters are trained, see `training/optimizer.py`.
        images_only: whether the batches contain no video.
    """

    init: Callable[[jax.Array], Any]
    start: Any
    frozen: Any
    loss: Callable[[Any, Any, Batch, random.Key], tuple[jax.Array, Losses]]
    held_out: Callable[[Any, Any, Batch, random.Key], Losses]
    export: Callable[[Path, Any, Mapping[str, float]], None]
    plain_loss: Callable[[Any, Any, Batch, random.Key], tuple[jax.Array, Losses]] | None = None
    average: Callable[[Losses], Losses] = mean_of_parts
    judged_by: str = "loss"
    regime: str = "joint"
    images_only: bool = False

    def split(self, params: Any) -> tuple[dict, dict]:
        """Returns params as (trained, untrained), two nested dicts without a leaf in common."""
        return optimizer.split(params, regime=self.regime, images_only=self.images_only)

    def join(self, trained: Any, frozen: Mapping[str, Any]) -> Any:
        """Returns params: the inverse of `split`, with the untrained tree in `frozen[UNTRAINED]`."""
        return optimizer.merge(trained, frozen.get(UNTRAINED, {}))

    def exported(self, trained: Any, frozen: Mapping[str, Any]) -> Any:
        """Returns the params that `export` needs: all of them, or an adapter's alone."""
        return trained if self.regime == optimizer.ADAPTER else self.join(trained, frozen)


def check_same(given: Any, wanted: Any, where: str, *, ignore: Sequence[str] = ()) -> None:
    """Refuses a model in the folder `where` whose config differs from that of this run."""
    if type(given) is not type(wanted):
        raise UserError(f"{where} has a {network_name(given)}, but the config has a {network_name(wanted)}.")
    for field in dataclasses.fields(wanted):
        theirs, ours = getattr(given, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name not in ignore:
            name = f"{type(wanted).__name__}.{field.name}"
            raise UserError(f"{where} has {name} = {theirs!r}, but the config has {ours!r}: they must be equal.")


def step_rng(rng: jax.Array, step: int | jax.Array) -> jax.Array:
    """The random key of update number `step` (from 0) of a run with the key `rng`."""
    return jax.random.fold_in(rng, step)


def make_gradients(task: Task, *, accumulate: int = 1) -> Callable[[Any, Any, Batch, jax.Array], tuple[dict, Losses]]:
    """Makes the function (trained, frozen, batch, rng) -> (gradients by path, mean losses and the gradients' norm).

    The batch is processed in `accumulate` parts, one after the other, and their gradients are averaged: the memory of
    one part, the gradients of the whole batch. Random numbers do not depend on the number of parts, so that losses and
    gradients differ by rounding alone.
    """

    def gradients(flat: dict, frozen: Any, batch: Batch, rng: random.Key):
        """Returns gradients and losses of one part of a batch."""

        def loss(flat):
            return task.loss(task.join(unflatten_dict(flat, sep="/"), frozen), frozen, batch, rng)

        (value, losses), grads = jax.value_and_grad(loss, has_aux=True)(flat)
        return grads, {"loss": value, **losses}

    def accumulated(flat: dict, frozen: Any, batch: Batch, rng: jax.Array):
        """Returns the means of gradients and losses over the parts, one part after the other."""
        if accumulate == 1:
            return gradients(flat, frozen, batch, rng)

        def body(total, i):
            grads, losses = gradients(flat, frozen, *part(batch, rng, i, accumulate))
            return jax.tree.map(jnp.add, total, grads), losses

        total, losses = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, flat), jnp.arange(accumulate))
        return jax.tree.map(lambda x: x / accumulate, total), task.average(losses)

    def with_norm(trained: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[dict, Losses]:
        grads, losses = accumulated(flatten_dict(trained, sep="/"), frozen, batch, rng)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in grads.values()))
        return grads, {**losses, "gradient_norm": norm}

    return with_norm


def make_update(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulate: int = 1,
    skip_limit: int = 10,
) -> Callable[[dict, Any, Batch, jax.Array], tuple[dict, Losses]]:
    """Makes the function (state, frozen, batch, rng) -> (new state, mean losses, gradient norm, skipped in a row).

    `rng` is the key of the run, an argument so that runs with other seeds share one compiled program. A loss or
    gradient that is not finite changes only the counters. The randomness of a step depends only on `rng` and the step:
    a resumed run repeats an uninterrupted one, on any number of devices.

    Args:
        task: what is trained.
        tx: the optimizer; it receives the trained parameters as a flat dict.
        ema_decay: see `update_ema`.
        accumulate: see `make_gradients`.
        skip_limit: after this many skipped steps in a row all later ones are skipped too, so that the state stays as it
            was when training broke down.
    """
    gradients = make_gradients(task, accumulate=accumulate)

    def update(state: dict, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[dict, Losses]:
        """Returns the state after one step, or with the counters alone changed if the step is skipped."""
        read = with_average(task, frozen, state["ema"])
        grads, losses = gradients(state["params"], read, batch, step_rng(rng, state["step"]))
        flat = flatten_dict(state["params"], sep="/")
        updates, opt_state = tx.update(grads, state["opt_state"], flat)
        params = unflatten_dict(optax.apply_updates(flat, updates), sep="/")
        new = {
            "params": params,
            "opt_state": opt_state,
            "ema": update_ema(state["ema"], params, state["step"], decay=ema_decay),
        }
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(losses["gradient_norm"])
        good = finite & (state["skipped"] < skip_limit)
        new = {k: jax.tree.map(lambda n, old: jnp.where(good, n, old), new[k], state[k]) for k in new}
        skipped = jnp.where(good, 0, state["skipped"] + 1)
        new |= {"step": state["step"] + 1, "skipped": skipped}
        return new, {**losses, "skipped": skipped}

    return update


def with_average(task: Task, frozen: Mapping[str, Any], ema: Any) -> dict[str, Any]:
    """Returns what the loss reads in training: `frozen`, and the EMA of all parameters."""
    return {**frozen, AVERAGE: task.join(ema, frozen)}


def update_ema(ema: Any, params: Any, step: jax.Array, *, decay: float) -> Any:
    """Returns `ema + (1 - d) (params - ema)`, with d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d makes an early average follow the parameters instead of their random initialisation.

    Args:
        ema: tree like `params`, float32.
        params: the parameters after update number `step`.
        step: number of updates done, from 0.
        decay: the final decay, such as 0.9999; 0 = no averaging.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)


def part(batch: Batch, rng: jax.Array, index: jax.Array, parts: int) -> tuple[Batch, random.PartKey]:
    """Returns one of the `parts` of a batch, and the key of its random numbers."""
    return {k: random.part_of(x, index, parts) for k, x in batch.items()}, random.PartKey(rng, index, parts)


def make_held_out(task: Task, *, accumulate: int = 1) -> Callable[[Any, Any, Batch, jax.Array], Losses]:
    """Makes the function (trained, frozen, batch, rng) -> the task's held-out values.

    The batch is processed in as many parts as in training, because a whole one may not fit.
    """

    def held_out(trained: Any, frozen: Any, batch: Batch, rng: jax.Array) -> Losses:
        params = task.join(trained, frozen)
        if accumulate == 1:
            return task.held_out(params, frozen, batch, rng)
        each = lambda i: task.held_out(params, frozen, *part(batch, rng, i, accumulate))  # noqa: E731
        return task.average(jax.lax.map(each, jnp.arange(accumulate)))

    return held_out


def step_flops(task: Task, trained: Any, frozen: Any, batch: Any, mesh: Mesh, *, accumulate: int = 1) -> float:
    """FLOPs of a training step on all devices together, frozen models included, rematerialisation excluded."""
    gradients = make_gradients(dataclasses.replace(task, loss=task.plain_loss or task.loss), accumulate=accumulate)
    trace = parallel.on_mesh(jax.make_jaxpr(gradients), mesh)
    return count_flops(trace(trained, frozen, batch, jax.random.key(0)))
