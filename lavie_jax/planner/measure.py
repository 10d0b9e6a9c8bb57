"""Compiles a program for its devices and measures bytes, FLOPs and collectives. Nothing is run.

A row is a dict of values per chip, bytes as integers; `planner/report.py` prints it. The row of a program that does not
fit may have only `needs`, the compiler's own sum, instead of "temporary" and the like.
"""

import re
import time

import jax

from lavie_jax.flops import count_flops
from lavie_jax.planner import hlo, memory_plan
from lavie_jax.planner.programs import Program, bytes_per_chip
from lavie_jax.planner.report import Row

OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM|[Uu]sed ([\d.]+)([KMGT]) of \S+ hbm")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def trace(program: Program) -> tuple[jax.stages.Lowered, Row]:
    """Lowers a program. Returns it with the part of its row that is known before compiling."""
    begin = time.perf_counter()
    traced = program.trace()
    flops = count_flops(traced.jaxpr) / program.mesh.size
    lowered = traced.lower()
    return lowered, {
        "program": program.name,
        "note": program.note,
        "chips": program.mesh.size,
        "mesh": dict(program.mesh.shape),
        "held": {name: bytes_per_chip(tree) for name, tree in program.held.items()},
        "given": bytes_per_chip(program.arguments),
        "beside": bytes_per_chip(program.beside),
        "flops": flops,
        "seconds": {"trace": round(time.perf_counter() - begin, 1)},
    }


def compiled(row: Row, lowered: jax.stages.Lowered, *, dump: str | None = None) -> Row:
    """Compiles a program and completes its row; with `dump`, the compiler writes its memory plan to that folder."""
    begin = time.perf_counter()
    try:
        program = lowered.compile(compiler_options={memory_plan.DUMP: dump} if dump else None)
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
        "compiler_flops": cost.get("flops", 0.0),
        "compiler_traffic": cost.get("bytes accessed", 0.0),
    }


def planned(row: Row, plan: memory_plan.MemoryPlan, begin: float) -> Row:
    """Completes the row of `trace` from a memory plan, without the size of the code and the compiler's own counts."""
    return _with_memory(_timed(row, "plan", begin), plan.memory, plan.program)


def _timed(row: Row, part: str, begin: float) -> Row:
    return row | {"seconds": row["seconds"] | {part: round(time.perf_counter() - begin, 1)}}


def _with_memory(row: Row, parts: dict[str, int], text: str) -> Row:
    # Unused arguments, such as half of a VAE, are not counted as arguments, but stay on the chip.
    unused = max(0, row["given"] - parts["arguments"])
    taken = sum(parts[name] for name in ("arguments", "outputs", "temporary")) + parts.get("code", 0)
    return row | parts | {
        "fits": True,
        "needs": taken - parts["donated"],
        "beside": row["beside"] + unused,
        "collectives": hlo.collectives(text),
        "program_flops": hlo.flops(text),
    }  # fmt: skip


def bytes_needed(message: str) -> int | None:
    """Parses the memory need from the compiler's out-of-memory message; None if it is not in the message."""
    match = OUT_OF_MEMORY.search(message)
    if match is None:
        return None
    number, unit = (group for group in match.groups() if group is not None)
    return int(float(number) * UNITS[unit])
