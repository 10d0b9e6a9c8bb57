"""Metrics of a run: `metrics.jsonl` and the sinks that are configured, timing of steps, profiles."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lavie_jax import disk
from lavie_jax.errors import UserError
from lavie_jax.training.sinks import Sinks


class Metrics:
    """Appends to `directory/metrics.jsonl`, and writes to `sinks` (`training/sinks.py`).

    Lines after `step`, written by a run that was killed after its last checkpoint, are removed.
    """

    def __init__(self, directory: Path, *, step: int, sinks: Sinks | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        if path.exists():
            kept = [line for line in _lines(path) if _step(line, path) <= step]
            partial = path.with_name(f"{path.name}.new")
            partial.write_text("".join(kept))
            partial.replace(path)
        self._jsonl = path.open("a")
        self._sinks = sinks

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line `{"step": ..., name: value, ...}`."""
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        with disk.tolerate_full_disk("metrics.jsonl"):  # the lines stay buffered
            self._jsonl.flush()
        if self._sinks:
            self._sinks.scalars(step, values)

    def picture(self, step: int, name: str, png: Path) -> None:
        """Shows a PNG in the sinks."""
        if self._sinks:
            self._sinks.picture(step, name, png)

    def close(self) -> None:
        """Flushes and closes the files."""
        with disk.tolerate_full_disk("metrics.jsonl"):
            self._jsonl.close()
        if self._sinks:
            self._sinks.close()


def _lines(path: Path) -> Iterator[str]:
    """Yields the complete lines: a kill may have cut the last one."""
    with path.open() as file:
        yield from (line for line in file if line.endswith("\n"))


def _step(line: str, path: Path) -> int:
    """Returns the step of a line. Raises UserError for one that no run wrote."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a line that is not of a run, {line.strip()[:60]!r}: move the file away") from error


def mean(rows: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Returns the (weighted) mean of each value over the rows, {} without rows; waits for the devices."""
    rows = jax.device_get(rows)
    if weights is not None and len(set(weights)) == 1:
        weights = None  # the plain mean rounds differently
    return {name: float(np.average([row[name] for row in rows], weights=weights)) for name in rows[0]} if rows else {}


def mean_of_steps(rows: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Returns means over the steps that were not skipped, and the number of skipped steps; waits for the devices."""
    rows = jax.device_get(rows)
    good = [{name: value for name, value in row.items() if name != "skipped"} for row in rows if not row["skipped"]]
    return {**mean(good), "skipped": len(rows) - len(good)}


class StepTimer:
    """Measures the time spent in steps, in waiting for data, and in everything else.

    Devices run while Python prepares the next step, so the time of a step is that between two calls.
    """

    def __init__(self):
        self._born = self._mark = time.monotonic()
        self._in_steps, self._waiting = 0.0, 0.0
        self._clear()

    def _clear(self) -> None:
        self._steps: list[float] = []
        self._waited, self._flops = 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Encloses the wait for a batch."""
        start = time.monotonic()
        yield
        self._waiting += time.monotonic() - start

    def step(self, *, compiled: bool, flops: float) -> None:
        """Must be called after each step, with its FLOPs. Steps that `compiled` a program do not count as training."""
        now = time.monotonic()
        if not compiled:
            self._flops += flops
            self._steps.append(now - self._mark)
            self._in_steps += now - self._mark
            self._waited += self._waiting
        self._mark, self._waiting = now, 0.0

    def resume(self) -> None:
        """Must be called after other work between two steps: checkpoints, samples, held-out losses."""
        self._mark = time.monotonic()

    def report(self, batch: int, peak: float) -> dict[str, float]:
        """Returns averages since the last report, and `goodput`, the share of wall time spent in steps since the start.

        Args:
            batch: clips of a step.
            peak: peak FLOP/s of the devices, or 0 if unknown.
        """
        values = {"goodput": self._in_steps / (time.monotonic() - self._born)}
        if self._steps:
            total = sum(self._steps)
            values |= {
                "clips_per_second": batch * len(self._steps) / total,
                "step_seconds_p50": float(np.percentile(self._steps, 50)),
                "step_seconds_p95": float(np.percentile(self._steps, 95)),
                "data_wait": self._waited / total,
            }
            if peak:
                values["mfu"] = self._flops / total / peak
        self._clear()
        return values


def memory() -> dict[str, float]:
    """Returns the peak memory use of this host's devices, or {} if they do not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [device["peak_bytes_in_use"] for device in stats if "peak_bytes_in_use" in device]
    return {"memory_gib": max(used) / 2**30} if used else {}


class Profile:
    """Traces a few steps for TensorBoard's profiler and Perfetto, into `directory`; None = no trace."""

    def __init__(self, directory: Path | None, *, first: int, steps: int = 5):
        self._directory, self._first, self._end = directory, first, first + steps
        self._running = False

    def before(self, step: int) -> bool:
        """Must be called before each step. Returns True if it spent time starting or writing the trace."""
        if self._directory and step == self._first:
            settings = jax.profiler.ProfileOptions()
            settings.python_tracer_level = 0  # tracing every Python call takes minutes to write
            jax.profiler.start_trace(self._directory, profiler_options=settings)
            self._running = True
            return True
        if self._running and step == self._end:
            self.close()
            return True
        return False

    def close(self) -> None:
        """Writes the trace."""
        if self._running:
            self._running = False
            with disk.tolerate_full_disk("profile/"):
                jax.profiler.stop_trace()
