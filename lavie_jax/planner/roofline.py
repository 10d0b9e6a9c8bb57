"""What bounds a step's time: arithmetic, memory, or links between chips. An estimate from below, no measurement."""

from typing import Any, NamedTuple

from lavie_jax.planner.chips import Chip


class Bound(NamedTuple):
    """Seconds that one step takes at least, by each of three reasons."""

    arithmetic: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The step's, if all three overlap without a gap."""
        return max(self)

    @property
    def reason(self) -> str:
        """Which of the three it is."""
        return self._fields[self.index(max(self))]


def bound(row: dict[str, Any], chip: Chip) -> Bound:
    """Of a program that compiled, or whose memory was planned (`measure.py`).

    Arithmetic counts the operations that were traced; memory what the compiler says it reads and writes, which leaves
    out rounds of loops, but at least each argument and result once and each temporary byte twice; links the
    collectives' bytes, those of an all-reduce twice, as if all links of a chip were busy at once.
    """
    least = row["arguments"] + row["outputs"] + 2 * row["temporary"]
    traffic = max(row.get("compiler_traffic", 0), least)
    moved = sum((2 if kind == "all-reduce" else 1) * one["bytes"] for kind, one in row["collectives"].items())
    return Bound(row["operations"] / chip.flops, traffic / chip.memory_bandwidth, moved / chip.link_bandwidth)
