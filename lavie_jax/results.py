"""What the evaluation commands share: results in JSON, which only their own kind may replace, and tables."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from lavie_jax.errors import UserError, check_folder


def check_place(path: Path | None, kind: str) -> None:
    """UserError when a result of `kind` cannot be written to `path`, or would overwrite something else."""
    if path is None:
        return
    if path.exists() and not (path.is_file() and _kind(path) == kind):
        raise UserError(f"{os.fspath(path)!r} exists and is no result of this command: name another")
    check_folder(path.parent, f"{path}")


def _kind(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return None
    return content.get("kind") if isinstance(content, dict) else None


def write(path: Path, result: dict) -> None:
    """The result as JSON; its "kind" marks it as ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
