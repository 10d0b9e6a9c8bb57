"""Measures folders of videos, whichever program made them, and stores each number with every setting.

    python -m lavie_jax.evaluation fvd --samples DIR --reference DIR --protocol styleganv --out RUN --json fvd.json
    python -m lavie_jax.evaluation lpips --samples DIR --reference DIR --json lpips.json
    python -m lavie_jax.evaluation clipsim --samples DIR --captions FILE --clip weights/clip --json clipsim.json
    python -m lavie_jax.evaluation compare a.json b.json
    python -m lavie_jax.evaluation ucf101 --weights weights/base --classes classInd.txt --reference UCF-101 --out RUN

See docs/evaluation.md. Commands on Moving Shapes: python -m lavie_jax.evaluation.moving_shapes, .cascade, .prediction.
"""

import sys
from collections.abc import Callable, Sequence

from lavie_jax.errors import Parser, UserError, one_line_errors, suggest
from lavie_jax.evaluation import commands, suite_command
from lavie_jax.evaluation.commands import Report
from lavie_jax.evaluation.suites import SUITES

# name -> (its parser, what runs it)
COMMANDS: dict[str, tuple[Callable[[str], Parser], Callable[[str, Sequence[str]], Report]]] = {
    **dict.fromkeys(commands.DISTANCES, (commands.distance_parser, commands.distance)),
    "features": (commands.distance_parser, commands.features),
    **dict.fromkeys((*commands.PAIR_METRICS, "frames"), (commands.pairs_parser, commands.pair_metrics)),
    "clipsim": (commands.clipsim_parser, commands.clip_similarity),
    "compare": (commands.compare_parser, commands.compare),
    **dict.fromkeys(SUITES, (suite_command.suite_parser, suite_command.run)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        if not argv or argv[0] in ("-h", "--help"):
            print(f"{__doc__}\nCommands (each has --help):\n")
            print(*(parser(name).format_usage().removeprefix("usage: ") for name, (parser, _) in COMMANDS.items()))
            return
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown metric or command {argv[0]!r}{suggest(argv[0], COMMANDS)}")
        report = COMMANDS[argv[0]][1](argv[0], argv[1:])
        print(*report.lines, sep="\n")
        if report.code:
            sys.exit(report.code)


if __name__ == "__main__":
    main()
