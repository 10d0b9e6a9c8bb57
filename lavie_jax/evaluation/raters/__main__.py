"""Asks people to judge videos, as in the paper's user study, and reports tables 3 and 4.

    python -m lavie_jax.evaluation.raters prepare --out study --system lavie=samples/lavie --system other=samples/other
    python -m lavie_jax.evaluation.raters serve study
    python -m lavie_jax.evaluation.raters report study --json report.json

prepare copies the videos of the systems into a new folder. Raters compare pairs of videos of one prompt, and judge
single videos by the paper's five metrics. serve shows them a page for phones and desktops, and saves every answer at
once. report computes the tables, with intervals, agreement, and the raters who fail the hidden controls. docs/raters.md
is a walk-through.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavie_jax import results
from lavie_jax.errors import Parser, UserError, one_line_errors, user_path
from lavie_jax.evaluation.raters import answers
from lavie_jax.evaluation.raters.report import KIND, as_json, make_report, markdown
from lavie_jax.evaluation.raters.server import StudyServer
from lavie_jax.evaluation.raters.study import Design, Study, prepare

LOCAL = ("127.0.0.1", "::1", "localhost")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.evaluation.raters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare|serve|report")
    add = commands.add_parser("prepare", help="make a study from folders of videos").add_argument
    add("--out", type=Path, required=True, metavar="STUDY", help="a new folder")
    add("--system", action="append", required=True, metavar="NAME=FOLDER", help="a system's videos; repeat for each")
    add("--title", default=Design.title, help="heading of the page (default: %(default)s)")
    add("--prompts", type=int, metavar="N", help="draw N prompts (default: all)")
    add("--common-prompts", action="store_true", help="leave out videos that not all systems have")
    add("--pairs-per-rater", type=int, metavar="N", help="pairs for each rater (default: all)")
    add("--singles-per-rater", type=int, metavar="N", help="single videos for each rater (default: all)")
    add("--controls", type=int, default=Design.controls, metavar="N",
        help="pairs, and single videos, with known answers for each rater (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=Design.seed, help="of all that is drawn (default: %(default)s)")
    add = commands.add_parser("serve", help="show the page to raters").add_argument
    add("study", type=Path, metavar="STUDY")
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets other devices in (default: %(default)s)")
    add("--port", type=int, default=8000, help="(default: %(default)s)")
    add = commands.add_parser("report", help="compute the tables").add_argument
    add("study", type=Path, metavar="STUDY")
    add("--answers", type=Path, action="append", metavar="FILE",
        help="answer files, if the study was served at several places (default: that of STUDY)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the report to this file")
    add("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    return parser.parse_args(argv)


def _prepare(args: argparse.Namespace) -> None:
    systems = {}
    for text in args.system:
        name, separator, folder = text.partition("=")
        name = name.strip()
        if not (name and separator and folder):
            raise UserError(f"--system {text!r}: give NAME=FOLDER")
        if name in systems:
            raise UserError(f"--system {name}: the name is given twice")
        systems[name] = user_path(folder)
    for name, low in (("prompts", 1), ("pairs_per_rater", 0), ("singles_per_rater", 0), ("controls", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}; given {value}")
    if args.singles_per_rater == 0 and (args.pairs_per_rater == 0 or len(systems) == 1):
        raise UserError("the study would have no questions: give more than 0 pairs or single videos for each rater")
    design = Design(title=args.title, seed=args.seed, pairs_per_rater=args.pairs_per_rater,
                    singles_per_rater=args.singles_per_rater, controls=args.controls)  # fmt: skip
    study = prepare(args.out, systems, design, prompts=args.prompts, common_prompts=args.common_prompts)
    real = [question for question in study.questions.values() if not question.control]
    pairs = sum(question.is_pair for question in real)
    if len(real) - pairs < args.controls:
        print(
            f"There are {len(real) - pairs} controls of each kind, one for each video; --controls is {args.controls}."
        )
    print(
        f"{args.out}: study {study.id} with {pairs} pairs and {len(real) - pairs} single videos of "
        f"{len(systems)} systems; {len(study.questions_for(1))} questions for each rater, controls included"
    )


def _serve(args: argparse.Namespace) -> None:
    study = Study.load(args.study)
    stored = answers.Answers(args.study / answers.FILE, study.id)
    try:
        server = StudyServer(study, stored, host=args.host, port=args.port)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"Serving {study.design.title!r} at http://{host}:{server.server_port}/ (end with Ctrl-C)", flush=True)
        if args.host not in LOCAL:
            print("Everybody who reaches this address can take part, under any name.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nAll answers are saved.")
        finally:
            server.server_close()
    finally:
        stored.close()


def _report(args: argparse.Namespace) -> None:
    results.check_path(args.json, KIND)
    if args.seed < 0:
        raise UserError(f"--seed must be at least 0; given {args.seed}")
    study = Study.load(args.study)
    files = args.answers or [args.study / answers.FILE]
    collected: list[answers.Answer] = []
    known: set[str] = set()
    for number, file in enumerate(files):
        found, tokens = answers.read(file, study.id), answers.tokens(file, study.id)
        if known & tokens:
            raise UserError(
                f"{os.fspath(file)!r} shares raters with another answer file, whose answers would count twice: it is "
                "the same file, or a copy. Give one of them"
            )
        known |= tokens
        if len(files) > 1:  # two raters of one name in two files are two raters
            found = [dataclasses.replace(a, rater=f"{a.rater} ({number + 1})") for a in found]
        collected += found
    report: dict[str, Any] = make_report(study, collected, seed=args.seed)
    report["answer_files"] = [os.fspath(file) for file in files]
    print(markdown(report))
    if args.json:
        results.write(args.json, as_json(report))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        args = _parse(argv)
        {"prepare": _prepare, "serve": _serve, "report": _report}[args.command](args)


if __name__ == "__main__":
    main()
