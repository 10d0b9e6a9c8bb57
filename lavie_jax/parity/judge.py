"""Runs a case and compares its outputs: norm(ours - golden) / norm(golden) of the least accurate output."""

import dataclasses
import math
import time

import jax
import numpy as np

from lavie_jax.errors import UserError, suggest
from lavie_jax.parity.cases import Arrays, Case, first_line
from lavie_jax.parity.kinds import RUN

BOUND, TRAJECTORY_BOUND = 1e-5, 1e-4  # errors grow along the trajectory of a sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a case, printed as its line of the report."""

    name: str
    error: float  # NaN when nothing could be compared
    bound: float
    seconds: float
    problem: str  # empty when the case is reproduced

    def __str__(self) -> str:
        verdict = f"FAIL: {self.problem}" if self.problem else "ok"
        return f"{self.name:28} {self.error:8.1e}  bound {self.bound:.0e} {self.seconds:7.1f} s  {verdict}"


def relative_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Returns norm(ours - golden) / norm(golden), over all values."""
    golden = golden.astype(np.float64)
    return float(np.linalg.norm(ours - golden) / max(np.linalg.norm(golden), np.finfo(np.float64).tiny))


def judge(case: Case) -> Result:
    """Runs a case and compares every stored output. An error becomes the result's `problem`."""
    start, error, problem = time.perf_counter(), math.nan, ""
    bound = TRAJECTORY_BOUND if case.kind.endswith("_sample") else BOUND
    try:
        if case.kind not in RUN:
            raise UserError(f"unknown kind {case.kind!r}{suggest(case.kind, RUN)}")
        with jax.default_matmul_precision("highest"):
            outputs = RUN[case.kind](case)
        errors = {name: output_error(name, outputs, case) for name in case.stored if name != "ids"}
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        error = errors[worst]
        if not error <= bound:  # also fails for NaN
            problem = f"{worst} exceeds the bound"
    except Exception as reason:  # a failing case must not stop the others
        problem = first_line(reason)
    seconds = time.perf_counter() - start
    return Result(name=case.name, error=error, bound=bound, seconds=seconds, problem=problem)


def output_error(name: str, outputs: Arrays, case: Case) -> float:
    """Returns the relative error of one stored output. Raises UserError when it is missing or has another shape."""
    golden = case.stored[name]
    if name not in outputs:
        raise UserError(f"output {name} is not an output of a {case.kind}: {', '.join(outputs)}")
    if outputs[name].shape != golden.shape:
        raise UserError(f"output {name} has shape {outputs[name].shape}, the golden output {golden.shape}")
    return relative_error(outputs[name], golden)
