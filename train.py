"""Trains a VAE or a stage of LaVie. One loop, read from top to bottom.

    python train.py --config configs/moving_shapes/base.py --workdir runs/base [--config.FIELD=VALUE ...]

`--config FILE.py:tiny` runs a small version of any config in about a minute on a CPU. The same command
resumes a run that was stopped; `--restore-step N` goes back to an older checkpoint. In the workdir:

    checkpoints/     training state (Orbax): the newest few, the best, and every N-th as the config says
    weights/         the newest EMA model, a weights folder for `sample.py --weights`
    samples/         sample videos of fixed prompts
    metrics.jsonl    a line per logging interval; tensorboard/ beside it when the config says so
    profile/         with `--profile`: a trace of a few steps
    diverged/        the step at which a run stopped that broke down, for `python -m lavie_jax.training.divergence`

Compiled programs are kept in ~/.cache/lavie_jax; JAX_COMPILATION_CACHE_DIR names another place.

Ctrl-C and SIGTERM save a checkpoint and stop. The last line printed is the SHA-256 of the parameters: a
resumed run equals an uninterrupted one bit for bit on the same mesh (on GPUs, whose fastest kernels add in
any order, with XLA_FLAGS=--xla_gpu_deterministic_ops=true).
"""

import dataclasses
import gc
import math
import signal
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from lavie_jax import parallel
from lavie_jax.data import pipeline
from lavie_jax.data.config import latent_paths
from lavie_jax.data.tokens import load_tokenizer
from lavie_jax.errors import one_line_errors
from lavie_jax.training import (
    build,
    checkpoint,
    disk,
    divergence,
    grids,
    lock,
    metrics,
    operations,
    optimizer,
    options,
)
from lavie_jax.training.step import make_state, make_update
from lavie_jax.weights.folder import recover_folder

SHOWN = ("psnr", "data_wait", "step_seconds_p95", "goodput", "mfu", "memory_gib")  # in the bar, beside losses
HELD_OUT_SEED = 0  # noise of the held-out loss: the same in every run


def main(argv: list[str], cleanup: ExitStack) -> None:
    """Trains what the command line says, and prints the SHA-256 of the parameters.

    `cleanup` closes what is open (a checkpoint that is being written, data workers), however this ends.
    """
    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Command line                                                                     │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    pace = metrics.Pace()
    config, workdir, restore_step, profile = options.parse(argv)
    options.check(config, workdir)
    logging.set_verbosity(logging.WARNING)  # Orbax tells much

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Devices                                                                          │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    parallel.initialise(cpu_devices=config.cpu_devices, distributed=config.distributed)
    parallel.keep_compiled_programs()
    first = jax.process_index() == 0
    cleanup.callback(lock.Lock(workdir).release)
    if first:
        recover_folder(workdir / "weights")  # a run that was killed while it exported
    mesh = parallel.make_mesh(**config.mesh)
    parallel.check_batch(config.batch, mesh, accumulate=config.accumulate)
    accelerator = jax.default_backend() != "cpu"
    # Parameters stay float32; the matrix units of accelerators want bfloat16, which CPUs do not have.
    dtype = jnp.dtype({"auto": "bfloat16" if accelerator else "float32"}.get(config.dtype, config.dtype))

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Data: found before gigabytes of weights are read                                 │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    data = build.data_config(config)
    examples, held_out_examples = (
        pipeline.open_examples(fields, batch_size=config.batch) for fields in (data, build.held_out_data(data))
    )
    rows = parallel.local_rows(config.batch, mesh)  # of each batch, that this host brings
    if jax.process_count() > 1:
        found = {"data": examples.fingerprint(), "held-out data": held_out_examples.fingerprint()}
        parallel.check_agreement(options.facts(config) | found)

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Task: models, loss, parameters to start from                                     │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    task, tokenizer_dir = build.make_task(config, dtype, scratch)
    identity = config.to_dict() | {checkpoint.FROZEN: checkpoint.array_hash(task.frozen)}
    if jax.process_count() > 1:
        start = checkpoint.array_hash(task.start or {})
        parallel.check_agreement({"frozen models": identity[checkpoint.FROZEN], "parameters to start from": start})
    optimizing = optimizer.OptimizerConfig(**config.optimizer)
    tx = optimizer.make_optimizer(optimizing, config.steps)
    learning_rate = optimizer.learning_rate(optimizing, config.steps)

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Batches: their position is the step, that of the newest checkpoint               │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir)
    with closing(pipeline.batches(held_out_examples, tokenizer, rows=rows)) as batches:
        held_out_batches = [parallel.put_batch(next(batches), mesh) for _ in range(config.held_out_batches)]
    checkpoints = checkpoint.Checkpoints(
        workdir / "checkpoints",
        keep=config.keep_checkpoints,
        best=config.keep_best,
        every=config.keep_every,
        restore_step=restore_step,
    )
    cleanup.callback(checkpoints.close)
    step = checkpoints.latest() or 0
    batches = pipeline.batches(examples, tokenizer, rows=rows, start_step=step, workers=config.workers)
    cleanup.callback(batches.close)

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ State: shapes, then shardings, then arrays; never whole on one device            │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    def create(origin: Any) -> dict:
        return make_state(task.init(origin) if task.start is None else origin, task, tx)

    origin = jax.random.key(config.seed) if task.start is None else task.start
    shapes = jax.eval_shape(create, origin)
    shardings = parallel.shardings(shapes, mesh)
    # What made the latents of a run on latents has no more work to do.
    frozen = {} if latent_paths(data) else jax.tree.map(lambda x: np.asarray(x, dtype), task.frozen)
    frozen = parallel.put(frozen, parallel.shardings(frozen, mesh))

    if step:
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        state = checkpoints.restore(step, abstract, identity)
        say(f"resumed at step {step} of {config.steps}")
    else:
        if task.start is not None:
            origin = parallel.put(origin, parallel.shardings(origin, mesh))
        # It runs once, and on a CPU a fast program takes four times as long to compile (30 seconds for a small UNet).
        plain = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
        state = jax.jit(create, out_shardings=shardings, compiler_options=plain)(origin)
    task, origin = dataclasses.replace(task, start=None), None  # gigabytes of the host's memory at full size
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(f"{count / 1e6:.2f} M parameters; {mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}); {dtype}")

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Compiled functions                                                               │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    update = jax.jit(
        make_update(
            task,
            tx,
            seed=config.seed,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            skip_limit=config.skip_limit,
        ),
        donate_argnums=0,
        out_shardings=(shardings, parallel.replicated(mesh)),
    )
    update = parallel.on_mesh(update, mesh)
    held_out_losses = parallel.on_mesh(jax.jit(task.held_out, out_shardings=parallel.replicated(mesh)), mesh)

    def held_out() -> dict[str, float]:
        """Losses of the EMA on held-out batches, at fixed timesteps with fixed noise."""
        rngs = [jax.random.fold_in(jax.random.key(HELD_OUT_SEED), i) for i in range(len(held_out_batches))]
        rows = [held_out_losses(state["ema"], frozen, b, r) for b, r in zip(held_out_batches, rngs)]
        return metrics.mean(rows)

    def export(measured: Mapping[str, float]) -> bool:
        """The EMA as a weights folder, by the first host. False elsewhere, and when the disk is full."""
        ema = parallel.gather(state["ema"], keep=first)
        if not first:
            return False
        with disk.outlive("weights/") as written:
            task.export(workdir / "weights", ema, measured)
        return bool(written)

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Loop                                                                             │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    stop = StopRequest(multi_host=jax.process_count() > 1)
    watch = divergence.Watch(workdir / "diverged", config=identity, dtype=dtype.name, limit=config.skip_limit)
    tracer = metrics.Profile(workdir / "profile" if profile and first else None, first=step + 3)
    cleanup.callback(tracer.close)
    writer = metrics.Metrics(workdir, step=step, tensorboard=config.tensorboard) if first else None
    if writer:
        cleanup.callback(writer.close)
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not first, dynamic_ncols=True)
    cleanup.callback(bar.close)
    window: list[Mapping[str, jax.Array]] = []
    programs: dict[tuple, float] = {}  # {shapes of batches: operations of a step}, one a bucket
    peak = operations.peak(mesh, config.peak_tflops)
    last = step >= config.steps
    if last:  # the run before may have been killed between its last checkpoint and these
        export(held_out())
    pace.resume()
    while not last:
        if tracer.before(step):
            pace.resume()
        with pace.waiting():
            batch = next(batches)
        shapes = tuple((name, x.shape) for name, x in batch.items())
        placed = parallel.put_batch(batch, mesh)
        if compiles := shapes not in programs:
            counted = (task, state["params"], frozen, placed, mesh)
            programs[shapes] = operations.of_step(*counted, accumulate=config.accumulate) if peak else 0.0
            if data.buckets:
                said = ", ".join(f"{name} {shape}" for name, shape in shapes)
                say(f"step {step + 1} compiles program {len(programs)} of {len(data.buckets)}: {said}")
        state, losses = update(state, frozen, placed)
        if compiles:  # what tracing left stays: the collector need not go through it again, 0.2 s every 30 steps
            gc.collect()
            gc.freeze()
        step += 1
        bar.update()
        window.append(losses)
        # Asked once a step: a signal may come at any line.
        stopped = step < config.steps and stop.requested(checkpoints, step)
        last = step == config.steps or stopped

        save = step % config.checkpoint_every == 0 or last
        log = step % config.log_every == 0 or save
        watch.step(step, losses["skipped"], batch, state, wait=log)
        pace.step(compiled=compiles, operations=programs[shapes])
        if log:
            applied = int(optimizer.updates_done(state["opt_state"]))
            values = metrics.mean_of_steps(window) | {"learning_rate": float(learning_rate(max(applied - 1, 0)))}
            values |= pace.report(config.batch, peak) | metrics.memory()
            if values["skipped"]:
                say(f"skipped {values['skipped']} of {len(window)} steps up to {step}: loss or gradients not finite")
            window.clear()
            shown = [k for k in values if "loss" in k or k in SHOWN]
            bar.set_postfix({k: f"{values[k]:.3g}" for k in shown}, refresh=False)
            if writer:
                writer.write(step, values)

        if stopped:  # saved at once: whoever takes the machine back may not wait for the rest
            checkpoints.save(step, state, identity, held_out=math.inf)
            checkpoints.settle()
        if save or step % config.held_out_every == 0:
            measured = held_out()
            if writer:
                writer.write(step, {f"held_out/{name}": value for name, value in measured.items()})
        if save:
            if not stopped:
                checkpoints.save(step, state, identity, held_out=measured[task.judged_by])
            exported = export(measured)
        if save and exported and config.prompts and (step % config.sample_every == 0 or step == config.steps):
            with disk.outlive("samples/"):
                grid = grids.write(workdir / "weights", config.prompts, workdir / "samples", step)
                writer.picture(step, "samples", grid)
        if save or step % config.held_out_every == 0:
            pace.resume()

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ End                                                                              │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    digest = checkpoint.parameter_hash(state["params"])
    saved = checkpoints.settle()
    cleanup.close()
    if not saved:
        raise checkpoint.Unsaved(
            f"the disk is full: the run is at step {step}, its newest checkpoint is older. Make room; the same "
            "command goes on from there."
        )
    ended = "stopped" if step < config.steps else "finished"
    say(f"{ended} at step {step} of {config.steps}; SHA-256 of the parameters:")
    if first:
        print(digest, flush=True)


def say(text: str) -> None:
    """A line above the progress bar, on the first host."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


class StopRequest:
    """Whether somebody wants the run to save and stop: SIGTERM, Ctrl-C, or a cluster that takes its machines back.

    On several hosts Orbax lets all of them agree on the step. A second Ctrl-C stops at once.
    """

    def __init__(self, *, multi_host: bool):
        self._signalled = False
        self._multi_host = multi_host
        if not multi_host:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True
        signal.signal(number, signal.SIG_DFL)
        logging.warning("%s: saving a checkpoint and stopping", signal.Signals(number).name)

    def requested(self, checkpoints: checkpoint.Checkpoints, step: int) -> bool:
        """To be asked after every step, on every host."""
        return checkpoints.reached_preemption(step) if self._multi_host else self._signalled


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        with one_line_errors():
            print(f"{__doc__}\n{options.help_text(sys.argv[1:])}")
        sys.exit()
    try:
        with one_line_errors(), ExitStack() as stack:
            main(sys.argv[1:], stack)
    except (divergence.Diverged, checkpoint.Unsaved) as error:
        sys.exit(f"error: {error}")
