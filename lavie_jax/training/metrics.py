"""Numbers and pictures of a run: `metrics.jsonl` always, TensorBoard event files when asked for."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image


class Metrics:
    """Appends to `directory/metrics.jsonl`, and to event files in `directory/tensorboard`.

    Lines after `step`, left by a run that was killed after its last checkpoint, are dropped: the file
    is one curve.
    """

    def __init__(self, directory: Path, *, step: int, tensorboard: bool):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        if path.exists():
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
            partial = path.with_name(f"{path.name}.new")
            partial.write_text("".join(kept))
            partial.replace(path)
        self._jsonl = path.open("a")
        self._events = EventFiles(directory / "tensorboard", step=step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line `{"step": ..., name: value, ...}`."""
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._jsonl.flush()
        if self._events:
            self._events.scalars(step, values)

    def picture(self, step: int, name: str, png: Path) -> None:
        """Shows a PNG in TensorBoard."""
        if self._events:
            self._events.picture(step, name, png)

    def close(self) -> None:
        self._jsonl.close()
        if self._events:
            self._events.close()


def _lines(path: Path) -> Iterator[str]:
    """The complete lines: the last one may have been cut by a kill."""
    with path.open() as file:
        yield from (line for line in file if line.endswith("\n"))


class EventFiles:
    """Event files in `directory`, which `tensorboard --logdir` shows; those of an earlier part of the run stay."""

    def __init__(self, directory: Path, *, step: int):
        # Here: only runs that ask for event files need the package.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory), flush_secs=10)
        # TensorBoard hides what a killed run wrote from here on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def picture(self, step: int, name: str, png: Path) -> None:
        with Image.open(png) as opened:
            width, height = opened.size
        image = self._summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=png.read_bytes()
        )
        self._add(step, [self._summary.Value(tag=name, image=image)])

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, values: list) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))


def finite(values: Mapping[str, float]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(v) for v in values.values())
