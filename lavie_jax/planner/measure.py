"""One program -> what compiling it for its devices tells: bytes, operations, collectives. Nothing is run.

A row is a dict of numbers per chip, bytes as whole numbers; `planner/report.py` has what is made of it. A program that
does not fit may have no "temporary" and the like, only `needs`, the compiler's own sum.
"""

import re
import time

import jax

from lavie_jax.planner import plan
from lavie_jax.planner.hlo import collectives
from lavie_jax.planner.programs import Program, bytes_per_chip
from lavie_jax.planner.report import Row
from lavie_jax.training.operations import count_operations

OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM|[Uu]sed ([\d.]+)([KMGT]) of \S+ hbm")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def trace(program: Program) -> tuple[jax.stages.Lowered, Row]:
    """The program as the compiler takes it, and what is known before it has a look at it."""
    begin = time.perf_counter()
    traced = program.trace()
    operations = count_operations(traced.jaxpr) / program.mesh.size
    lowered = traced.lower()
    return lowered, {
        "program": program.name,
        "note": program.note,
        "chips": program.mesh.size,
        "mesh": dict(program.mesh.shape),
        "held": {name: bytes_per_chip(tree) for name, tree in program.held.items()},
        "given": bytes_per_chip(program.arguments),
        "beside": bytes_per_chip(program.beside),
        "operations": operations,
        "seconds": {"trace": round(time.perf_counter() - begin, 1)},
    }


def compiled(row: Row, lowered: jax.stages.Lowered, *, dump: str | None = None) -> Row:
    """The row of `trace`, and all that compiling tells. Its plan is written into the folder `dump` on the way."""
    begin = time.perf_counter()
    try:
        program = lowered.compile(compiler_options={plan.DUMP: dump} if dump else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _timed(row, "compile", begin) | {"fits": False, "needs": bytes_needed(str(error))}
    memory, cost = program.memory_analysis(), program.cost_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return _with_memory(_timed(row, "compile", begin), parts, program.as_text()) | {
        "compiler_operations": cost.get("flops", 0.0),
        "compiler_traffic": cost.get("bytes accessed", 0.0),
    }


def planned(row: Row, found: plan.Plan, begin: float) -> Row:
    """The row of `trace`, and what the compiler's plan tells: no size of the code, no counts of its own."""
    return _with_memory(_timed(row, "plan", begin), found.memory, found.program)


def _timed(row: Row, part: str, begin: float) -> Row:
    return row | {"seconds": row["seconds"] | {part: round(time.perf_counter() - begin, 1)}}


def _with_memory(row: Row, parts: dict[str, int], text: str) -> Row:
    # What a program does not use is left out of its arguments, and stays on the chip all the same: half of a VAE.
    unused = max(0, row["given"] - parts["arguments"])
    taken = sum(parts[name] for name in ("arguments", "outputs", "temporary")) + parts.get("code", 0)
    return row | parts | {
        "fits": True,
        "needs": taken - parts["donated"],
        "beside": row["beside"] + unused,
        "collectives": collectives(text),
    }  # fmt: skip


def bytes_needed(message: str) -> int | None:
    """What the compiler says that a program wants, in its message that this is too much; None if it does not say."""
    found = OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    number, unit = (group for group in found.groups() if group is not None)
    return int(float(number) * UNITS[unit])
