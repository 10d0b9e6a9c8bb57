"""Errors caused by a user's input, which scripts print as one line with exit code 2, and users' paths."""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """Wrong input of a user; the message contains what was given, what is allowed, and what to do."""


class AgreedError(UserError):
    """An error that all hosts of a run raise, so that each of them may end in its own time."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """A hint with the nearest name and all allowed ones: `"; did you mean 'ddim'? Allowed: ddim, ddpm"`."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Allowed: {', '.join(allowed)}"


def user_path(path: str | os.PathLike) -> Path:
    """Expands a leading `~` in a path that a user gives on a command line, in a config or to a function.

    Raises:
        UserError: the home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{os.fspath(path)}: the home folder that ~ stands for is unknown; set HOME, or write the whole path "
            "(./~name for a file of that name)"
        ) from None


def user_location(text: str) -> str:
    """Like `user_path`, for text that may be a path, `KIND:PATH` or something else, which is returned unchanged."""
    match = re.fullmatch(r"(\w+:)?(~.*)", text, re.DOTALL)
    return text if match is None else (match[1] or "") + os.fspath(user_path(match[2]))


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
    """An argument parser that raises UserError. `~` is expanded in arguments of type Path and `user_location`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("type", Path, _argument_type(user_path))
        self.register("type", user_location, _argument_type(user_location))

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print its usage and exit."""
        raise UserError(f"{message}; see --help")


def _argument_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def argument(text: str) -> Any:
        try:
            return read(text)
        except UserError as error:  # which argparse would replace by a message of its own
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError in the block into one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
