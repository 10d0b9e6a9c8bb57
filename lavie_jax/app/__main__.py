"""Serves a page on which people make videos, and an HTTP interface for programs. docs/app.md describes both.

    python -m lavie_jax.app
    python -m lavie_jax.app --weights weights --out videos --port 8000

It needs the extra `app`: pip install -e ".[app]". OUT has the videos and the queue of those that wait: after a restart,
the server continues with the same queue.
"""

import argparse
import contextlib
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from lavie_jax.errors import Parser, UserError, one_line_errors
from lavie_jax.samples.flags import (
    add_dtype,
    add_finishing,
    add_weights,
    given_certificate,
    given_filter,
    given_stage_weights,
)

LOCAL = ("127.0.0.1", "::1", "localhost")
SHIPPED_EXAMPLES = (
    "a red circle moving left",
    "a small yellow star moving down over a blue background",
    "a large green triangle standing still",
    "a blue cross moving up over a yellow background",
)
EXAMPLES = (
    "a teddy bear walking in the park, oil painting style, high quality",
    "a boat on a lake at sunset, aerial view, 4k",
    "a cat reading a newspaper in a café",
)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lavie_jax.app",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_weights(add)
    add("--out", type=Path, default=Path("videos"), metavar="DIR", help="folder of the videos (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets other devices in (default: %(default)s)")
    add("--port", type=int, default=7860, help="0 takes a free one (default: %(default)s)")
    add("--open", action="store_true", help="open the page in the browser of this machine")
    add("--share", action="store_true", help="make a public address for 72 hours, through a server of Gradio's makers")
    add("--max-queue", type=int, default=100, metavar="N", help="videos that may wait (default: %(default)s)")
    add("--max-upload", type=int, default=256, metavar="MIB", help="size of the largest file (default: %(default)s)")
    add(
        "--max-megapixels",
        type=float,
        default=1000,
        metavar="X",
        help="pixels in all frames of the largest video, in millions (default: %(default)s; LaVie's full size is 160)",
    )
    add("--fsdp", type=int, default=1, metavar="N", help="split the weights over N of this host's devices (default 1)")
    add_dtype(add)
    add_finishing(add)
    args = parser.parse_args(argv)
    for name in ("max_queue", "max_upload", "max_megapixels", "fsdp"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port must be from 0 to 65535, not {args.port}")
    return args


def _run(args: argparse.Namespace) -> None:
    from lavie_jax.app import server
    from lavie_jax.app.api import Api
    from lavie_jax.app.jobs import JobQueue
    from lavie_jax.app.store import Store

    server.check_installed()
    certificate, unsafe = given_certificate(args), given_filter(args)
    with contextlib.ExitStack() as stack:
        # What can fail at once comes before jax and the weights, which take seconds.
        listening = stack.enter_context(server.listen(args.host, args.port))
        store = Store(args.out)
        stack.callback(store.close)
        uploads = stack.enter_context(server.uploads_folder(store.folder))

        from lavie_jax.app.components import Site
        from lavie_jax.app.engine import Engine
        from lavie_jax.app.page import OWNER, build

        folders = given_stage_weights(args)
        pixels = args.max_megapixels * 1e6
        engine = Engine(
            store, weights=args.weights, folders=folders, most_pixels=pixels, fsdp=args.fsdp, dtype=args.dtype,
            certificate=certificate, unsafe=unsafe,
        )  # fmt: skip
        queue = JobQueue(
            store,
            lambda wanted, inputs: engine.plan(wanted, inputs).notes,
            lambda job: engine.run(job, queue.check),
            most_waiting=args.max_queue,
        )
        shipped = bool(engine.words)
        site = Site(
            queue=queue,
            stages={stage: header.sampling for stage, header in engine.headers.items()},
            hashes=lambda: engine.hashes,
            examples=SHIPPED_EXAMPLES if shipped else EXAMPLES,
            about=_about(engine.words),
            uploads=uploads,
            most_upload=args.max_upload * 2**20,
        )
        api = Api(queue, most_upload=site.most_upload)
        app = server.application(api, lambda: build(site), most_upload=site.most_upload, cookie=OWNER)
        server.serve(
            app, listening, queue, on_start=lambda: _announce(args, listening.getsockname()[1], queue.waiting())
        )
    print("\nFinished videos are kept. Those that wait are made after the next start with the same --out.")


def _about(words: Sequence[str]) -> str:
    """A sentence on the models."""
    if not words:
        return "Describe a video in a sentence. Videos state in their files that they are generated."
    return "A small model of moving shapes. It knows the words " + ", ".join(words) + "."


def _announce(args: argparse.Namespace, port: int, waiting: int) -> None:
    """Prints where the page is, and opens it if wished."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    print(f"Serving the page at {address} (end with Ctrl-C). Videos are written to {args.out}.", flush=True)
    if waiting:
        print(f"{waiting} videos of the last run are still to be made.", flush=True)
    if args.host not in LOCAL:
        print("Everybody who reaches this address can make videos.", flush=True)
    if args.share:
        _share(host, port)
    if args.open and not _opened(address):
        print(f"No browser was found on this machine: open {address} in one.", flush=True)


def _share(host: str, port: int) -> None:
    """Makes a public address, which Gradio's servers forward to this one."""
    from lavie_jax.app.server import share

    try:
        print(f"Everybody with this address can make videos: {share(host, port)}", flush=True)
    except UserError as error:
        print(f"--share: {error}", flush=True)


def _opened(address: str) -> bool:
    try:
        return webbrowser.open(address)
    except (webbrowser.Error, OSError):
        return False


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with one_line_errors():
        _run(_parse(argv))


if __name__ == "__main__":
    main()
