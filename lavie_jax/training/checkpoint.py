"""Training state on disk (Orbax), and the hash that tells whether two runs came out the same.

A checkpoint is the state (parameters, optimizer, EMA, step) and a small JSON with the step and the
config. The data stream needs no state of its own: its position is the step. Saves are asynchronous and
atomic: a run killed inside one leaves a directory that is never taken for a checkpoint. A step directory
that is not complete is therefore a copy that was cut short, and refused by name.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

from lavie_jax import parallel
from lavie_jax.errors import UserError
from lavie_jax.training import disk
from lavie_jax.training.config import complete

# Beside the fields of the config: `array_hash` of the models that are not trained, which each start reads anew from
# folders that may have changed.
FROZEN = "SHA-256 of the frozen models"

# What makes a checkpoint another model or another run: resuming with a different value is refused.
# The rest (steps, intervals, prompts, mesh, ...) may change between the parts of one run.
IDENTITY = ("stage", "seed", "regime", "train_text_encoder", "unet", "text_encoder", "vae", "schedule", FROZEN)

# Counts of the process, not of the run: a resumed run starts to count anew.
TRANSIENT = ("skipped",)

# Orbax's commit marks: of a step directory, its state and its JSON.
MARKS = ("_CHECKPOINT_METADATA", "state/_METADATA", "meta/metadata")
# Newer versions of Orbax write these too: all of them, or none.
COMMITTED = ("commit_success.txt", "state/commit_success.txt", "meta/commit_success.txt")


class Checkpoints:
    """The checkpoints under `path`: the newest `keep`, the `best` of them, and every `every`-th step.

    Args:
      path: their directory.
      keep: how many of the newest are kept, at least 1.
      best: how many more of those with the lowest `held_out` are kept, however old.
      every: multiples of this step are kept for ever; 0 = none.
      restore_step: go back to this step; newer checkpoints are set aside, not deleted, and put back where it cannot be
        restored. None = the newest.

    Raises:
      UserError: the checkpoint to resume from is incomplete or not there; names those that are.
    """

    def __init__(self, path: Path, *, keep: int, best: int = 0, every: int = 0, restore_step: int | None = None):
        self._path = path.absolute()
        self._aside: dict[Path, Path] = {}  # {its name now: its name}, until the run goes on without them
        chosen = _choose(self._path, restore_step)
        _all_hosts("checkpoints: chosen")
        if jax.process_index() == 0:
            for step, why in chosen.items():
                before = self._path / str(step)
                now = before.with_name(f"{why}-{step}-{os.getpid()}")
                self._aside[before.rename(now)] = before
        _all_hosts("checkpoints: set aside")
        managers = ocp.checkpoint_managers
        policies = [managers.LatestN(keep)]
        if best:  # as one policy of several: alone it would delete the newest
            policies.append(
                managers.BestN(get_metric_fn=_badness, reverse=True, n=best, keep_checkpoints_without_metrics=False)
            )
        if every:
            policies.append(managers.EveryNSteps(every))
        self._options = ocp.CheckpointManagerOptions(
            best_fn=_badness,
            best_mode="min",
            preservation_policy=managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._path, options=self._options)
        self._lost = False

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, config: Mapping[str, Any], *, held_out: float) -> None:
        """Starts writing; the caller may donate `state` at once.

        `held_out` is infinite for a step that was not measured: never among the best. A full disk is no error: it is
        reported, what was written before stays, and the next save tries again.
        """
        self.settle()
        self._lost = False
        meta, state = {"step": step, "config": config}, _lasting(state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self._manager.save(step, args=args, metrics={"held_out": held_out}, force=True)
        except Exception as error:
            self._give_up(error)

    def settle(self) -> bool:
        """Waits for the save under way. False when the disk was too full for the last one, which is reported."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)
        return not self._lost

    def _give_up(self, error: Exception) -> None:
        """After a failed save: frees the disk of its half, or raises `error` if it is not about a full disk."""
        if not disk.is_full(error) or jax.process_count() > 1:  # the other hosts would wait for this one
            raise error
        self._lost = True
        logging.error("no checkpoint could be written to %s: the disk is full. Training goes on.", self._path)
        for _ in range(10):  # other threads of the save may still be writing
            for half in self._path.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(half, ignore_errors=True)
            time.sleep(0.05)
        # A manager of its own: the old one believes that the checkpoints to be replaced are gone.
        self._manager = ocp.CheckpointManager(self._path, options=self._options)

    def restore(self, step: int, abstract: Any, config: Mapping[str, Any]) -> Any:
        """The state saved at `step`, placed as `abstract` (ShapeDtypeStructs with shardings) says.

        Raises:
          UserError: the checkpoint belongs to another model or run, which names the field that differs; or
            its files are damaged, which names the older steps.
        """
        meta = self._read(step, meta=ocp.args.JsonRestore()).meta
        # As JSON, in which tuples are lists, and with defaults for fields that an older version did not have.
        config, recorded = (json.loads(json.dumps(complete(x))) for x in (config, meta["config"]))
        for field in IDENTITY:
            saved, now = recorded.get(field, config.get(field)), config.get(field)
            if saved != now:
                raise UserError(
                    f"the checkpoint at step {step} was written with {_difference(field, saved, now)}; "
                    "give the same value to resume it, or another --workdir to start a new run."
                )
        state = self._read(step, state=ocp.args.StandardRestore(_lasting(abstract))).state
        for now, before in self._aside.items():
            logging.warning("checkpoint %s is not gone on with; moved to %s", before, now.name)
        self._aside.clear()
        counters = {k: abstract[k] for k in TRANSIENT if k in abstract}
        return state | {k: parallel.put(np.zeros(x.shape, x.dtype), x.sharding) for k, x in counters.items()}

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and tensorstore raise a dozen kinds
            others = [s for s in self._manager.all_steps() if s < step]
            reason = str(error).strip().partition("\n")[0][:200]
            raise UserError(
                f"the checkpoint {self._path / str(step)} cannot be read ({type(error).__name__}: {reason}): "
                f"it is damaged, or of another optimizer. {_offer(others)}"
            ) from error

    def reached_preemption(self, step: int) -> bool:
        """Multi-host: whether the cluster is about to stop this job. Must run on every host each step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for the last save. Checkpoints that were set aside for one that was then refused are put back."""
        self.settle()
        self._manager.close()
        for now, before in self._aside.items():
            now.rename(before)
        self._aside.clear()


def _lasting(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state goes into a checkpoint."""
    return {k: v for k, v in state.items() if k not in TRANSIENT}


def _badness(metrics: Mapping[str, float]) -> float:
    value = metrics["held_out"]
    return value if np.isfinite(value) else np.inf


def _difference(field: str, saved: Any, now: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in sorted({*saved, *now}):
            if saved.get(key) != now.get(key):
                return _difference(f"{field}.{key}", saved.get(key), now.get(key))
    return f"{field} = {saved!r}, not {now!r}"


def _all_hosts(name: str) -> None:
    """Waits for the others: no host may find what the first one sets aside."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _choose(path: Path, restore_step: int | None) -> dict[int, str]:
    """The step directories that have to go before a run resumes at `restore_step`, and why.

    Orbax takes any directory whose name is a number for a checkpoint.
    """
    steps = sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []
    missing = {s: _missing(path / str(s)) for s in steps}
    complete = [s for s in steps if not missing[s]]
    wanted = restore_step if restore_step is not None else max(steps, default=None)
    if wanted is not None and wanted not in complete:
        others = [s for s in complete if restore_step is not None or s < wanted]
        if wanted not in steps:
            raise UserError(f"there is no checkpoint {path / str(wanted)}. {_offer(others)}")
        raise UserError(
            f"the checkpoint {path / str(wanted)} is incomplete, perhaps a copy that was cut short: it has no "
            f"{', no '.join(missing[wanted])}. {_offer(others)}"
        )
    newer = {s: "newer" for s in complete if s > wanted}
    return newer | {s: "incomplete" for s in steps if missing[s]}


def _missing(step: Path) -> list[str]:
    """The commit marks that a step directory lacks."""
    lacks = [mark for mark in MARKS if not (step / mark).is_file()]
    uncommitted = [mark for mark in COMMITTED if not (step / mark).is_file()]
    return lacks + (uncommitted if len(uncommitted) < len(COMMITTED) else [])


def _offer(steps: list[int]) -> str:
    """What to do instead of resuming from a checkpoint that is no good."""
    if not steps:
        return "There is no other: complete the copy, or name another --workdir."
    return f"Complete the copy, or resume with --restore-step {max(steps)} (there are {', '.join(map(str, steps))})."


class Unsaved(RuntimeError):
    """A run is over and its last checkpoint could not be written."""


def parameter_hash(params: Any) -> str:
    """`array_hash` of parameters on devices, however they are sharded; one at a time is whole on a host."""
    return array_hash(params, fetch=parallel.gather)


def array_hash(tree: Any, *, fetch: Callable[[Any], np.ndarray] = np.asarray) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of a nested dict of arrays; `fetch` makes each of them numpy's."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    digest = hashlib.sha256()
    for name in sorted(flat):
        x = np.ascontiguousarray(fetch(flat[name]))
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
