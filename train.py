"""Trains a VAE or a stage of LaVie: one loop, which reads from top to bottom.

    python train.py --config configs/moving_shapes/base.py --workdir runs/base [--config.FIELD=VALUE ...]

`--config FILE.py:tiny` runs a small version of any config in about a minute on a CPU. The same command
resumes a run that was stopped; `--restore-step N` resumes from an older checkpoint. Files in the workdir:

    checkpoints/     training state (Orbax): the newest few, the best, and every N-th, as configured
    weights/         the newest EMA model, a weights folder for `sample.py --weights`; with configs/lora.py, a LoRA for
                     `sample.py --lora`
    samples/         sample videos of fixed prompts
    metrics.jsonl    a line per logging interval; with metrics=("tensorboard",) in the config, also tensorboard/
    profile/         a trace of a few steps, with `--profile`
    diverged/        the step at which training diverged, for `python -m lavie_jax.training.divergence`

Compiled programs are cached in ~/.cache/lavie_jax, or in JAX_COMPILATION_CACHE_DIR.

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and stop the run. The last line printed is the SHA-256 of all parameters,
trained and untrained. On the same mesh, a resumed run equals an uninterrupted one bit for bit. On GPUs this requires
XLA_FLAGS=--xla_gpu_deterministic_ops=true, because the fastest kernels add in any order.
"""

import dataclasses
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from tqdm import tqdm

from lavie_jax import cascade, disk, flops, parallel
from lavie_jax.data import pipeline
from lavie_jax.data.config import latent_paths
from lavie_jax.data.contact_sheet import contact_sheet
from lavie_jax.data.tokens import load_tokenizer
from lavie_jax.disk import recover_folder
from lavie_jax.errors import UserError, one_line_errors
from lavie_jax.estimate import training_warning
from lavie_jax.training import build, checkpoint, divergence, metrics, optimizer, options, sinks
from lavie_jax.training.hosts import Hosts
from lavie_jax.training.state import abstract_random, abstract_state, abstract_untrained, init_state, place_frozen
from lavie_jax.training.step import make_held_out, make_update, step_flops
from lavie_jax.training.workdir import Workdir

SHOWN = ("psnr", "data_wait", "step_seconds_p95", "goodput", "mfu", "memory_gib")  # in the progress bar, with losses
HELD_OUT_SEED = 0  # seed of the noise in held-out losses, the same in every run


def main(argv: list[str], cleanup: ExitStack) -> None:
    """Runs the training that the command line describes, and prints the SHA-256 of the parameters.

    Args:
        argv: the command line, without the name of the program.
        cleanup: closes whatever is open (a checkpoint being written, data workers), however training ends.
    """
    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Command line                                                                     │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    timer = metrics.StepTimer()
    arguments, problem = None, None
    try:
        arguments = options.parse(argv)
    except UserError as error:
        if not options.is_distributed(argv):
            raise
        problem = error  # raised below, where it also reaches the other hosts
    parallel.initialise(
        cpu_devices=arguments.config.cpu_devices if arguments else 0,
        distributed=arguments is None or arguments.config.distributed,
    )
    hosts = Hosts()
    with hosts.leave_together(divergence.Diverged):
        with hosts.agreed():
            if problem is not None:
                raise problem
            options.check(arguments.config, arguments.workdir)
        train(arguments, hosts, timer, cleanup)


def train(arguments: options.Arguments, hosts: Hosts, timer: metrics.StepTimer, cleanup: ExitStack) -> None:
    """Runs the training that the parsed command line describes; see `main`."""
    config, place, restore_step, profile = arguments
    storage = Workdir.of(place)
    workdir = storage.folder
    logging.set_verbosity(logging.WARNING)  # Orbax logs a lot

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Devices                                                                          │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    parallel.keep_compiled_programs()
    first = jax.process_index() == 0  # only this host writes files
    with hosts.agreed():
        if first:
            held = storage.lock()
            cleanup.callback(held.release)
            hosts.before_leaving(held.release)
            recover_folder(workdir / "weights")  # after a kill during an export
    if storage.url is None:
        hosts.check_shared(workdir)
    with hosts.agreed():
        cleanup.callback(storage.close, push=first)
        storage.pull()
    with hosts.agreed():
        mesh = parallel.make_mesh(**config.mesh)
        parallel.check_batch(config.batch, mesh, accumulate=config.accumulate)
    accelerator = jax.default_backend() != "cpu"
    if first and (warning := training_warning(config, jax.default_backend())):
        logging.warning("%s", warning)
    # Parameters stay float32. Accelerators multiply bfloat16 faster, most CPUs do not.
    dtype = jnp.dtype({"auto": "bfloat16" if accelerator else "float32"}.get(config.dtype, config.dtype))

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Data: opened before gigabytes of weights are read                                │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    data = build.data_config(config)
    facts = {}
    with hosts.agreed():
        examples, held_out_examples = (
            pipeline.open_examples(fields, batch_size=config.batch) for fields in (data, build.held_out_data(data))
        )
        rows = parallel.local_rows(config.batch, mesh)  # the rows of each batch that this host loads
        if jax.process_count() > 1:
            facts = {"data": examples.fingerprint(), "held-out data": held_out_examples.fingerprint()}
            facts |= options.facts(config) | {"--restore-step": restore_step}
    parallel.check_hosts_are_consistent(facts)

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Task: models, loss, initial parameters                                           │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    hosts.before_leaving(lambda: shutil.rmtree(scratch, ignore_errors=True))
    with hosts.agreed():
        resumed = workdir / "weights" if checkpoint.steps(storage.checkpoints) else None
        task, tokenizer_dir = build.make_task(config, dtype, scratch, resumed)
        identity = checkpoint.identity(config.to_dict(), task)
        facts = {"frozen models": identity[checkpoint.FROZEN]}
        if jax.process_count() > 1 and not resumed:
            facts["initial parameters"] = checkpoint.array_hash(task.start or {})
    parallel.check_hosts_are_consistent(facts)
    optimizer_config = optimizer.OptimizerConfig(**config.optimizer)
    tx = optimizer.make_optimizer(optimizer_config, config.steps)
    learning_rate = optimizer.learning_rate(optimizer_config, config.steps)

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Batches: their position is the step of the newest checkpoint                     │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    with hosts.agreed():
        tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir)
        held_out_weights = held_out_examples.held_out_weights(config.held_out_batches)
        with closing(pipeline.batches(held_out_examples, tokenizer, rows=rows)) as batches:
            held_out_batches = [parallel.put_batch(next(batches), mesh) for _ in held_out_weights]
    checkpoints = checkpoint.Checkpoints(
        storage.checkpoints,
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
    abstract = abstract_state(task, tx, mesh)
    frozen = place_frozen(task, mesh, dtype, models=not latent_paths(data))
    if step:
        saved = abstract | abstract_random(task, mesh)
        state = checkpoints.restore(step, saved, identity, untrained=abstract_untrained(task, mesh))
        random = {name: state.pop(name) for name in saved if name not in abstract}
        say(f"resumed at step {step} of {config.steps}")
    else:
        state, random = init_state(task, tx, mesh, seed=config.seed)
    frozen |= random  # untrained parameters that were initialised at random: empty in most runs
    task = dataclasses.replace(task, start=None)  # frees gigabytes of host memory at full size
    sizes = parameter_counts(task.join(state["params"], frozen), state["params"])
    say(f"{sizes}; {parallel.describe(mesh)}; {dtype}")

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Compiled functions                                                               │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    update = jax.jit(
        make_update(
            task,
            tx,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            skip_limit=config.skip_limit,
        ),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), parallel.replicated(mesh)),
    )
    update = parallel.on_mesh(update, mesh)
    rng = jax.random.key(config.seed)
    held_out_losses = parallel.on_mesh(
        jax.jit(make_held_out(task, accumulate=config.accumulate), out_shardings=parallel.replicated(mesh)), mesh
    )

    def held_out() -> dict[str, float]:
        """Returns losses of the EMA on held-out batches, at fixed timesteps with fixed noise."""
        rngs = [jax.random.fold_in(jax.random.key(HELD_OUT_SEED), i) for i in range(len(held_out_batches))]
        values = [held_out_losses(state["ema"], frozen, b, r) for b, r in zip(held_out_batches, rngs)]
        return metrics.mean(values, held_out_weights)

    def export(measured: Mapping[str, float]) -> bool:
        """Writes the EMA as a weights folder. Returns False on all hosts but the first, and if the disk is full."""
        ema = parallel.gather(task.exported(state["ema"], frozen), keep=first)
        if not first:
            return False
        with disk.tolerate_full_disk("weights/") as written:
            task.export(workdir / "weights", ema, measured)
        return bool(written)

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ Loop                                                                             │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    stop = StopRequest(multi_host=jax.process_count() > 1)
    monitor = divergence.DivergenceMonitor(
        workdir / "diverged", config=identity, dtype=dtype.name, limit=config.skip_limit, rows=rows
    )
    tracer = metrics.Profile(workdir / "profile" if profile and first else None, first=step + 3)
    cleanup.callback(tracer.close)
    writer = None
    if first:
        others = sinks.Sinks(config.metrics, workdir, step=step, config=config.to_dict())
        writer = metrics.Metrics(workdir, step=step, sinks=others)
        cleanup.callback(writer.close)
    bar = tqdm(total=config.steps, initial=step, unit="step", disable=not first, dynamic_ncols=True)
    cleanup.callback(bar.close)
    window: list[Mapping[str, jax.Array]] = []
    programs: dict[tuple, float] = {}  # {shapes of a batch: FLOPs of a step}, one per bucket
    peak = flops.peak_flops(mesh, config.peak_tflops)
    last = step >= config.steps
    if last:  # in case the run was killed between its last checkpoint and its last export
        export(held_out())
    timer.resume()
    while not last:
        if tracer.before(step):
            timer.resume()
        with timer.waiting():
            batch = next(batches)
        shapes = tuple((name, x.shape) for name, x in batch.items())
        placed = parallel.put_batch(batch, mesh)
        if compiles := shapes not in programs:
            traced = (task, state["params"], frozen, placed, mesh)
            programs[shapes] = step_flops(*traced, accumulate=config.accumulate) if peak else 0.0
            if data.buckets:
                sizes = ", ".join(f"{name} {shape}" for name, shape in shapes)
                say(f"step {step + 1} compiles program {len(programs)} of {len(data.buckets)}: {sizes}")
        state, losses = update(state, frozen, placed, rng)
        if compiles:  # garbage collection need not visit what tracing allocated: saves 0.2 s every 30 steps
            gc.collect()
            gc.freeze()
        step += 1
        bar.update()
        window.append(losses)
        # Read once per step, because a signal may arrive at any line.
        stopped = step < config.steps and stop.requested(checkpoints, step)
        last = step == config.steps or stopped

        save = step % config.checkpoint_every == 0 or last
        log = step % config.log_every == 0 or save
        monitor.step(step, losses["skipped"], batch, state | random, wait=log)
        timer.step(compiled=compiles, flops=programs[shapes])
        if log:
            applied = int(optimizer.updates_done(state["opt_state"]))
            values = metrics.mean_of_steps(window) | {"learning_rate": float(learning_rate(max(applied - 1, 0)))}
            values |= timer.report(config.batch, peak) | metrics.memory()
            if values["skipped"]:
                say(f"skipped {values['skipped']} of {len(window)} steps up to {step}: loss or gradients not finite")
            window.clear()
            shown = [k for k in values if "loss" in k or k in SHOWN]
            bar.set_postfix({k: f"{values[k]:.3g}" for k in shown}, refresh=False)
            if writer:
                writer.write(step, values)

        if save:  # before the rest, during which the machine may be preempted or run out of memory
            checkpoints.save(step, state | random, identity)
        if stopped:
            checkpoints.settle()
        if save or step % config.held_out_every == 0:
            measured = held_out()
            if writer:
                writer.write(step, {f"held_out/{name}": value for name, value in measured.items()})
        if save:
            checkpoints.measured(step, measured[task.judged_by])
            exported = export(measured)
        if save and exported and config.prompts and (step % config.sample_every == 0 or step == config.steps):
            grid = workdir / "samples" / f"{step:08d}.png"
            base = config.init_from if config.regime == optimizer.ADAPTER else ""
            if write_sample_grid(workdir / "weights", config.stage, config.prompts, grid, base=base):
                writer.picture(step, "samples", grid)
        if save and first:
            storage.push()
        if save or step % config.held_out_every == 0:
            timer.resume()

    # ┌──────────────────────────────────────────────────────────────────────────────────┐
    # │ End                                                                              │
    # └──────────────────────────────────────────────────────────────────────────────────┘
    digest = checkpoint.parameter_hash(task.join(state["params"], frozen))
    saved = checkpoints.settle()
    cleanup.close()
    if not saved:
        raise checkpoint.Unsaved(
            f"the disk is full: the run is at step {step}, but its newest checkpoint is older. Free some space; the "
            "same command resumes from that checkpoint."
        )
    ended = "stopped" if step < config.steps else "finished"
    say(f"{ended} at step {step} of {config.steps}; SHA-256 of the parameters:")
    if first:
        print(digest, flush=True)


def write_sample_grid(weights: Path, stage: str, prompts: Sequence[str], path: Path, *, base: str = "") -> bool:
    """Samples every prompt with seed 0 and the folder's default settings, and writes a PNG with a row for each.

    `weights` is a weights folder, or an adapter's folder if `base` names the weights that it changes. Returns False if
    sampling fails, for example for lack of memory: a sample grid must not end a run.
    """
    try:
        with disk.tolerate_full_disk("samples/") as written:
            model = cascade.load(base, stages=(stage,), loras=[weights]) if base else cascade.load(weights)
            videos = model(list(prompts), stages=(stage,), seed=0)
            contact_sheet(list(videos), list(prompts), path, columns=8)
        return bool(written)
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        logging.error("no sample grid %s (%s: %s). Training continues.", path.name, type(error).__name__, reason)
        return False


def parameter_counts(params: Any, trained: Any) -> str:
    """Returns the number of parameters of the trained network, and how many of them are trained."""
    total, some = (sum(x.size for x in jax.tree.leaves(tree)) / 1e6 for tree in (params, trained))
    return f"{total:.2f} M parameters" + (f", {some:.2f} M trained" if some < total else "")


def say(text: str) -> None:
    """Prints a line above the progress bar, on the first host."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stderr)


class StopRequest:
    """Whether the run should save and stop: after SIGTERM, SIGUSR1, Ctrl-C, or a cluster's notice of preemption.

    If there are several hosts, Orbax makes all of them stop at the same step. A second Ctrl-C stops at once.
    """

    def __init__(self, *, multi_host: bool):
        self._signalled = False
        self._multi_host = multi_host
        if multi_host:  # jax passes a SIGTERM on to all hosts
            signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        else:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True
        signal.signal(number, signal.SIG_DFL)
        logging.warning("%s: saving a checkpoint and stopping", signal.Signals(number).name)

    def requested(self, checkpoints: checkpoint.Checkpoints, step: int) -> bool:
        """Must be called after every step, on every host."""
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
