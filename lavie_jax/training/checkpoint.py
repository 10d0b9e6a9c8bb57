"""Training state on disk (Orbax), and the hash that tells whether two runs came out the same.

A checkpoint is the state (parameters, optimizer, EMA, step) and a small JSON with the step and the
config. The data stream needs no state of its own: its position is the step. Saves are asynchronous and
atomic; a directory that is not complete (a killed run, a half-finished copy) is never taken for one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
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

# What makes a checkpoint another model or another run: resuming with a different value is refused.
# The rest (steps, intervals, prompts, mesh, ...) may change between the parts of one run.
IDENTITY = ("stage", "seed", "regime", "train_text_encoder", "unet", "text_encoder", "vae", "schedule")


class Checkpoints:
    """The newest `keep` checkpoints under `path`."""

    def __init__(self, path: Path, *, keep: int):
        set_incomplete_aside(path)
        if jax.process_count() > 1:  # no host may still find what the first one sets aside
            multihost_utils.sync_global_devices("checkpoints")
        managers = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            path.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.LatestN(keep), cleanup_tmp_directories=True
            ),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, config: Mapping[str, Any]) -> None:
        """Starts writing; the caller may donate `state` at once."""
        meta = {"step": step, "config": config}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract: Any, config: Mapping[str, Any]) -> Any:
        """The state saved at `step`, placed as `abstract` (ShapeDtypeStructs with shardings) says.

        Raises:
          UserError: the checkpoint belongs to another model or run; names the field that differs.
        """
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        config = json.loads(json.dumps(config))  # as it went into the checkpoint: tuples are lists there
        for field in IDENTITY:
            saved, now = meta["config"].get(field), config.get(field)
            if saved != now:
                raise UserError(
                    f"the checkpoint at step {step} was written with {_difference(field, saved, now)}; "
                    "give the same value to resume it, or another --workdir to start a new run."
                )
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state

    def reached_preemption(self, step: int) -> bool:
        """Multi-host: whether the cluster is about to stop this job. Must run on every host each step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


def _difference(field: str, saved: Any, now: Any) -> str:
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        for key in sorted({*saved, *now}):
            if saved.get(key) != now.get(key):
                return _difference(f"{field}.{key}", saved.get(key), now.get(key))
    return f"{field} = {saved!r}, not {now!r}"


def set_incomplete_aside(path: Path) -> None:
    """Renames step directories without Orbax's commit marks: it would take any number for a checkpoint."""
    if jax.process_index() or not path.is_dir():
        return
    for step in path.iterdir():
        marks = (step / "_CHECKPOINT_METADATA", step / "state" / "_METADATA", step / "meta" / "metadata")
        if step.name.isdigit() and not all(mark.is_file() for mark in marks):
            aside = step.with_name(f"incomplete-{step.name}-{os.getpid()}")
            logging.warning("checkpoint %s is incomplete; moved to %s", step, aside.name)
            step.rename(aside)


def parameter_hash(params: Any) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a nested dict of parameters."""
    flat = traverse_util.flatten_dict(parallel.gather(params), sep="/")
    digest = hashlib.sha256()
    for name in sorted(flat):
        x = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(x.tobytes())
    return digest.hexdigest()
