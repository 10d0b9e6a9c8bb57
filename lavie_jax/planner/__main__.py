"""python -m lavie_jax.planner: see the package's docstring."""

import argparse
import functools
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lavie_jax.errors import Parser, UserError, one_line_errors, suggest, user_location
from lavie_jax.planner import chips, report, tables
from lavie_jax.planner.sampling import program_names, sampling_program
from lavie_jax.planner.subprocess import Make, measure_in_subprocess
from lavie_jax.planner.training import held_out_program, training_program
from lavie_jax.results import check_path
from lavie_jax.stages import STAGES
from lavie_jax.training import options

MAX_DOUBLINGS = 3  # batch sizes that `--search` tries


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles the programs that the command line names; prints and stores a row for each."""
    with one_line_errors():
        args, config = _parse(argv)
        if args.tables:
            for path in tables.write_tables(args.tables):
                print(path)
            return
        if args.sample:
            for name in _chosen(program_names(STAGES[args.sample]), args.program):
                make = functools.partial(sampling_program, config, args.sample, name, rows=args.per_chip_batch)
                _record(
                    args, make, args.sample, args.per_chip_batch or 1 / chips.count(args.topology, args.slices), "none"
                )
            return

        def fits(rows: int, remat: str) -> bool:
            config.remat = remat
            make = functools.partial(training_program, config, per_chip_batch=rows)
            return _record(args, make, "training", rows, remat)

        rows = args.per_chip_batch or 1
        if args.search:
            best = search(fits, rows)
            print("nothing fits" if best is None else f"best: {best[0]} rows per chip, remat {best[1]}")
        else:
            fits(rows, config.remat)
            make = functools.partial(held_out_program, config, per_chip_batch=rows)
            _record(args, make, "held-out", rows, config.remat)


def search(fits: Callable[[int, str], bool], first: int) -> tuple[int, str] | None:
    """Returns the best (rows per chip, remat) of at most four compilations, or None if not even `first` rows fit.

    Doubles the rows while they fit with every block rematerialised; then tries as many without, which saves a quarter
    of the FLOPs. If not even the first fit, tries to rematerialise the layers in the blocks, too.
    """
    best, rows = None, first
    for _ in range(MAX_DOUBLINGS):
        if not fits(rows, "block"):
            break
        best, rows = (rows, "block"), 2 * rows
    if best is None:
        return (first, "full") if fits(first, "full") else None
    return (best[0], "none") if fits(best[0], "none") else best


def _chosen(names: Sequence[str], name: str | None) -> Sequence[str]:
    if name is not None and name not in names:
        raise UserError(f"--program: unknown {name!r}{suggest(name, names)}")
    return names if name is None else (name,)


def _record(args: argparse.Namespace, make: Make, kind: str, rows: float, remat: str) -> bool:
    """Measures a program, prints its row and, with --json, stores it. Returns whether it fits."""
    about = {
        "kind": kind, "config": args.config, "changed": args.changed, "topology": args.topology,
        "slices": args.slices, "per_chip_batch": rows, "remat": remat,
    }  # fmt: skip
    row = (
        about | measure_in_subprocess(make, args.topology, args.slices, code=args.code) | {"versions": chips.versions()}
    )
    print(report.lines(row), flush=True)
    if args.json:
        report.append(args.json, row)
    return report.fits(row)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Any]:
    """Returns the arguments and the config that they name (None with --tables)."""
    parser = Parser(
        prog="python -m lavie_jax.planner", description="Compile the real programs for a TPU, without a TPU.",
        epilog="--config.FIELD=VALUE changes a field of the config, as for train.py.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", type=user_location, metavar="FILE.py[:MODE]", help="the config of a stage")
    parser.add_argument("--topology", default="v5e:1x1", help=f"such as {', '.join(chips.EXAMPLES)}")
    parser.add_argument(
        "--slices", type=int, default=1, help="number of slices of that topology, over which `data` is split"
    )
    parser.add_argument(
        "--per-chip-batch", type=int, help="clips per chip (default: 1; with --sample, one clip on all chips)"
    )
    parser.add_argument("--sample", metavar="STAGE", help="plan the sampling of a stage instead of its training")
    parser.add_argument("--program", metavar="NAME", help="with --sample: only this program, such as 'VAE decode'")
    parser.add_argument("--search", action="store_true", help="try up to four points of batch and remat")
    parser.add_argument(
        "--code", action="store_true", help="compile completely, which takes far longer, for the size of the code"
    )
    parser.add_argument("--json", type=Path, help="add the rows to this file, replacing rows of the same programs")
    parser.add_argument("--tables", type=Path, metavar="JSON", help="write planner.md and memory.md next to this file")
    args, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if not re.match(r"--config\.[\w.]+=", word)]:
        raise UserError(f"unexpected argument {unknown[0]!r}; see --help")
    if args.tables:
        return args, None
    if not args.config:
        raise UserError("--config is missing: a file such as configs/base.py")
    for name in ("per_chip_batch", "slices"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {number}")
    if args.sample is not None and args.sample not in STAGES:
        raise UserError(f"--sample: unknown stage {args.sample!r}{suggest(args.sample, STAGES)}")
    if args.sample and args.search:
        raise UserError("--search is for training: leave it out with --sample")
    if args.program and not args.sample:
        raise UserError("--program goes with --sample: both programs of training are planned")
    chips.parse(args.topology)
    check_path(args.json, report.KIND)
    args.changed = {word[len("--config.") :].partition("=")[0]: word.partition("=")[2] for word in rest}
    config = options.load(args.config)
    for field, text in args.changed.items():
        options.override(config, field, text)
    return args, config


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # otherwise the compiling process would continue
    main()
