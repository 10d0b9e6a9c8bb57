"""Numbers and pictures of a run: `metrics.jsonl` always, TensorBoard event files when asked for.

An event file is a TFRecord of `Event` protocol buffers, simple enough to write by hand: TensorBoard
(`pip install tensorboard`, to look at them) and TensorFlow are not needed to train.
Formats: tensorflow/core/util/event.proto, framework/summary.proto, lib/io/record_writer.h.
"""

import json
import math
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path


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
        self._events = EventFile(directory / "tensorboard") if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line `{"step": ..., name: value, ...}`."""
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._jsonl.flush()
        if self._events:
            self._events.scalars(step, values)

    def picture(self, step: int, name: str, png: Path) -> None:
        """Shows a PNG in TensorBoard."""
        if self._events:
            self._events.picture(step, name, png.read_bytes())

    def close(self) -> None:
        self._jsonl.close()
        if self._events:
            self._events.close()


def _lines(path: Path) -> Iterator[str]:
    """The complete lines: the last one may have been cut by a kill."""
    with path.open() as file:
        yield from (line for line in file if line.endswith("\n"))


class EventFile:
    """A TensorBoard event file in `directory`, named so that TensorBoard finds it."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / f"events.out.tfevents.{int(time.time())}.{os.getpid()}").open("wb")
        self._event(0, _bytes(3, b"brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = b"".join(
            _bytes(1, _bytes(1, name.encode()) + _key(2, 5) + struct.pack("<f", value))
            for name, value in values.items()
        )
        self._event(step, _bytes(5, summary))

    def picture(self, step: int, name: str, png: bytes) -> None:
        width, height = struct.unpack(">II", png[16:24])  # a PNG begins with its header chunk
        image = _number(1, height) + _number(2, width) + _number(3, 3) + _bytes(4, png)
        self._event(step, _bytes(5, _bytes(1, _bytes(1, name.encode()) + _bytes(4, image))))

    def close(self) -> None:
        self._file.close()

    def _event(self, step: int, what: bytes) -> None:
        event = _key(1, 1) + struct.pack("<d", time.time()) + _number(2, step) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()


# ---- protocol buffers: field key, varint, length-delimited ----


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


# ---- CRC-32C (Castagnoli), the checksum of TFRecords ----


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def finite(values: Mapping[str, float]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(v) for v in values.values())
