"""Measures a program in a subprocess, which is killed as soon as the compiler has planned its memory."""

import multiprocessing
import multiprocessing.connection
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lavie_jax.errors import UserError
from lavie_jax.planner import chips, measure, memory_plan
from lavie_jax.planner.programs import Program
from lavie_jax.planner.report import Row

Make = Callable[[list[jax.Device]], Program]

POLL = 0.2  # seconds


def measure_in_subprocess(make: Make, topology: str, slices: int = 1, *, code: bool) -> Row:
    """Returns a row of `measure`.

    Args:
        make: devices -> the program; picklable.
        topology: see `chips.parse`.
        slices: number of slices of that topology.
        code: compile completely; otherwise the row lacks what is known only at the end.

    Raises:
        UserError: raised by `make` or `chips.devices`; the process was killed, most likely for lack of memory.
        RuntimeError: the process failed; its traceback is on stderr.
    """
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory(prefix="planner-") as folder:
        child = multiprocessing.get_context("spawn").Process(
            target=_work, args=(make, topology, slices, None if code else folder, theirs), daemon=True
        )  # fmt: skip
        child.start()
        theirs.close()
        try:
            return _row(child, ours, Path(folder))
        finally:
            child.kill()
            child.join()


def _row(child: Any, pipe: multiprocessing.connection.Connection, folder: Path) -> Row:
    traced, begin = None, 0.0
    while True:
        if pipe.poll(POLL):
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise _ended(child) from None
            if kind == "refused":
                raise UserError(value)
            if kind == "row":
                return value
            traced, begin = value, time.perf_counter()
        elif traced is not None and (plan := memory_plan.read(folder)) is not None:
            return measure.planned(traced, plan, begin)


def _work(
    make: Make, topology: str, slices: int, folder: str | None, pipe: multiprocessing.connection.Connection
) -> None:
    try:
        lowered, row = measure.trace(make(chips.devices(topology, slices)))
    except UserError as error:
        pipe.send(("refused", str(error)))
        return
    pipe.send(("traced", row))
    pipe.send(("row", measure.compiled(row, lowered, dump=folder)))


def _ended(child: Any) -> Exception:
    child.join()
    if child.exitcode == -9:
        return UserError(
            "the compiling process was killed, most likely because this machine has too little memory: close other "
            "programs, or leave out --code"
        )
    return RuntimeError(f"the compiling process ended with exit status {child.exitcode}")
