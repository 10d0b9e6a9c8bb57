"""Result files of commands: JSON with a "kind", which only a command of that kind may replace, and Markdown tables."""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lavie_jax.disk import new_file
from lavie_jax.errors import UserError, check_folder


def check_path(path: Path | None, kind: str) -> None:
    """Raises UserError if a result of `kind` cannot be written to `path`, or would replace another file."""
    if path is None:
        return
    if path.exists() and not (path.is_file() and _kind(path) == kind):
        raise UserError(f"{os.fspath(path)!r} exists and is not a result of this command: name another file")
    check_folder(path.parent, f"{path}")


def check_plot(path: Path | None) -> None:
    """Raises UserError if a plot cannot be written to `path`."""
    if path is None:
        return
    if path.suffix != ".png":
        raise UserError(f"--plot {path} must end in .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('--plot needs matplotlib: pip install "lavie_jax[plots]", or -e ".[plots]" in a clone')
    check_folder(path.parent, f"--plot {path}")


def _kind(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("kind") if isinstance(content, dict) else None


def write(path: Path, result: dict) -> None:
    """Writes a result, which has a "kind", as JSON. A crash leaves the former file, or none."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
