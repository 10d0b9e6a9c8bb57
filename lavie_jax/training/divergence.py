"""Steps whose loss or gradients are not finite: too many in a row stop the run, and can be looked at again.

    python -m lavie_jax.training.divergence WORKDIR/diverged/STEP

computes the gradients of that step once more and says what is not finite: parameters, batch, losses, gradients by name.
It runs on one machine, on as many of its devices as divide the batch, from the folder that the run was started in: the
models that are not trained are read where its config says. The update itself skips such a step (`training/step.py`), so
that the parameters stay what they were before it.
"""

import json
import math
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lavie_jax import parallel
from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.training import build, checkpoint, disk, optimizer
from lavie_jax.training.config import complete
from lavie_jax.training.step import make_gradients, make_state, step_rng

AHEAD = 2  # steps of batches that may wait on the devices
NAMED = 20  # of the arrays that are not finite


class Diverged(RuntimeError):
    """Training broke down; the message says where and what to try."""


class Watch:
    """Follows the steps that the devices work off.

    Args:
      directory: where a dump is written.
      config: of the run, as a checkpoint keeps it.
      dtype: of the computation.
      limit: of skipped steps in a row, the `skip_limit` of `step.make_update`.
    """

    def __init__(self, directory: Path, *, config: Mapping[str, Any], dtype: str, limit: int):
        self._directory, self._limit = directory, limit
        self._about = {"config": dict(config), "dtype": dtype, "processes": jax.process_count()}
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
                    dump(path, step, state, rows, self._about)
                again = f" What is not finite: python -m lavie_jax.training.divergence {path}" if written else ""
                raise Diverged(
                    f"loss or gradients were not finite in {int(skipped)} steps in a row, up to step {step}. "
                    "Nothing after the last checkpoint was kept. Try a lower optimizer.learning_rate or a longer "
                    f"optimizer.warmup, from an older checkpoint (--restore-step) if need be.{again}"
                )


def dump(path: Path, step: int, state: dict, rows: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes what the update to `step` saw: `batch-P.npz` of process P, `state/` (Orbax), and `about` as config.json.

    `state` may be that of a later step if all steps since were skipped. Must run on every host.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute() / "state", {k: v for k, v in state.items() if k != "skipped"}, force=True)
    named = {f"batch/{name}": x for name, x in rows.items()}
    np.savez(path / f"batch-{jax.process_index()}.npz", step=step - 1, **named)
    if jax.process_index() == 0:
        (path / "config.json").write_text(json.dumps(about, indent=2) + "\n")


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


# ---- looking at it again ----


def replay(path: Path, scratch: Path) -> Iterator[str]:
    """Lines that say what is not finite in the step of a dump, which is computed once more; `scratch` is a folder."""
    about = _read_about(path)
    config = _config(about["config"])
    parallel.initialise(cpu_devices=config.cpu_devices)
    dtype = jnp.dtype(about["dtype"])
    task, _ = build.make_task(config, dtype, scratch)
    if checkpoint.array_hash(task.frozen) != about["config"][checkpoint.FROZEN]:
        raise UserError(
            f"the models that {path} was not training have changed since, and the step with them: bring back what was "
            "in init_from, vae_from and text_from."
        )
    ways = math.gcd(jax.device_count(), config.batch // config.accumulate)
    mesh = parallel.make_mesh(fsdp=ways, devices=jax.devices()[:ways])
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    start = jax.random.key(0) if task.start is None else task.start
    shapes = jax.eval_shape(lambda x: make_state(task.init(x) if task.start is None else x, task, tx), start)
    places = parallel.shardings(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    state, batch = load(path, abstract)
    frozen = jax.tree.map(lambda x: np.asarray(x, dtype), task.frozen)
    frozen = parallel.put(frozen, parallel.shardings(frozen, mesh))

    gradients = parallel.on_mesh(jax.jit(make_gradients(task, accumulate=config.accumulate)), mesh)
    rng = step_rng(config.seed, int(state["step"]))
    grads, losses = gradients(state["params"], frozen, parallel.put_batch(batch, mesh), rng)
    values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
    yield f"update {int(state['step']) + 1}, {dtype}, on {mesh.size} x {mesh.devices.flat[0].device_kind}: {values}"
    for what, tree in (("parameters", state["params"]), ("the batch", batch), ("gradients", grads)):
        yield from _not_finite(what, tree)


def _read_about(path: Path) -> dict[str, Any]:
    """What a dump says of its run; UserError for what is no dump, or not all of one."""
    if not (path / "config.json").is_file() or not (path / "state").is_dir():
        raise UserError(f"{path} is no dump of a step: name WORKDIR/diverged/STEP, with config.json and state/ in it.")
    about = json.loads((path / "config.json").read_text())
    missing = [i for i in range(about["processes"]) if not (path / f"batch-{i}.npz").is_file()]
    if missing:
        raise UserError(f"{path} lacks batch-{missing[0]}.npz: bring together what the run's hosts wrote.")
    return about


def _config(values: Mapping[str, Any]) -> Any:
    """A run's ConfigDict, from JSON, in which its tuples became lists."""
    import ml_collections  # needed by those who train only

    def tuples(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: tuples(x) for name, x in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    values = complete({name: tuples(x) for name, x in values.items() if name != checkpoint.FROZEN})
    return ml_collections.ConfigDict(values)


def _not_finite(what: str, tree: Any) -> Iterator[str]:
    """A line on a tree of arrays, and one on each of the first arrays that are not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    counts = jax.device_get([jnp.sum(~jnp.isfinite(x)) for _, x in leaves])
    bad = [(path, x, int(n)) for (path, x), n in zip(leaves, counts) if n]
    yield f"{what}: {f'{len(bad)} of {len(leaves)} arrays are not finite' if bad else 'all finite'}"
    for path, x, count in bad[:NAMED]:
        yield f"  {jax.tree_util.keystr(path, simple=True, separator='/')}: {count} of {x.size} numbers"
    if len(bad) > NAMED:
        yield f"  and {len(bad) - NAMED} more"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = Parser(prog="python -m lavie_jax.training.divergence", description="What is not finite in a dumped step.")
    parser.add_argument("dump", type=Path, metavar="WORKDIR/diverged/STEP")
    with one_line_errors(), tempfile.TemporaryDirectory() as scratch:
        for line in replay(parser.parse_args(argv).dump, Path(scratch)):
            print(line)


if __name__ == "__main__":
    main()
