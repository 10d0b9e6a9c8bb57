"""The compiler's plan of a chip's memory, which exists long before compiling ends.

Compiling for a TPU has two phases. The first one schedules operations and assigns their buffers; a full-size training
step takes minutes of one core. The second one generates machine code: nine tenths of the time and most of the memory,
of which the planner would only use the code's size. The compiler cannot be stopped between the two, but an option makes
it dump its plan after the first (`DUMP`), and its process can be killed then.
"""

import re
from pathlib import Path
from typing import NamedTuple

DUMP = "xla_dump_to"  # the compiler's option for the dump's folder
PROGRAM = "after_optimizations.txt"  # names of the files in it end in these
MEMORY = "after_optimizations-buffer-assignment.txt"
NEXT = "after_optimizations_after_buffer_assignment.txt"  # begun when the others are complete, in jax 0.10 and 0.12

ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.M)


class MemoryPlan(NamedTuple):
    """The plan of one program, on one device.

    Attributes:
        memory: bytes {"arguments", "outputs", "donated", "temporary"}, as `compiled.memory_analysis()` counts them;
            "outputs" includes outputs that reuse donated arguments. Constants count as code.
        program: the program as HLO text.
    """

    memory: dict[str, int]
    program: str


def read(folder: Path) -> MemoryPlan | None:
    """Reads the plan that the compiler dumped into `folder`; None while it is incomplete."""
    if not _file(folder, NEXT):
        return None
    return MemoryPlan(allocations(_file(folder, MEMORY).read_text()), _file(folder, PROGRAM).read_text())


def allocations(text: str) -> dict[str, int]:
    """Sums up a buffer assignment: see `MemoryPlan.memory`."""
    sums = dict.fromkeys(("arguments", "outputs", "donated", "temporary"), 0)
    for size, words in ALLOCATION.findall(text):
        # Buffers with a colour are not in HBM, nor are those local to a fused operation.
        if re.search(r"\b(color [1-9]|thread-local|constant)\b", words):
            continue
        parameter, result = "parameter" in words, "live-out" in words
        for kind, there in (
            ("arguments", parameter),
            ("outputs", result),
            ("donated", parameter and result),
            ("temporary", not parameter and not result),
        ):
            sums[kind] += int(size) * there
    return sums


def _file(folder: Path, name: str) -> Path | None:
    """Returns the file whose name ends so; a process compiles one program, so there is one, or none yet."""
    return next(folder.glob(f"*{name}"), None)
