"""One update, for whatever is trained: gradient, accumulation, optimizer, EMA.

A `Task` says what is trained (`training/autoencoder.py`, `training/diffusion.py`); here is what all
tasks share. The state is a plain dict `{"params", "opt_state", "ema", "step", "skipped"}`; the last counts the
steps in a row that were skipped because of a loss or gradients that are not finite.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import optax

from lavie_jax.errors import UserError
from lavie_jax.training import ema, optimizer

Batch = Mapping[str, jax.Array]
Losses = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, as pure functions.

    Attributes:
      init: rng -> nested dict of float32 parameters.
      start: parameters (numpy) to start from instead of `init`; None = from scratch.
      frozen: parameters that the loss needs and nobody trains.
      loss: (params, frozen, batch, rng) -> (loss, {name: value}), means over the batch.
      held_out: (params, frozen, batch, rng) -> {name: value}, the same whenever it is called.
      plain_loss: `loss` without recomputing anything in the backward pass; None = the same.
      export: (path, params in numpy, held-out values) writes a weights folder.
      judged_by: the held-out value by which checkpoints are compared; lower is better.
      regime: which parameters are trained, see `training/optimizer.py`.
      images_only: whether the batches hold no video.
    """

    init: Callable[[jax.Array], Any]
    start: Any
    frozen: Any
    loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Losses]]
    held_out: Callable[[Any, Any, Batch, jax.Array], Losses]
    export: Callable[[Path, Any, Mapping[str, float]], None]
    plain_loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Losses]] | None = None
    judged_by: str = "loss"
    regime: str = "joint"
    images_only: bool = False

    def split(self, params: Any) -> tuple[dict, dict]:
        """(trained, untouched) parameters, flat."""
        return optimizer.split(params, regime=self.regime, images_only=self.images_only)


def check_same(found: Any, wanted: Any, where: str, *, ignore: str = "") -> None:
    """Refuses a model in the folder `where` whose config differs from the one of this run."""
    for field in dataclasses.fields(wanted):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours and field.name != ignore:
            name = type(wanted).__name__
            raise UserError(f"{where} has {name}.{field.name} = {theirs!r}, the config {ours!r}: they must agree.")


def make_state(params: Any, task: Task, tx: optax.GradientTransformation) -> dict[str, Any]:
    """The state before the first update. The EMA is its own copy: both are donated."""
    return {
        "params": params,
        "opt_state": tx.init(task.split(params)[0]),
        "ema": jax.tree.map(jnp.copy, params),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def step_rng(seed: int, step: int | jax.Array) -> jax.Array:
    """The randomness of update number `step` (from 0) of a run."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_gradients(task: Task, *, accumulate: int = 1) -> Callable[[Any, Any, Batch, jax.Array], tuple[dict, Losses]]:
    """The function (params, frozen, batch, rng) -> (gradients of what is trained by path, mean losses and their norm).

    The batch is worked off in `accumulate` parts, one after the other, whose gradients are averaged: the memory of a
    part, the gradients of the whole.
    """

    def gradients(trained: dict, untouched: dict, frozen: Any, batch: Batch, rng: jax.Array):
        def loss(trained):
            return task.loss(optimizer.merge(trained, untouched), frozen, batch, rng)

        (value, losses), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        return grads, {"loss": value, **losses}

    def accumulated(trained: dict, untouched: dict, frozen: Any, batch: Batch, rng: jax.Array):
        if accumulate == 1:
            return gradients(trained, untouched, frozen, batch, rng)
        # Part i takes every accumulate-th row: each device works on its own rows in every part.
        parts = {k: einops.rearrange(x, "(b a) ... -> a b ...", a=accumulate) for k, x in batch.items()}

        def body(total, i):
            part = {k: x[i] for k, x in parts.items()}
            out = gradients(trained, untouched, frozen, part, jax.random.fold_in(rng, i))
            return jax.tree.map(jnp.add, total, out), None

        first = {k: x[0] for k, x in parts.items()}
        shapes = jax.eval_shape(gradients, trained, untouched, frozen, first, rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, jnp.arange(accumulate))
        return jax.tree.map(lambda x: x / accumulate, total)

    def whole(params: Any, frozen: Any, batch: Batch, rng: jax.Array) -> tuple[dict, Losses]:
        grads, losses = accumulated(*task.split(params), frozen, batch, rng)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in grads.values()))
        return grads, {**losses, "gradient_norm": norm}

    return whole


def make_update(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
    skip_limit: int = 10,
) -> Callable[[dict, Any, Batch], tuple[dict, Losses]]:
    """The function (state, frozen, batch) -> (new state, mean losses, gradient norm and skipped steps in a row).

    A loss or gradient that is not finite changes nothing but the counters. The randomness of a step is keyed by
    (seed, step), so that a resumed run draws what an uninterrupted one does, and by nothing that depends on the
    number of devices.

    Args:
      task: what is trained.
      tx: the optimizer; it sees the trained parameters as a flat dict.
      seed: of the run.
      ema_decay: see `ema.update`.
      accumulate: see `make_gradients`.
      skip_limit: after this many skipped steps in a row all further ones are skipped as well: the state
        stays what it was when things went wrong, until somebody looks.
    """
    gradients = make_gradients(task, accumulate=accumulate)

    def update(state: dict, frozen: Any, batch: Batch) -> tuple[dict, Losses]:
        grads, losses = gradients(state["params"], frozen, batch, step_rng(seed, state["step"]))
        trained, untouched = task.split(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], trained)
        params = optimizer.merge(optax.apply_updates(trained, updates), untouched)
        new = {
            "params": params,
            "opt_state": opt_state,
            "ema": ema.update(state["ema"], params, state["step"], decay=ema_decay),
        }
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(losses["gradient_norm"])
        good = finite & (state["skipped"] < skip_limit)
        new = {k: jax.tree.map(lambda n, old: jnp.where(good, n, old), new[k], state[k]) for k in new}
        skipped = jnp.where(good, 0, state["skipped"] + 1)
        new |= {"step": state["step"] + 1, "skipped": skipped}
        return new, {**losses, "skipped": skipped}

    return update
