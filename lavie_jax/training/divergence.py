"""Steps whose loss or gradients are not finite: too many in a row stop the run, and can be looked at again.

The update itself skips such a step (`training/step.py`), so that the parameters stay what they were before it.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lavie_jax.training import disk

AHEAD = 2  # steps of batches that may wait on the devices


class Diverged(RuntimeError):
    """Training broke down; the message says where and what to try."""


class Watch:
    """Follows the steps that the devices work off.

    Args:
      directory: where a dump is written.
      seed: of the run.
      limit: of skipped steps in a row, the `skip_limit` of `step.make_update`.
    """

    def __init__(self, directory: Path, *, seed: int, limit: int):
        self._directory, self._seed, self._limit = directory, seed, limit
        self._in_flight: deque = deque()

    def step(self, step: int, skipped: jax.Array, rows: Mapping[str, np.ndarray], state: dict, *, wait: bool) -> None:
        """To be called after every update: waits for the devices if they are too far behind.

        Args:
          step: number of updates done.
          skipped: what the update returned under this name.
          rows: this process's rows of its batch.
          state: after the update.
          wait: wait for this step too.

        Raises:
          Diverged: the limit is reached; the last skipped step was written to `directory/STEP`.
        """
        self._in_flight.append((step, skipped, rows))
        while len(self._in_flight) > (0 if wait else AHEAD):
            step, skipped, rows = self._in_flight.popleft()
            if int(skipped) >= self._limit:
                path = self._directory / str(step)
                with disk.outlive(f"{path}") as written:
                    dump(path, step, state, rows, seed=self._seed)
                reproduced = f" {path} reproduces the step (`divergence.load`)." if written else ""
                raise Diverged(
                    f"loss or gradients were not finite in {int(skipped)} steps in a row, up to step {step}. "
                    f"Nothing after the last checkpoint was kept.{reproduced} Try a lower "
                    "optimizer.learning_rate or a longer optimizer.warmup, from an older checkpoint "
                    "(--restore-step) if need be."
                )


def dump(path: Path, step: int, state: dict, rows: Mapping[str, np.ndarray], *, seed: int) -> None:
    """Writes what update number `step` saw: `batch-P.npz` of process P (its rows, step, rng) and `state/` (Orbax).

    `state` may be that of a later step if all steps since were skipped. Must run on every host.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute() / "state", {k: v for k, v in state.items() if k != "skipped"}, force=True)
    rng = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), step - 1))
    named = {f"batch/{name}": x for name, x in rows.items()}
    np.savez(path / f"batch-{jax.process_index()}.npz", step=step - 1, rng=rng, **named)


def load(path: Path, abstract: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """(state, whole batch) of a dump: `update(state, frozen, batch)` is the step again.

    Args:
      path: what `dump` wrote.
      abstract: the state as ShapeDtypeStructs with shardings.
    """
    parts = [np.load(file) for file in sorted(path.glob("batch-*.npz"), key=lambda p: int(p.stem.split("-")[1]))]
    names = [name for name in parts[0] if name.startswith("batch/")]
    batch = {name.removeprefix("batch/"): np.concatenate([part[name] for part in parts]) for name in names}
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path.absolute() / "state", {k: v for k, v in abstract.items() if k != "skipped"})
    return {**state, "step": jnp.int32(parts[0]["step"]), "skipped": jnp.int32(0)}, batch
