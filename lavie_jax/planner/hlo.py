"""Collectives in a compiled program's HLO text: how often each kind runs, and how many bytes.

The text is one computation after the other, `%name (...) -> ... {` to `}`; an instruction names those that it calls.
One collective can appear several times, under one channel: begun here, carried on inside a fusion, ended there.
"""

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}

HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)|(?:branch|called)_computations=\{(.*?)\}")
ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class _Collective(NamedTuple):
    kind: str
    channel: str  # or, without one, something that no other has
    size: int


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of one run on one device; bytes are those of the largest array that a collective
    reads or makes. A loop whose number of rounds is not to be seen counts once."""
    bodies, entry = _computations(text)
    found = {name: [c for i, line in enumerate(lines) if (c := _collective(line, f"{name}/{i}"))]
             for name, lines in bodies.items()}  # fmt: skip
    runs: dict[str, tuple[_Collective, int]] = {}

    def visit(name: str, times: int) -> None:
        for one in found[name]:
            # The compiler writes a reduce-scatter as an all-reduce and a slice, in a computation of this name.
            if one.kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                one = one._replace(kind="reduce-scatter")
            if one.channel not in runs or times > runs[one.channel][1]:
                runs[one.channel] = (one, times)
        for line in bodies[name]:
            rounds = _rounds(line, bodies) if " while(" in line else 1
            for callee in _called(line):
                if callee in bodies:
                    visit(callee, times * rounds)

    if entry:
        visit(entry, 1)
    sums = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    for one, times in runs.values():
        sums[one.kind]["count"] += times
        sums[one.kind]["bytes"] += times * one.size
    return {kind: row for kind, row in sums.items() if row["count"]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: its instructions}, the name of the one that is run)."""
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
    if match[2] == "reduce-scatter":  # it makes one part of what it reads
        size *= _group(line)
    return _Collective(kind, channel[1] if channel else where, size)


def _group(line: str) -> int:
    """How many devices take part in each of the groups."""
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


def _rounds(line: str, bodies: dict[str, list[str]]) -> int:
    """Of a `while`: what the compiler wrote down, or the one number that its condition compares with."""
    if known := ROUNDS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    limits = {n for text in bodies.get(condition[1] if condition else "", []) for n in LIMIT.findall(text)}
    return int(limits.pop()) if len(limits) == 1 else 1
