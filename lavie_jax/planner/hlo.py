"""Collectives and FLOPs in the HLO text of a compiled program, which is the program of one device.

The text is a sequence of computations, `%name (...) -> ... {` to `}`; instructions name the computations that they
call. One collective may appear several times under one channel: its start, a part inside a fusion, its end.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)$")
RESULT = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
OPERAND = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)|(?:branch|called)_computations=\{(.*?)\}")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class _Collective(NamedTuple):
    kind: str
    channel: str  # or a unique string if it has none
    size: int


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Returns {kind: {"count", "bytes"}} of one run on one device.

    Bytes are those of the largest array that a collective reads or writes. A loop of unknown trip count counts once.
    """
    bodies, entry = _computations(text)
    collected = {name: [c for i, line in enumerate(lines) if (c := _collective(line, f"{name}/{i}"))]
                 for name, lines in bodies.items()}  # fmt: skip
    runs: dict[str, tuple[_Collective, int]] = {}
    for name, times in _calls(bodies, entry):
        for one in collected[name]:
            # The compiler writes a reduce-scatter as an all-reduce and a slice, in a computation of this name.
            if one.kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                one = one._replace(kind="reduce-scatter")
            if one.channel not in runs or times > runs[one.channel][1]:
                runs[one.channel] = (one, times)
    sums = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for one, times in runs.values():
        sums[one.kind]["count"] += times
        sums[one.kind]["bytes"] += times * one.size
    return {kind: row for kind, row in sums.items() if row["count"]}


def flops(text: str) -> float:
    """Returns the FLOPs of matrix products, convolutions and attention kernels of one run on one device.

    Unlike a share of the traced program, they include what the compiler computes on several devices, and the padding of
    what the devices do not divide. A multiply-add is 2.
    """
    bodies, entry = _computations(text)
    each = {name: _products(lines) for name, lines in bodies.items()}
    return sum(times * each[name] for name, times in _calls(bodies, entry))


def _calls(bodies: dict[str, list[str]], entry: str) -> Iterator[tuple[str, int]]:
    """Yields every call of a computation, as its name and how many times it runs."""

    def visit(name: str, times: int) -> Iterator[tuple[str, int]]:
        """Yields a computation that runs `times` times, and all that it calls."""
        yield name, times
        for line in bodies[name]:
            trips = _trip_count(line, bodies) if " while(" in line else 1
            for callee in _called(line):
                if callee in bodies:
                    yield from visit(callee, times * trips)

    return visit(entry, 1) if entry else iter(())


def _products(lines: list[str]) -> float:
    """Returns the FLOPs of the instructions of a computation, without those that it calls."""
    shapes = {match[1]: _shape(match[2]) for line in lines if (match := RESULT.match(line))}
    total = 0.0
    for line in lines:
        match = INSTRUCTION.match(line)
        if match is None or match[2] not in ("convolution", "dot", "custom-call"):
            continue
        result, operands = (
            _shape(match[1]),
            [shapes.get(name, ()) for name in OPERAND.findall(match[3].partition(")")[0])],
        )
        if match[2] == "convolution":
            total += _convolution(line, result, *operands[:2])
        elif match[2] == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
            axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
            total += 2.0 * math.prod(result) * math.prod(operands[0][axis] for axis in axes)
        elif "tpu_custom_call" in line and "flash_attention" in line:
            batch, heads, queries, width = operands[0]
            total += 4.0 * batch * heads * queries * operands[1][2] * width
    return total


def _convolution(line: str, result: tuple[int, ...], x: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """Returns the FLOPs of a convolution, without the multiplications by zeros of its padding and dilation.

    On TPUs matrix products are convolutions too. Batches of them have a dilated dimension for each batch axis.
    """
    x_labels, kernel_labels, result_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line).groups()
    window = dict(re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{(.*?)\}", line) or ["", ""])[1]))
    spatial = sorted(label for label in kernel_labels if label.isdigit())
    options = {name: text.split("x") for name, text in window.items()}
    total = 2.0 * result[result_labels.index("b")] * result[result_labels.index("f")]
    total *= kernel[kernel_labels.index("i")]
    for i, label in enumerate(spatial):
        stride, spread, dilation = (
            int(options[n][i]) if n in options else 1 for n in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(options["pad"][i].partition("_")[0]) if "pad" in options else 0
        size = x[x_labels.index(label)]
        at = np.arange(result[result_labels.index(label)])[:, None] * stride - low
        at = at + np.arange(kernel[kernel_labels.index(label)]) * dilation
        total *= int(((at >= 0) & (at < (size - 1) * spread + 1) & (at % spread == 0)).sum())
    return total


def _shape(text: str) -> tuple[int, ...]:
    """The shape of an instruction's result; of its first array if there are several."""
    match = ARRAY.search(text)
    return tuple(int(n) for n in match[2].split(",") if n) if match else ()


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns {name: its instructions}, and the name of the entry computation."""
    bodies, entry, name = {}, "", ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _collective(line: str, where: str) -> _Collective | None:
    match = INSTRUCTION.match(line)
    if match is None:
        return None
    kind = match[2].removesuffix("-start")
    if kind not in KINDS:
        return None
    channel = re.search(r"channel_id=(\d+)", line)
    arrays = ARRAY.findall(match[1]) or [("pred", "0")]
    size = max(BYTES.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)
    if match[2] == "reduce-scatter":  # its result is one part of what it reads
        size *= _group(line)
    return _Collective(kind, channel[1] if channel else where, size)


def _group(line: str) -> int:
    """Returns the number of devices in each of the groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    return 1


def _called(line: str) -> list[str]:
    return [name.strip().lstrip("%") for one, many in CALLED.findall(line) for name in (one or many).split(",")]


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns the trip count of a `while`: the compiler's own, or the only constant in its condition."""
    if known := TRIP_COUNT.search(line):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    limits = {n for text in bodies.get(condition[1] if condition else "", []) for n in LIMIT.findall(text)}
    return int(limits.pop()) if len(limits) == 1 else 1
