"""Errors that a person's input can cause. Scripts print them as one line and exit with code 2."""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Input that a person gave is wrong; the message says what was given, what is allowed, what to do."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """The allowed names, nearest first: `"; did you mean 'ddim'? Allowed: ddim, ddpm"`."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Allowed: {', '.join(allowed)}"


def check_folder(folder: Path, what: str) -> None:
    """UserError, which begins with `what`, when nothing can be written into `folder`, be it there or to be made."""
    if address := re.match(r"([a-z][a-z0-9+.-]+):/", os.fspath(folder)):
        raise UserError(f"{what} cannot be written: {address[1]}:// is no folder of this machine: name a mount.")
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"{what} cannot be written: no permission in {place}.")
            return
        if os.path.lexists(place):
            raise UserError(f"{what} cannot be written: {place} is a file, not a folder.")


class Parser(argparse.ArgumentParser):
    """Mistakes in a command line are errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises a UserError, where argparse would print its usage and exit."""
        raise UserError(f"{message}; see --help")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a command: a UserError becomes one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
