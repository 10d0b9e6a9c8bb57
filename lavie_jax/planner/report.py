"""Rows of `measure` in a JSON file, and as lines for a terminal."""

import json
from pathlib import Path
from typing import Any

from lavie_jax import results
from lavie_jax.planner import chips
from lavie_jax.planner.chips import GIB
from lavie_jax.planner.roofline import bound

KIND = "planner"
IDENTITY = ("kind", "config", "changed", "topology", "slices", "per_chip_batch", "remat", "program")
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows in a file; none where there is no file. UserError for a file of another kind."""
    results.check_path(path, KIND)
    return json.loads(path.read_text())["rows"] if path.exists() else []


def append(path: Path, row: Row) -> None:
    """Adds a row, or replaces that of the same program."""
    same = [row[name] for name in IDENTITY]
    others = [old for old in read(path) if [old[name] for name in IDENTITY] != same]
    results.write(path, {"kind": KIND, "rows": [*others, row]})


def total(row: Row) -> int | None:
    """Bytes of a chip while the program runs, with what lies beside it; None where the compiler did not say."""
    return None if row["needs"] is None else row["needs"] + row["beside"]


def fits(row: Row) -> bool:
    """Whether the program and what lies beside it fit into a chip."""
    return row["fits"] and total(row) <= chips.parse(row["topology"])[0].memory


def planned(row: Row) -> bool:
    """Whether compiling was ended when memory was planned: what is known only later is not in the row."""
    return "plan" in row["seconds"]


def lines(row: Row) -> str:
    """What the command prints of a program."""
    chip, _ = chips.parse(row["topology"])
    mesh = ", ".join(f"{name} {size}" for name, size in row["mesh"].items())
    held = [f"{name} {gib(size)}" for name, size in row["held"].items()]
    out = [
        f"{row['config']}: {row['program']} on {row['chips']} x {row['topology'].partition(':')[0]} ({mesh})",
        f"  {row['note']}; remat {row['remat']}",
        f"  GiB a chip: {', '.join(held)}" + (f", beside {gib(row['beside'])}" if row["beside"] else ""),
    ]
    if row["fits"]:
        parts = [name for name in ("arguments", "outputs", "donated", "temporary", "code") if name in row]
        out.append("  the compiler's plan: " + ", ".join(f"{name} {gib(row[name])}" for name in parts))
    out.append(f"  {_verdict(row, chip)}" + ("; the size of the code is not in it (--code)" if planned(row) else ""))
    out.append(f"  TFLOP a chip: {row['operations'] / 1e12:.3f} traced" + _compilers(row))
    if row["fits"]:
        out.append(f"  collectives: {collectives_text(row) or 'none'}")
        least = bound(row, chip)
        each = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in least._asdict().items())
        out.append(f"  estimate, roofline bound: at least {1e3 * least.seconds:.1f} ms ({least.reason}; ms: {each})")
    return "\n".join([*out, f"  seconds: {row['seconds']}"])


def _verdict(row: Row, chip: chips.Chip) -> str:
    needs, has = total(row), chip.memory
    if needs is None:
        return f"does not fit into {gib(has)} GiB"
    word = f"fits, {gib(has - needs)} GiB left" if fits(row) else f"does not fit, by {gib(needs - has)} GiB"
    return f"total {gib(needs)} of {gib(has)} GiB: {word}"


def _compilers(row: Row) -> str:
    if "compiler_operations" not in row:
        return ""
    return f", {row['compiler_operations'] / 1e12:.3f} by the compiler, who counts a loop once and no custom kernel"


def collectives_text(row: Row) -> str:
    """`12 all-gather 0.02 GiB, ...`; nothing for a program on one chip."""
    return ", ".join(f"{one['count']} {kind} {gib(one['bytes'])} GiB" for kind, one in row["collectives"].items())


def gib(size: float | None) -> str:
    """Bytes in GiB, to two places; "?" for what is not known."""
    return "?" if size is None else f"{size / GIB:.2f}"
