"""Collectives in the HLO text of a compiled program: how often each kind runs, and its bytes.

The text is a sequence of computations, `%name (...) -> ... {` to `}`; instructions name the computations that they
call. One collective may appear several times under one channel: its start, a part inside a fusion, its end.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)$")
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

    def visit(name: str, times: int) -> None:
        """Counts the collectives of a computation that runs `times` times, and of those that it calls."""
        for one in collected[name]:
            # The compiler writes a reduce-scatter as an all-reduce and a slice, in a computation of this name.
            if one.kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                one = one._replace(kind="reduce-scatter")
            if one.channel not in runs or times > runs[one.channel][1]:
                runs[one.channel] = (one, times)
        for line in bodies[name]:
            trips = _trip_count(line, bodies) if " while(" in line else 1
            for callee in _called(line):
                if callee in bodies:
                    visit(callee, times * trips)

    if entry:
        visit(entry, 1)
    sums = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for one, times in runs.values():
        sums[one.kind]["count"] += times
        sums[one.kind]["bytes"] += times * one.size
    return {kind: row for kind, row in sums.items() if row["count"]}


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
