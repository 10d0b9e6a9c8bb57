"""Writes docs/planner.md and docs/memory.md from the stored rows of the planner."""

from pathlib import Path

from lavie_jax import results
from lavie_jax.errors import UserError
from lavie_jax.planner import chips
from lavie_jax.planner.report import Row, collectives_text, fits, gib, planned, read, total
from lavie_jax.planner.roofline import bound

# What the pages shall hold, measured or not: (config, topology, rows per chip), and the programs of each stage.
_STAGES, _MORE = ("base", "interpolation", "vsr"), ("v4:2x2x4", "v5e:16x16", "v6e:4x4")
TRAININGS = (
    *((f"configs/{stage}.py", topology, 1) for topology in ("v5e:4x4", "v5p:2x4x4") for stage in _STAGES),
    *(("configs/base.py", topology, 1) for topology in _MORE),
)
SAMPLINGS = {
    "base": ("guided step", "VAE decode"),
    "interpolation": ("guided step", "VAE decode", "VAE encode"),
    "vsr": ("guided step", "VAE decode"),
}


def write_tables(path: Path) -> list[Path]:
    """planner.md and memory.md beside the JSON; returns where they are. UserError when there is no such file."""
    if not path.is_file():
        raise UserError(f"--tables {path}: no such file; --json writes it")
    rows = read(path)
    pages = {
        "planner.md": _training_page([row for row in rows if row["kind"] == "training"], path.name),
        "memory.md": _sampling_page([row for row in rows if row["kind"] != "training"], path.name),
    }
    for name, text in pages.items():
        (path.parent / name).write_text(text)
    return [path.parent / name for name in pages]


def _training_page(rows: list[Row], source: str) -> str:
    memory_header = [
        "config", "topology", "mesh", "rows per chip", "remat", "parameters", "optimizer", "EMA", "frozen", "temporary",
        "code", "total", "HBM limit", "fits",
    ]  # fmt: skip
    time_header = [
        "config", "topology", "rows per chip", "TFLOP traced", "by the compiler", "collectives (count, GiB)",
        "bound, ms: arithmetic", "memory", "links", "at least", "planned in", "compiled in",
    ]  # fmt: skip
    memory, time = [], []
    for row in rows:
        chip, _ = chips.parse(row["topology"])
        memory.append([*_name(row), _mesh(row), str(row["per_chip_batch"]), row["remat"], *_memory_cells(row, chip)])
        if row["fits"]:
            time.append([*_name(row), str(row["per_chip_batch"]), *_time_cells(row, chip)])
    there = {(row["config"], row["topology"], row["per_chip_batch"]) for row in rows}
    for config, topology, count in TRAININGS:
        if (config, topology, count) not in there:
            memory.append(_missing([f"`{config}`", topology, "", str(count)], len(memory_header)))
    return TRAINING.format(
        source=source, memory=results.markdown(memory_header, memory), time=results.markdown(time_header, time),
        versions=_versions(rows),
    )  # fmt: skip


def _sampling_page(rows: list[Row], source: str) -> str:
    header = [
        "stage", "program", "size", "arguments", "temporary", "outputs", "code", "other models", "total", "HBM limit",
        "fits",
    ]  # fmt: skip
    found = {(row["kind"], row["program"]): row for row in rows}
    cells = []
    for stage, program in ((stage, program) for stage, programs in SAMPLINGS.items() for program in programs):
        row = found.get((stage, program))
        if row is None:
            cells.append(_missing([stage, program], len(header)))
            continue
        chip, _ = chips.parse(row["topology"])
        plan = [_cell(row, name) for name in ("arguments", "temporary", "outputs", "code", "beside")]
        verdict = "yes" if fits(row) else "**no**"
        cells.append([stage, program, row["note"], *plan, gib(total(row)), gib(chip.memory), verdict])
    return SAMPLING.format(source=source, table=results.markdown(header, cells), versions=_versions(rows))


def _missing(name: list[str], columns: int) -> list[str]:
    return [*name, "not compiled yet", *[""] * (columns - len(name) - 1)]


def _name(row: Row) -> list[str]:
    changed = "".join(f" {name}={value}" for name, value in row["changed"].items())
    where = row["topology"] if row["slices"] == 1 else f"{row['slices']} x {row['topology']}"
    return [f"`{row['config']}`{changed}", where]


def _mesh(row: Row) -> str:
    return ", ".join(f"{name} {size}" for name, size in row["mesh"].items() if size > 1) or "1 device"


def _memory_cells(row: Row, chip: chips.Chip) -> list[str]:
    held = [gib(row["held"][name]) for name in ("parameters", "optimizer", "ema", "frozen")]
    verdict = "yes" if fits(row) else "**no**"
    return [*held, _cell(row, "temporary"), _cell(row, "code"), gib(total(row)), gib(chip.memory), verdict]


def _cell(row: Row, name: str) -> str:
    return "" if name == "code" and planned(row) else gib(row.get(name))


def _time_cells(row: Row, chip: chips.Chip) -> list[str]:
    least = bound(row, chip)
    each = [f"{1e3 * seconds:.0f}" for seconds in (*least, least.seconds)]
    operations = [f"{row[name] / 1e12:.2f}" if name in row else "" for name in ("operations", "compiler_operations")]
    seconds = [f"{row['seconds'][name]:.0f} s" if name in row["seconds"] else "" for name in ("plan", "compile")]
    return [*operations, collectives_text(row) or "none", *each, *seconds]


def _versions(rows: list[Row]) -> str:
    found = {f"jax {row['versions']['jax']}, libtpu {row['versions']['libtpu']}" for row in rows}
    return "; ".join(sorted(found)) or "none yet"


TRAINING = """\
# Training: what fits on a TPU

Written by `python -m lavie_jax.planner --tables docs/{source}` from the rows of `{source}`; do not edit. A row is
produced by

    python -m lavie_jax.planner --config configs/base.py --topology v5e:4x4 --per-chip-batch 1 --json docs/{source}

which compiles the update step of `train.py` ahead of time, without a TPU ({versions}), until memory is planned.
`--code` also generates the machine code, which takes nine tenths of the time. Nothing was run on a TPU. Rows that
have not been compiled say so.

## Memory

GiB per chip, by the compiler's plan. `total` includes parameters, optimizer state, EMA, frozen models, the batch,
temporaries and, where it was generated, the program's code. `HBM limit` is what the compiler allows a program.

{memory}

## Time: an estimate

`TFLOP traced` is one chip's share of all matrix products and convolutions of the traced program, including recomputed
blocks and all iterations of loops. The compiler's own count is too low, because it counts a loop once and custom
kernels (flash attention) not at all; it needs `--code`. Collectives are counted in the compiled program, once per
iteration of their loop. The bound is a roofline: the maximum of arithmetic at peak speed, memory traffic (twice the
temporary bytes, or the compiler's figure where available) at peak bandwidth, and the bytes of collectives over all
links of the chip. A real step is slower; by how much is unknown.

{time}

`--search` tries at most four combinations of batch size and remat. `--slices N` splits the axis `data` over N slices.
Topologies count chips: v5p:2x4x4 is sold as v5p-64, because Google counts two cores per chip. libtpu prints a few
lines about hosts that it cannot find to stderr, which can be ignored.
"""

SAMPLING = """\
# Sampling: what fits on one TPU chip

Written by `python -m lavie_jax.planner --tables docs/{source}` from the rows of `{source}`; do not edit. The rows are
produced by

    python -m lavie_jax.planner --config configs/base.py --sample base --json docs/{source}
    python -m lavie_jax.planner --config configs/interpolation.py --sample interpolation --json docs/{source}
    python -m lavie_jax.planner --config configs/vsr.py --sample vsr --json docs/{source}

GiB of one TPU v5e chip, by the compiler's plan ({versions}); nothing was run on a TPU. The programs are those of
`lavie_jax/cascade/`, at the sizes that it chooses by default: weights in bfloat16, the x4 VAE in float32, and flash
attention where it fits. `other models` is what stays on the chip although this program does not use it: the stage's
other models, and the unused half of the VAE. `total` includes the compiled code, which needs `--code`. One stage's
weights are on the chips at a time. Interpolation uses the same decoding program as base.

{table}
"""
