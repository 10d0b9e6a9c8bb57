"""Stores rows of `measure` in a JSON file, and formats them for a terminal."""

import json
from pathlib import Path
from typing import Any

from lavie_jax import results
from lavie_jax.planner import chips
from lavie_jax.planner.chips import GIB, bound

KIND = "planner"
IDENTITY = ("kind", "config", "changed", "topology", "slices", "per_chip_batch", "remat", "program")
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Returns the rows of a file, none if it does not exist. Raises UserError for a file of another kind."""
    results.check_path(path, KIND)
    return json.loads(path.read_text())["rows"] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Adds a row to a file, or replaces the row of the same program."""
    same = [row[name] for name in IDENTITY]
    others = [old for old in read(path) if [old[name] for name in IDENTITY] != same]
    results.write(path, {"kind": KIND, "rows": [*others, row]})


def total(row: Row) -> int | None:
    """Returns the bytes of a chip in use while the program runs; None if the compiler did not report them."""
    return None if row["needs"] is None else row["needs"] + row["beside"]


def fits(row: Row) -> bool:
    """Returns whether the program fits together with everything else that is on the chip while it runs."""
    return row["fits"] and total(row) <= chips.parse(row["topology"])[0].memory


def planned(row: Row) -> bool:
    """Returns whether compilation ended at the memory plan, so that the row lacks the results of later phases."""
    return "plan" in row["seconds"]


def lines(row: Row) -> str:
    """Formats a row for the terminal."""
    chip, _ = chips.parse(row["topology"])
    mesh = ", ".join(f"{name} {size}" for name, size in row["mesh"].items())
    held = [f"{name} {gib(size)}" for name, size in row["held"].items()]
    out = [
        f"{row['config']}: {row['program']} on {row['chips']} x {row['topology'].partition(':')[0]} ({mesh})",
        f"  {row['note']}; remat {row['remat']}",
        f"  GiB per chip: {', '.join(held)}" + (f", beside {gib(row['beside'])}" if row["beside"] else ""),
    ]
    if row["fits"]:
        parts = [name for name in ("arguments", "outputs", "donated", "temporary", "code") if name in row]
        out.append("  the compiler's plan: " + ", ".join(f"{name} {gib(row[name])}" for name in parts))
    out.append(f"  {_verdict(row, chip)}" + (", without the size of the code (--code)" if planned(row) else ""))
    counted = f", {row['program_flops'] / 1e12:.3f} in its compiled program" if "program_flops" in row else ""
    out.append(f"  TFLOP per chip: {row['flops'] / 1e12:.3f} traced{counted}" + _compiler_flops(row))
    if row["fits"]:
        out.append(f"  collectives: {collectives_text(row) or 'none'}")
        least = bound(row, chip)
        each = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in least._asdict().items())
        out.append(f"  estimate, roofline bound: at least {1e3 * least.seconds:.1f} ms ({least.reason}; ms: {each})")
    return "\n".join([*out, f"  seconds: {row['seconds']}"])


def _verdict(row: Row, chip: chips.Chip) -> str:
    needs, limit = total(row), chip.memory
    if needs is None:
        return f"does not fit into {gib(limit)} GiB"
    word = f"fits, {gib(limit - needs)} GiB left" if fits(row) else f"does not fit, by {gib(needs - limit)} GiB"
    return f"total {gib(needs)} of {gib(limit)} GiB: {word}"


def _compiler_flops(row: Row) -> str:
    if "compiler_flops" not in row:
        return ""
    return (
        f", {row['compiler_flops'] / 1e12:.3f} by the compiler, which counts loops once and custom kernels not at all"
    )


def collectives_text(row: Row) -> str:
    """Formats collectives as `12 all-gather 0.02 GiB, ...`; "" if there are none."""
    return ", ".join(f"{one['count']} {kind} {gib(one['bytes'])} GiB" for kind, one in row["collectives"].items())


def gib(size: float | None) -> str:
    """Formats bytes as GiB with two decimals; "?" for None."""
    return "?" if size is None else f"{size / GIB:.2f}"
