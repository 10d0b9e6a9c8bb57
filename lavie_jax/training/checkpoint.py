"""Checkpoints of the training state (Orbax), and hashes that show whether two runs ended with the same parameters.

A checkpoint contains the state (trained parameters, optimizer, EMA, step), untrained parameters where nothing else has
them (`training/state.py`), and a small JSON with the step and the config. The data pipeline needs no state: its
position is the step. Saves are asynchronous and atomic: a run killed during a save leaves a directory that is never
mistaken for a checkpoint. An incomplete step directory is therefore a copy that was cut short, and is refused by name.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

from lavie_jax import disk, parallel
from lavie_jax.errors import UserError
from lavie_jax.training import changes
from lavie_jax.training.config import complete
from lavie_jax.training.optimizer import merge
from lavie_jax.training.state import start_untrained
from lavie_jax.training.step import UNTRAINED, Task

# In addition to the fields of the config: hashes of parameters that every start reads again, from folders that may have
# changed. Older checkpoints lack the second hash and are resumed without this check.
FROZEN = "SHA-256 of the frozen models"
FROZEN_PART = "SHA-256 of the untrained parameters in init_from"
HASHES = (FROZEN, FROZEN_PART)

# Fields that make a checkpoint belong to another model or another run: resuming with a different value is refused.
# The others (steps, intervals, prompts, mesh, ...) may change between the parts of one run.
IDENTITY = (
    "stage", "seed", "regime", "train_text_encoder", "text_network", "unet", "text_encoder", "vae", "schedule", "lora",
    "distill",
    *HASHES,
)  # fmt: skip

# Counters of the process, not of the run: they start again when a run resumes.
TRANSIENT = ("skipped",)

# In the JSON: absent from older checkpoints, whose "params" and "ema" have the untrained parameters too.
TRAINED_ONLY = "trained_only"

HELD_OUT = "held_out.json"  # beside the checkpoints: {step: held-out loss}, which is measured after a save

# Orbax's commit marks of a step directory, its state and its JSON.
MARKS = ("_CHECKPOINT_METADATA", "state/_METADATA", "meta/metadata")
# Newer versions of Orbax write these too: all of them, or none.
COMMITTED = ("commit_success.txt", "state/commit_success.txt", "meta/commit_success.txt")


def identity(config: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Returns the config with the hashes of all parameters that a resumed run reads from folders again."""
    hashes = {FROZEN: array_hash(task.frozen), FROZEN_PART: array_hash(start_untrained(task))}
    return dict(config) | hashes


def steps(path: Any) -> list[int]:
    """Returns the steps of the checkpoints under `path`, complete or not, in order.

    In a bucket, which has no renames, a save that was cut short leaves a step without its last file. It does not count.
    """
    if not path.is_dir():
        return []
    numbers = (p for p in path.iterdir() if p.name.isdigit())
    return sorted(int(p.name) for p in numbers if isinstance(path, Path) or (p / COMMITTED[0]).exists())


class Checkpoints:
    """The checkpoints under `path`: the newest `keep`, the `best` of them, and every `every`-th step.

    Args:
        path: their directory, a Path, or etils' path of a bucket.
        keep: how many of the newest are kept, at least 1.
        best: how many more are kept for their low `held_out`, however old.
        every: multiples of this step are never deleted; 0 = none.
        restore_step: go back to this step; newer checkpoints are renamed, not deleted, and renamed back if it cannot be
            restored. None = the newest.

    Raises:
        UserError: the checkpoint to resume from is missing or incomplete; the message lists the others.
    """

    def __init__(self, path: Any, *, keep: int, best: int = 0, every: int = 0, restore_step: int | None = None):
        self._path = path.absolute() if isinstance(path, Path) else path
        self._aside: dict[Path, Path] = {}  # {new name: old name}, until the run has resumed without them
        replaced = _replaced(self._path, restore_step)
        _all_hosts("checkpoints: chosen")
        if jax.process_index() == 0:
            for step, why in replaced.items():
                before = self._path / str(step)
                self._aside[before.rename(_unused(before.with_name(f"{why}-{step}-{os.getpid()}")))] = before
        _all_hosts("checkpoints: set aside")
        managers = ocp.checkpoint_managers
        policies = [managers.LatestN(keep)]
        self._held_out = _read_held_out(self._path)
        if best:  # as one policy of several: alone it would delete the newest
            policies.append(_Best(best, self._held_out))
        if every:
            policies.append(managers.EveryNSteps(every))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._path, options=self._options)
        self._failed = False

    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, config: Mapping[str, Any]) -> None:
        """Starts a save; the caller may donate `state` at once.

        A full disk is not an error: it is logged, earlier checkpoints stay, and the next save tries again.
        """
        self._held_out.pop(step, None)
        self.settle()
        self._failed = False
        meta = {"step": step, "config": config, TRAINED_ONLY: True}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_lasting(state)), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._give_up(error)

    def measured(self, step: int, held_out: float) -> None:
        """Records the held-out loss of a saved step. A step without one is never among the best."""
        self._held_out[step] = held_out
        there = {str(k): v for k, v in self._held_out.items() if k in {*self._manager.all_steps(), step}}
        if jax.process_index() == 0:
            partial = self._path / f"{HELD_OUT}.new"
            with disk.tolerate_full_disk(HELD_OUT):
                try:
                    partial.write_text(json.dumps(there, indent=2) + "\n")
                    partial.replace(self._path / HELD_OUT)
                finally:
                    partial.unlink(missing_ok=True)

    def settle(self) -> bool:
        """Waits for the save under way. Returns False if the last one failed because the disk is full."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)
        return not self._failed

    def _give_up(self, error: Exception) -> None:
        """Removes a half-written checkpoint after a full disk; raises any other error."""
        if not disk.is_full(error) or jax.process_count() > 1:  # the other hosts would wait for this one
            raise error
        self._failed = True
        logging.error("no checkpoint could be written to %s: the disk is full. Training continues.", self._path)
        absent = 0
        for _ in range(200):  # other threads of the save may still be writing, and create it again
            halves = list(self._path.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))
            for half in halves:
                shutil.rmtree(half, ignore_errors=True)
            absent = 0 if halves else absent + 1
            if absent == 10:
                break
            time.sleep(0.05)
        # A new manager: the old one believes that the checkpoints to be replaced are gone.
        self._manager = ocp.CheckpointManager(self._path, options=self._options)

    def restore(self, step: int, abstract: Any, config: Mapping[str, Any], *, untrained: Any) -> Any:
        """Restores the checkpoint of a step.

        Args:
            step: the step of an existing checkpoint.
            abstract: what was saved, as ShapeDtypeStructs with shardings.
            config: the `identity` of this run.
            untrained: {UNTRAINED: shapes of all untrained parameters}, or {}: checkpoints of earlier versions contain
                them, and are read too.

        Returns:
            Arrays in the structure of `abstract`.

        Logs a line about other fields that differ and what follows.

        Raises:
            UserError: the checkpoint belongs to another model or run (the message names the field that differs), or
                its files are damaged (the message lists the older steps).
        """
        meta = self._read(step, meta=ocp.args.JsonRestore()).meta
        # As JSON, in which tuples are lists, and with defaults for fields that an older version did not have.
        config, recorded = (json.loads(json.dumps(complete(x))) for x in (config, meta["config"]))
        for field in IDENTITY:
            saved, now = recorded.get(field, config.get(field)), config.get(field)
            if saved != now:
                raise _other_run(step, _difference(field, saved, now))
        if difference := _other_optimizer(*(x.get("optimizer", {}) for x in (recorded, config))):
            raise _other_run(step, difference)
        if untrained and TRAINED_ONLY not in meta:
            state = self._restore_whole(step, abstract, config, untrained[UNTRAINED])
        else:
            state = self._read(step, state=ocp.args.StandardRestore(_lasting(abstract))).state
        for now, before in self._aside.items():
            logging.warning("checkpoint %s is not used any more; renamed to %s", before, now.name)
        self._aside.clear()
        counts = optax.tree_utils.tree_get_all_with_path(state.get("opt_state"), "count")
        line = changes.describe(step, recorded, config, updates=int(counts[0][1]) if counts else step)
        if line and jax.process_index() == 0:
            logging.warning("%s", line)
        counters = {k: abstract[k] for k in TRANSIENT if k in abstract}
        return state | {k: parallel.put(np.zeros(x.shape, x.dtype), x.sharding) for k, x in counters.items()}

    def _restore_whole(self, step: int, abstract: Any, config: Mapping[str, Any], untrained: Any) -> Any:
        """Restores a checkpoint of an earlier version, whose "params" and "ema" include untrained parameters."""
        whole = {k: merge(abstract[k], untrained) for k in ("params", "ema")}
        wanted = {k: v for k, v in _lasting(abstract).items() if k != UNTRAINED} | whole
        state = self._read(step, state=ocp.args.StandardRestore(wanted)).state
        theirs = _like(untrained, state["params"])
        if UNTRAINED not in abstract and config[FROZEN_PART] != parameter_hash({UNTRAINED: theirs}):
            raise _other_run(step, "other untrained parameters than those in init_from")
        state |= {k: _like(abstract[k], state[k]) for k in whole}
        return state | ({UNTRAINED: theirs} if UNTRAINED in abstract else {})

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and tensorstore raise a dozen kinds
            others = [s for s in self._manager.all_steps() if s < step]
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(
                f"the checkpoint {self._path / str(step)} cannot be read ({type(error).__name__}: {reason}): "
                f"it is damaged, or of another optimizer. {_alternatives(others)}"
            ) from error

    def reached_preemption(self, step: int) -> bool:
        """Multi-host: whether the cluster is about to stop this job. Must be called on every host at each step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for the last save, and renames back what was set aside for a checkpoint that was then refused."""
        self.settle()
        self._manager.close()
        for now, before in self._aside.items():
            now.rename(before)
        self._aside.clear()


def _lasting(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a state that is saved."""
    return {k: v for k, v in state.items() if k not in TRANSIENT}


def _like(shape: Any, tree: Any) -> Any:
    """Returns the leaves of `tree` whose paths are in `shape`."""
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict({path: flat[path] for path in traverse_util.flatten_dict(shape)})


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Preserves the `count` checkpoints of the lowest finite losses in {step: held-out loss}; the newer of equals."""

    def __init__(self, count: int, held_out: Mapping[int, float]):
        self._count, self._held_out = count, held_out

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = {one.step: self._held_out.get(one.step, np.inf) for one in checkpoints}
        order = sorted((value, -step) for step, value in losses.items() if np.isfinite(value))
        best = {-step for _, step in order[: self._count]}
        return [one.step in best for one in checkpoints]


def _read_held_out(path: Any) -> dict[int, float]:
    """Returns {step: held-out loss} of the checkpoints under `path`; earlier versions wrote it into each of them."""
    losses = {}
    for file in path.glob("*/metrics/metrics"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            losses[int(file.parents[1].name)] = float(json.loads(file.read_text())["held_out"])
    with contextlib.suppress(OSError, ValueError):  # none yet
        losses |= {int(step): float(value) for step, value in json.loads((path / HELD_OUT).read_text()).items()}
    return losses


def _unused(path: Any) -> Any:
    """Returns the path, or one with a number after it: in a container, every process may have the same number."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(one for one in itertools.chain([path], numbered) if not one.exists())


def _other_run(step: int, difference: str) -> UserError:
    return UserError(
        f"the checkpoint at step {step} was written with {difference}; "
        "give the same value to resume it, or another --workdir to start a new run."
    )


def _other_optimizer(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns the difference of two optimizers by which their states have other structures, or ""."""
    for name, structure in (("kind", str), ("clip", bool)):  # none is kept of clipping, but its place
        if structure(before.get(name)) != structure(now.get(name)):
            return _difference(f"optimizer.{name}", before.get(name), now.get(name))
    return ""


def _difference(field: str, saved: Any, now: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in sorted({*saved, *now}):
            if saved.get(key) != now.get(key):
                return _difference(f"{field}.{key}", saved.get(key), now.get(key))
    return f"{field} = {saved!r}, not {now!r}"


def _all_hosts(name: str) -> None:
    """Waits for the other hosts, so that none of them reads a directory while the first one renames in it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _replaced(path: Any, restore_step: int | None) -> dict[int, str]:
    """Returns {step: reason} of the step directories to rename before a run resumes at `restore_step`.

    Orbax takes any directory whose name is a number for a checkpoint.
    """
    there = steps(path)
    missing = {s: _missing(path / str(s)) for s in there}
    complete = [s for s in there if not missing[s]]
    wanted = restore_step if restore_step is not None else max(there, default=None)
    if wanted is not None and wanted not in complete:
        others = [s for s in complete if restore_step is not None or s < wanted]
        if wanted not in there:
            raise UserError(f"there is no checkpoint {path / str(wanted)}. {_alternatives(others)}")
        raise UserError(
            f"the checkpoint {path / str(wanted)} is incomplete, perhaps a copy that was cut short: it has no "
            f"{', no '.join(missing[wanted])}. {_alternatives(others)}"
        )
    newer = {s: "newer" for s in complete if s > wanted}
    return newer | {s: "incomplete" for s in there if missing[s]}


def _missing(step: Any) -> list[str]:
    """Returns the commit marks that a step directory lacks."""
    lacks = [mark for mark in MARKS if not (step / mark).is_file()]
    uncommitted = [mark for mark in COMMITTED if not (step / mark).is_file()]
    return lacks + (uncommitted if len(uncommitted) < len(COMMITTED) else [])


def _alternatives(steps: list[int]) -> str:
    """Returns advice for a checkpoint that cannot be used."""
    if not steps:
        return "There is no other: complete the copy, or name another --workdir."
    return f"Complete the copy, or resume with --restore-step {max(steps)} (there are {', '.join(map(str, steps))})."


class Unsaved(RuntimeError):
    """A run ended and its last checkpoint could not be written."""


def parameter_hash(params: Any) -> str:
    """Returns the `array_hash` of arrays on devices, however sharded; one at a time is gathered on a host."""
    return array_hash(params, fetch=parallel.gather)


def array_hash(tree: Any, *, fetch: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """Returns the SHA-256 of the paths, dtypes, shapes and bytes of a nested dict; `fetch` turns leaves into numpy."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    digest = hashlib.sha256()
    for name in sorted(flat):
        x = np.ascontiguousarray(fetch(flat[name]))
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
