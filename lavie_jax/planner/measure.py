"""One program -> what compiling it for its devices tells: bytes, operations, collectives. Nothing is run."""

import re
import time
from typing import Any

import jax

from lavie_jax.planner.hlo import collectives
from lavie_jax.planner.programs import Program, bytes_per_chip
from lavie_jax.training.operations import count_operations

OUT_OF_MEMORY = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM|[Uu]sed ([\d.]+)([KMGT]) of \S+ hbm")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def measure(program: Program) -> dict[str, Any]:
    """Everything per chip, bytes as whole numbers; see `planner/report.py` for what is made of it.

    A program that does not fit has no "temporary" and the like, only `needs`, the compiler's own sum.
    """
    begin = time.perf_counter()
    traced = program.trace()
    operations = count_operations(traced.jaxpr) / program.mesh.size
    lowered = traced.lower()
    seconds = {"trace": round(time.perf_counter() - begin, 1)}
    row = {
        "program": program.name,
        "note": program.note,
        "chips": program.mesh.size,
        "mesh": dict(program.mesh.shape),
        "held": {name: bytes_per_chip(tree) for name, tree in program.held.items()},
        "beside": bytes_per_chip(program.beside),
        "operations": operations,
    }
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds["compile"] = round(time.perf_counter() - begin, 1)
        return row | {"fits": False, "needs": bytes_needed(str(error)), "seconds": seconds}
    seconds["compile"] = round(time.perf_counter() - begin, 1)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    # What a program does not use is left out of its arguments, and stays on the chip all the same: half of a VAE.
    unused = max(0, bytes_per_chip(program.arguments) - parts["arguments"])
    total = parts["arguments"] + parts["outputs"] - parts["donated"] + parts["temporary"] + parts["code"]
    return row | parts | {
        "fits": True,
        "needs": total,
        "beside": row["beside"] + unused,
        "compiler_operations": cost.get("flops", 0.0),
        "compiler_traffic": cost.get("bytes accessed", 0.0),
        "collectives": collectives(compiled.as_text()),
        "seconds": seconds,
    }  # fmt: skip


def bytes_needed(message: str) -> int | None:
    """What the compiler says that a program wants, in its message that this is too much; None if it does not say."""
    found = OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    number, unit = (group for group in found.groups() if group is not None)
    return int(float(number) * UNITS[unit])
