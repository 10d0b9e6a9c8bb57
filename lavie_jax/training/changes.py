"""Reports what a resumed run changes: fields that differ from the checkpoint's config, and the consequences."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from lavie_jax.training.optimizer import OptimizerConfig, learning_rate

# Fields, or groups of them, that change neither parameters nor data. Weights are compared by their hashes.
HARMLESS = (
    "init_from", "vae_from", "text_from", "inflate", "dtype", "remat", "attention_kernel", "skip_limit", "cpu_devices",
    "distributed", "workers", "peak_tflops", "log_every", "held_out_every", "held_out_batches", "checkpoint_every",
    "keep_checkpoints", "keep_best", "keep_every", "sample_every", "prompts", "metrics", "mesh", "sampling",
)  # fmt: skip


def describe(step: int, before: Mapping[str, Any], now: Mapping[str, Any], *, updates: int) -> str | None:
    """Returns a line about a run that resumes with another config, or None if nothing of consequence differs.

    Args:
        step: the step that the run resumes at.
        before: the config that the checkpoint was written with, as JSON values.
        now: the config of this run, as JSON values.
        updates: number of updates done, by which the learning rate is scheduled.
    """
    old, new = (flatten_dict({k: v for k, v in x.items() if k not in HARMLESS}, sep=".") for x in (before, now))
    changed = [name for name in new if name in old and old[name] != new[name]]
    if not changed:
        return None
    fields = ", ".join(f"{name} = {_short(new[name])} (was {_short(old[name])})" for name in changed)
    parts = [f"resuming at step {step} with another config: {fields}.", *_rate(before, now, updates)]
    return " ".join([*parts, *_position(step, before.get("batch"), now.get("batch"))])


def _rate(before: Mapping[str, Any], now: Mapping[str, Any], updates: int) -> list[str]:
    if not all("optimizer" in config and "steps" in config for config in (before, now)):
        return []
    old, new = (
        float(learning_rate(OptimizerConfig(**config["optimizer"]), config["steps"])(updates))
        for config in (before, now)
    )
    return [f"The learning rate of the next update is {new:.3g} instead of {old:.3g}."] if old != new else []


def _position(step: int, old: int | None, new: int | None) -> list[str]:
    """The position in the data is the step, so that another batch moves it."""
    if old is None or new is None or old == new:
        return []
    seen, start = step * old, step * new
    what = f"{seen - start} of them come again" if new < old else f"the next {start - seen} are left out"
    return [f"The position in the data is counted in steps: {seen} examples were seen, and {what}."]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
