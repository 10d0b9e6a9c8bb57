"""Errors caused by a user's input. Scripts print them as one line and exit with code 2."""

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
    """Wrong input of a user; the message contains what was given, what is allowed, and what to do."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """A hint with the nearest name and all allowed ones: `"; did you mean 'ddim'? Allowed: ddim, ddpm"`."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Allowed: {', '.join(allowed)}"


def check_folder(folder: Path, what: str) -> None:
    """Raises UserError, starting with `what`, if `folder` cannot be written to, whether or not it exists yet."""
    if address := re.match(r"([a-z][a-z0-9+.-]+):/", os.fspath(folder)):
        raise UserError(
            f"{what} cannot be written: {address[1]}:// is not a folder of this machine: give the path of a mount."
        )
    for parent in (folder.absolute(), *folder.absolute().parents):
        if parent.is_dir():
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UserError(f"{what} cannot be written: no permission to write in {parent}.")
            return
        if os.path.lexists(parent):
            raise UserError(f"{what} cannot be written: {parent} is a file, not a folder.")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print its usage and exit."""
        raise UserError(f"{message}; see --help")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError in the block into one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
