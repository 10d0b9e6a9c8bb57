"""The compiler's plan of a chip's memory, which it makes long before it is done.

Compiling for a TPU has two parts. The first decides what is computed in which order and which bytes hold it; for a
full-size training step that is minutes of one core. The second writes the machine code of every fused operation: nine
tenths of the time and most of the memory, and nothing comes of it here but the code's size. The compiler knows no way
to stop between the two, but it can be made to write down its plan when it has it (`DUMP`), and its process be ended.
"""

import re
from pathlib import Path
from typing import NamedTuple

DUMP = "xla_dump_to"  # the compiler's option: the folder for what it writes down
PROGRAM = "after_optimizations.txt"  # how the files are called
MEMORY = "after_optimizations-buffer-assignment.txt"
NEXT = "after_optimizations_after_buffer_assignment.txt"  # begun when the others are done, in jax 0.10 and 0.12

ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.M)


class Plan(NamedTuple):
    """Of one program, on one device.

    Attributes:
      memory: bytes {"arguments", "outputs", "donated", "temporary"}, as `compiled.memory_analysis()` counts them;
        "outputs" includes those that take the place of donated arguments. Constants belong to the code.
      program: its instructions, HLO as text.
    """

    memory: dict[str, int]
    program: str


def read(folder: Path) -> Plan | None:
    """The plan that the compiler left in `folder`; None as long as it is not done with it."""
    if not _found(folder, NEXT):
        return None
    return Plan(allocations(_found(folder, MEMORY).read_text()), _found(folder, PROGRAM).read_text())


def allocations(text: str) -> dict[str, int]:
    """The sums of a buffer assignment: see `Plan.memory`."""
    sums = dict.fromkeys(("arguments", "outputs", "donated", "temporary"), 0)
    for size, words in ALLOCATION.findall(text):
        # A colour is another memory than the chip's main one; what is local to a fused operation has no bytes there.
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


def _found(folder: Path, name: str) -> Path | None:
    """A process compiles one program, so there is one file of the kind, or none yet."""
    return next(folder.glob(f"*{name}"), None)
