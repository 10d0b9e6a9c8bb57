"""Where metrics go in addition to `metrics.jsonl`: TensorBoard, Weights & Biases, or a function of the user's.

Failures of a sink are logged; they never stop a training.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from absl import logging
from PIL import Image

from lavie_jax import disk
from lavie_jax.errors import UserError, suggest

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # {name of a sink: the package that it needs}


@runtime_checkable
class Sink(Protocol):
    """A place for metrics."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""

    def picture(self, step: int, name: str, png: Path) -> None:
        """Shows a PNG file."""

    def close(self) -> None:
        """Flushes and closes the sink."""


def names(metrics: Sequence[str]) -> list[str]:
    """Returns the names of sinks in `config.metrics`, whose entries may be several names separated by commas.

    Raises:
        UserError: a name is unknown, its package is not installed, or its function cannot be imported.
    """
    found = [name.strip() for entry in metrics for name in entry.split(",")]
    for name in found:
        if ":" in name:
            _function(name)
        elif name not in PACKAGES:
            raise UserError(f"metrics: unknown {name!r}{suggest(name, (*PACKAGES, 'module:function'))}")
        elif importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"metrics: {name} needs a package: pip install {PACKAGES[name]}, or remove it from metrics")
    return found


def _function(name: str) -> Callable[[int, Mapping[str, float]], None]:
    """Imports `module:function`, also from the folder that the program was started in."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's module may fail in any way
        raise UserError(f"metrics: {name} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise UserError(f"metrics: {name} is not a function that takes (step, {{name: value}})")
    return function


class Sinks:
    """The sinks of a run. Failures are logged, and a sink that cannot be opened is left out."""

    def __init__(self, metrics: Sequence[str], workdir: Path, *, step: int, config: Mapping[str, Any]):
        """Opens the sinks that `config.metrics` names; see `names` for errors. The run is at `step`."""
        self._sinks: dict[str, Sink] = {}
        for name in names(metrics):
            with _tolerated(name):
                self._sinks[name] = _open(name, workdir, step, config)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records the values of a step."""
        for name, sink in self._sinks.items():
            with _tolerated(name):
                sink.scalars(step, values)

    def picture(self, step: int, name: str, png: Path) -> None:
        """Shows a PNG file."""
        for where, sink in self._sinks.items():
            with _tolerated(where):
                sink.picture(step, name, png)

    def close(self) -> None:
        """Flushes and closes all sinks."""
        for name, sink in self._sinks.items():
            with _tolerated(name):
                sink.close()


@contextlib.contextmanager
def _tolerated(name: str) -> Iterator[None]:
    """Logs errors of a sink."""
    try:
        yield
    except Exception as error:  # of the network, the disk, the package or the user's function
        reason = "the disk is full" if disk.is_full(error) else f"{type(error).__name__}: {error}"
        logging.error("metrics were not written to %s (%s). Training continues.", name, " ".join(reason.split()))


def _open(name: str, workdir: Path, step: int, config: Mapping[str, Any]) -> Sink:
    if ":" in name:
        return FunctionSink(_function(name))
    if name == "wandb":
        return WandbSink(workdir, config)
    return EventFiles(workdir / "tensorboard", step=step)


class FunctionSink:
    """Calls `function(step, {name: value})`. Pictures are left out."""

    def __init__(self, function: Callable[[int, Mapping[str, float]], None]):
        self._function = function

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Calls the function."""
        self._function(step, dict(values))

    def picture(self, step: int, name: str, png: Path) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class WandbSink:
    """A run of Weights & Biases, which a resumed training continues.

    Its environment variables apply, such as WANDB_PROJECT and WANDB_MODE=offline. `workdir/wandb_run.json` has its id.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        import wandb  # ty: ignore[import-not-found]  # an extra

        self._image = wandb.Image
        file = workdir / "wandb_run.json"
        run_id = json.loads(file.read_text())["id"] if file.is_file() else None
        self._run = wandb.init(
            dir=str(workdir), name=workdir.name, id=run_id, resume=None if run_id is None else "allow",
            config=json.loads(json.dumps(config)),
        )  # fmt: skip
        file.write_text(json.dumps({"id": self._run.id}) + "\n")
        # wandb's own steps may not decrease, as those of a resumed run do
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values against the step."""
        self._run.log({"step": step, **values})

    def picture(self, step: int, name: str, png: Path) -> None:
        """Uploads a PNG file."""
        self._run.log({"step": step, name: self._image(str(png))})

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


class EventFiles:
    """Writes event files in `directory` for `tensorboard --logdir`, next to those of earlier parts of the run."""

    def __init__(self, directory: Path, *, step: int):
        # Imported here: only runs that write event files need the package.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._open = lambda: EventFileWriter(str(directory), flush_secs=10)
        self._writer = self._open()
        # TensorBoard hides points of a killed run from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to the curve of each name."""
        self._add(step, [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def picture(self, step: int, name: str, png: Path) -> None:
        """Adds a PNG file."""
        with Image.open(png) as opened:
            width, height = opened.size
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png.read_bytes())
        self._add(step, [self._summary.Value(tag=name, image=image)])

    def close(self) -> None:
        """Flushes and closes the files."""
        self._writer.close()

    def _add(self, step: int, values: list) -> None:
        try:
            self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
        except OSError:  # a full disk ended its thread: continue in a new file
            self._writer = self._open()
            raise
