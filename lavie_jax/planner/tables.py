"""Writes docs/planner.md and docs/memory.md from stored rows."""

from pathlib import Path

from lavie_jax import results
from lavie_jax.errors import UserError
from lavie_jax.planner import chips
from lavie_jax.planner.chips import bound
from lavie_jax.planner.report import Row, collectives_text, fits, gib, planned, read, total
from lavie_jax.planner.sampling import program_names
from lavie_jax.stages import STAGES


def write_tables(path: Path) -> list[Path]:
    """Writes planner.md and memory.md beside the JSON file `path`, which must exist. Returns their paths."""
    if not path.is_file():
        raise UserError(f"--tables {path}: no such file; run the planner with --json to write it")
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
    return TRAINING.format(
        source=source, memory=results.markdown(memory_header, memory), time=results.markdown(time_header, time),
        versions=_versions(rows),
    )  # fmt: skip


def _sampling_page(all_rows: list[Row], source: str) -> str:
    rows = [row for row in all_rows if row["chips"] == 1]
    header = [
        "stage", "program", "size", "arguments", "temporary", "outputs", "code", "beside", "total", "HBM limit", "fits",
    ]  # fmt: skip
    by_program = {(row["kind"], row["program"]): row for row in rows if not row["changed"]}
    wanted = [(stage.name, program) for stage in STAGES.values() for program in program_names(stage)]
    named = [(stage, by_program[stage, program]) for stage, program in wanted if (stage, program) in by_program]
    named += [(_changed(row), row) for row in rows if row["changed"]]
    cells = []
    for stage, row in named:
        chip, _ = chips.parse(row["topology"])
        plan = [_cell(row, name) for name in ("arguments", "temporary", "outputs", "code", "beside")]
        verdict = "yes" if fits(row) else "**no**"
        cells.append([stage, row["program"], row["note"], *plan, gib(total(row)), gib(chip.memory), verdict])
    return SAMPLING.format(
        source=source, table=results.markdown(header, cells), shared=_shared_table(all_rows), versions=_versions(rows)
    )


def _shared_table(rows: list[Row]) -> str:
    """The table of guided steps of one clip on several chips, next to the same step on one chip."""
    header = [
        "stage", "chips", "TFLOP per chip", "part of one chip's", "collectives (count, GiB)", "total, GiB", "HBM limit",
        "bound, ms: arithmetic", "memory", "links", "estimated speed-up",
    ]  # fmt: skip
    alone = {(row["kind"], row["program"]): row for row in rows if row["chips"] == 1 and "program_flops" in row}
    cells = []
    for row in rows:
        one = alone.get((row["kind"], row["program"]))
        if row["chips"] == 1 or one is None or row["changed"]:
            continue
        chip, _ = chips.parse(row["topology"])
        each, before = (bound({**r, "flops": r["program_flops"]}, chip) for r in (row, one))
        cells.append([
            row["kind"], row["topology"], f"{row['program_flops'] / 1e12:.2f}",
            f"1/{one['program_flops'] / row['program_flops']:.2f}", collectives_text(row), gib(total(row)),
            gib(chip.memory), *(f"{1e3 * seconds:.1f}" for seconds in each),
            f"{before.seconds / (each.seconds + each.links):.1f}",
        ])  # fmt: skip
    return results.markdown(header, cells)


def _name(row: Row) -> list[str]:
    changed = "".join(f" {name}={value}" for name, value in row["changed"].items())
    where = row["topology"] if row["slices"] == 1 else f"{row['slices']} x {row['topology']}"
    return [f"`{row['config']}`{changed}", where]


def _changed(row: Row) -> str:
    """The stage with its changed settings: `base long=free_noise`."""
    return " ".join([row["kind"], *(f"{name.rpartition('.')[2]}={value}" for name, value in row["changed"].items())])


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
    flops = [f"{row[name] / 1e12:.2f}" if name in row else "" for name in ("flops", "compiler_flops")]
    seconds = [f"{row['seconds'][name]:.0f} s" if name in row["seconds"] else "" for name in ("plan", "compile")]
    return [*flops, collectives_text(row) or "none", *each, *seconds]


def _versions(rows: list[Row]) -> str:
    versions = {f"jax {row['versions']['jax']}, libtpu {row['versions']['libtpu']}" for row in rows}
    return "; ".join(sorted(versions)) or "none yet"


TRAINING = """\
# Training: what fits on a TPU

Generated by `python -m lavie_jax.planner --tables docs/{source}` from the rows of `{source}`; do not edit. This command
adds a row:

    python -m lavie_jax.planner --config configs/base.py --topology v5e:4x4 --per-chip-batch 1 --json docs/{source}

It compiles the update of `train.py` ahead of time, without a TPU ({versions}), up to the memory plan. Generating
machine code would take nine tenths of the time, and is done only with `--code`. Nothing was run on a TPU.

## Memory

GiB per chip, from the compiler's plan. `parameters` and `EMA` count trained parameters only; `frozen` includes the
untrained parameters of the trained network. `total` is parameters, optimizer state, EMA, frozen models, batch,
temporaries, and the program's code where it was generated. `HBM limit` is what the compiler lets a program use.

{memory}

## Time: an estimate

`TFLOP traced` is one chip's share of all matrix products and convolutions of the traced program, including
rematerialised blocks and all iterations of loops. The compiler's own count, which needs `--code`, is too low: it counts
a loop only once and custom kernels (flash attention) not at all. Collectives are read from the compiled
program and multiplied by the trip counts of loops. The bound is a roofline: the largest of FLOPs at peak speed, memory
traffic (each temporary byte twice, or the compiler's figure if there is one) at peak bandwidth, and the bytes of
collectives over all links of the chip. A real step takes longer; how much longer is not known.

{time}

`--search` tries at most four combinations of batch size and remat. `--slices N` splits the axis `data` over N slices.
Names of topologies count chips: v5p:2x4x4 is sold by Google as v5p-64, which counts two cores per chip. libtpu prints a
few harmless lines to stderr about hosts that it does not find.
"""

SAMPLING = """\
# Sampling: what fits on one TPU chip

Generated by `python -m lavie_jax.planner --tables docs/{source}` from the rows of `{source}`; do not edit. These
commands add the rows:

    python -m lavie_jax.planner --config configs/base.py --sample base --json docs/{source}
    python -m lavie_jax.planner --config configs/prediction.py --sample prediction --json docs/{source}
    python -m lavie_jax.planner --config configs/interpolation.py --sample interpolation --json docs/{source}
    python -m lavie_jax.planner --config configs/vsr.py --sample vsr --json docs/{source}
    python -m lavie_jax.planner --config configs/base.py --sample base --program "guided step" --json docs/{source} \\
        --config.sampling.frames=64 --config.sampling.long=free_noise --config.sampling.long_window=16

GiB of one TPU v5e chip, from the compiler's plan ({versions}); nothing was run on a TPU. The programs are those of
`lavie_jax/cascade/` at its default sizes: weights in bfloat16, the x4 VAE in float32, flash attention where it fits.
`beside` counts what is on the chip but not used by the program: the stage's other models, and the unused half of the
VAE. `total` includes the compiled code where `--code` measured it. Only one stage's weights are on the chips at a time.
Interpolation decodes with the same program as base.

{table}

## One clip on several chips

If there are fewer clips than chips, several chips share a clip: the halves of guidance go to two groups, whose chips
divide the frames, or the pixels in temporal layers ([tpu.md](tpu.md)). This command plans a guided step:

    python -m lavie_jax.planner --config configs/base.py --sample base --topology v5e:2x4 --program "guided step" \\
        --json docs/{source}

FLOPs are counted in the compiled program of a chip, including padding and repeated work. The bounds are those of a
roofline, as in [planner.md](planner.md). The speed-up is estimated from them, assuming that collectives do not overlap
with computation. Nothing was run on a TPU.

{shared}
"""
