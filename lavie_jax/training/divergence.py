"""Divergence: too many steps in a row without a finite loss and gradients stop the run, and the last one is dumped.

    python -m lavie_jax.training.divergence WORKDIR/diverged/STEP

recomputes the gradients of that step and prints what is not finite: parameters, batch, losses, gradients by name. It
runs on one machine, on as many of its devices as divide the batch, in the folder that the run was started in, because
frozen models are read from the paths in the run's config. The update skips such a step (`training/step.py`), so that
the parameters stay as they were before it.
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

from lavie_jax import disk, parallel
from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.text_files import read_json
from lavie_jax.training import build, checkpoint, optimizer
from lavie_jax.training.config import complete
from lavie_jax.training.state import abstract_random, abstract_state, place_frozen
from lavie_jax.training.step import UNTRAINED, make_gradients, step_rng, with_average

AHEAD = 2  # steps that the devices may be behind the loop
NAMED = 20  # arrays listed by name


class Diverged(RuntimeError):
    """Training diverged; the message has the step and what to try."""


class DivergenceMonitor:
    """Stops a run that skips too many steps in a row, and dumps the last of them.

    Args:
        directory: where a dump is written.
        config: the `checkpoint.identity` of the run.
        dtype: dtype of the computation.
        limit: skipped steps in a row, the `skip_limit` of `step.make_update`.
        rows: indices, in the batch, of this process's rows (`parallel.local_rows`); None = all rows.
    """

    def __init__(
        self, directory: Path, *, config: Mapping[str, Any], dtype: str, limit: int, rows: Sequence[int] | None = None
    ):
        self._directory, self._limit, self._rows = directory, limit, rows
        self._about = {"config": dict(config), "dtype": dtype, "processes": jax.process_count()}
        self._in_flight: deque = deque()

    def step(self, step: int, skipped: jax.Array, rows: Mapping[str, np.ndarray], state: dict, *, wait: bool) -> None:
        """Must be called after every update; waits for the devices if they are more than `AHEAD` steps behind.

        Args:
            step: number of updates done.
            skipped: the update's output of that name.
            rows: this process's rows of the batch.
            state: the state after the update, with random untrained parameters if there are any.
            wait: wait for this step too.

        Raises:
            Diverged: the limit is reached; the last skipped step was written to `directory/STEP`.
        """
        self._in_flight.append((step, skipped, rows))
        while len(self._in_flight) > (0 if wait else AHEAD):
            step, skipped, rows = self._in_flight.popleft()
            if int(skipped) >= self._limit:
                path = self._directory / str(step)
                with disk.tolerate_full_disk(f"{path}") as written:
                    dump(path, step, state, rows, self._about, indices=self._rows)
                again = (
                    f" To list what is not finite: python -m lavie_jax.training.divergence {path}" if written else ""
                )
                raise Diverged(
                    f"loss or gradients were not finite in {int(skipped)} steps in a row, up to step {step}. "
                    "The newest checkpoint is from before. Try a lower optimizer.learning_rate or a longer "
                    f"optimizer.warmup, if necessary from an older checkpoint (--restore-step).{again}"
                )


def dump(
    path: Path,
    step: int,
    state: dict,
    rows: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    *,
    indices: Sequence[int] | None = None,
) -> None:
    """Writes the inputs of the update to `step`: `batch-P.npz` of process P, `state/` (Orbax), `about` as config.json.

    `indices` are those of the rows in the batch; None = 0, 1, ...
    `state` may be that of a later step if all steps since were skipped. Must be called on every host.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute() / "state", {k: v for k, v in state.items() if k != "skipped"}, force=True)
    named = {f"batch/{name}": x for name, x in rows.items()}
    count = len(next(iter(rows.values())))
    indices = np.arange(count) if indices is None else np.asarray(indices)
    np.savez(path / f"batch-{jax.process_index()}.npz", step=step - 1, rows=indices, **named)
    if jax.process_index() == 0:
        (path / "config.json").write_text(json.dumps(about, indent=2) + "\n")


def load(path: Path, abstract: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns (state, whole batch) of a dump: `update(state, frozen, batch)` repeats the step.

    Args:
        path: a folder written by `dump`.
        abstract: the state as ShapeDtypeStructs with shardings.
    """
    parts = [np.load(file) for file in sorted(path.glob("batch-*.npz"), key=lambda p: int(p.stem.split("-")[1]))]
    names = [name for name in parts[0] if name.startswith("batch/")]
    batch = {name.removeprefix("batch/"): np.concatenate([part[name] for part in parts]) for name in names}
    # A host's rows need not be consecutive. Dumps of earlier versions, without indices, are read host by host.
    if all("rows" in part for part in parts):
        order = np.argsort(np.concatenate([part["rows"] for part in parts]), kind="stable")
        batch = {name: x[order] for name, x in batch.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path.absolute() / "state", {k: v for k, v in abstract.items() if k != "skipped"})
    return {**state, "step": jnp.int32(parts[0]["step"]), "skipped": jnp.int32(0)}, batch


# ---- replay ----


def replay(path: Path, scratch: Path) -> Iterator[str]:
    """Recomputes the step of a dump, and yields lines that list what is not finite. `scratch` is an empty folder."""
    about = _read_about(path)
    config = _config(about["config"])
    parallel.initialise(cpu_devices=config.cpu_devices)
    dtype = jnp.dtype(about["dtype"])
    task, _ = build.make_task(config, dtype, scratch)
    now = checkpoint.identity({}, task)
    if any(about["config"].get(name, now[name]) != now[name] for name in checkpoint.HASHES):
        raise UserError(
            f"the frozen models have changed since {path} was written, so the step cannot be repeated: restore the "
            "folders that init_from, vae_from and text_from name."
        )
    ways = math.gcd(jax.device_count(), config.batch // config.accumulate)
    mesh = parallel.make_mesh(fsdp=ways, devices=jax.devices()[:ways])
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    state, batch = load(path, abstract_state(task, tx, mesh) | abstract_random(task, mesh))
    frozen = place_frozen(task, mesh, dtype) | {k: state[k] for k in (UNTRAINED,) if k in state}

    gradients = parallel.on_mesh(jax.jit(make_gradients(task, accumulate=config.accumulate)), mesh)
    rng = step_rng(jax.random.key(config.seed), int(state["step"]))
    read = with_average(task, frozen, state["ema"])
    grads, losses = gradients(state["params"], read, parallel.put_batch(batch, mesh), rng)
    values = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
    yield f"update {int(state['step']) + 1}, {dtype}, on {mesh.size} x {mesh.devices.flat[0].device_kind}: {values}"
    for what, tree in (("parameters", state["params"]), ("the batch", batch), ("gradients", grads)):
        yield from _not_finite(what, tree)


def _read_about(path: Path) -> dict[str, Any]:
    """Reads the description of a dump's run. Refuses folders that are not a complete dump."""
    if not (path / "config.json").is_file() or not (path / "state").is_dir():
        raise UserError(
            f"{path} is not a dump of a step: name WORKDIR/diverged/STEP, which has config.json and state/."
        )
    about = read_json(path / "config.json")
    missing = [i for i in range(about["processes"]) if not (path / f"batch-{i}.npz").is_file()]
    if missing:
        raise UserError(f"{path} lacks batch-{missing[0]}.npz: copy the files of all hosts of the run into it.")
    return about


def _config(values: Mapping[str, Any]) -> Any:
    """Returns a run's ConfigDict from JSON, where its tuples are lists."""
    import ml_collections  # only training needs the package

    def tuples(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: tuples(x) for name, x in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    values = complete({name: tuples(x) for name, x in values.items() if name not in checkpoint.HASHES})
    return ml_collections.ConfigDict(values)


def _not_finite(what: str, tree: Any) -> Iterator[str]:
    """Yields a line about a tree of arrays, and one for each of the first arrays that are not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    count = jax.jit(lambda arrays: [jnp.sum(~jnp.isfinite(x)) for x in arrays])  # one program for all of them
    counts = jax.device_get(count([x for _, x in leaves]))
    bad = [(path, x, int(n)) for (path, x), n in zip(leaves, counts) if n]
    yield f"{what}: {f'{len(bad)} of {len(leaves)} arrays are not finite' if bad else 'all finite'}"
    for path, x, count in bad[:NAMED]:
        yield f"  {jax.tree_util.keystr(path, simple=True, separator='/')}: {count} of {x.size} numbers"
    if len(bad) > NAMED:
        yield f"  and {len(bad) - NAMED} more"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser(
        prog="python -m lavie_jax.training.divergence", description="Lists what is not finite in a dumped step."
    )
    parser.add_argument("dump", type=Path, metavar="WORKDIR/diverged/STEP")
    with one_line_errors(), tempfile.TemporaryDirectory() as scratch:
        for line in replay(parser.parse_args(argv).dump, Path(scratch)):
            print(line)


if __name__ == "__main__":
    main()
