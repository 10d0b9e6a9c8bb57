"""Publishes weights on the Hugging Face hub.

    python -m lavie_jax.weights.hub push weights/base someone/shapes --licence apache-2.0

Uploads a weights folder, or a cascade of them, with a model card (`docs/hub.md`). It needs a login: `hf auth login`, or
HF_TOKEN. To sample from the repository: `sample.py --weights hub:someone/shapes`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lavie_jax.errors import Parser, one_line_errors
from lavie_jax.weights.hub.publish import push_to_hub


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        parser = Parser(
            prog="python -m lavie_jax.weights.hub",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands = parser.add_subparsers(dest="command", required=True)
        push = commands.add_parser("push", help="upload a weights folder")
        push.add_argument("folder", type=Path, metavar="FOLDER", help="a weights folder, or a folder of them")
        push.add_argument("repository", metavar="OWNER/NAME", help="the repository; it is created if it does not exist")
        push.add_argument(
            "--licence", required=True, metavar="ID", help="the hub's name of the weights' licence, e.g. apache-2.0"
        )
        push.add_argument("--private", action="store_true", help="make a new repository private")
        args = parser.parse_args(argv)
        print(push_to_hub(args.folder, args.repository, licence=args.licence, private=args.private))


if __name__ == "__main__":
    main()
