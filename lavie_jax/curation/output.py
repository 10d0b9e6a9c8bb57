"""The output folder of a run: lists, manifest, and the lock and settings that make a run resumable.

While a run is in progress, `OUT/.work` holds its lock, its settings and the results so far. The manifest is written
last: it marks a finished set.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from lavie_jax.data import shards
from lavie_jax.disk import file_hash, flock, is_full, new_file
from lavie_jax.errors import UserError

MANIFEST, CLIPS, DROPPED = "manifest.json", shards.LIST, "dropped.jsonl"
WORK = ".work"


def refuse_finished(out: Path) -> None:
    """Raises UserError if `out` contains a finished set."""
    if (out / MANIFEST).exists():
        shutil.rmtree(out / WORK, ignore_errors=True)  # left by a run that was killed after writing the manifest
        raise UserError(f"{os.fspath(out)!r} contains a finished set: give another --out, or remove this set")


@contextlib.contextmanager
def open_output(out: Path, settings: dict[str, object], *, repeated: Collection[str] = ()) -> Iterator[Path]:
    """Creates or reopens `out` for a run with `settings`, and yields its work folder, locked for this process.

    Args:
        out: the output folder.
        settings: everything that determines the results so far.
        repeated: names of settings that may differ from those of an earlier run, whose shards are then deleted.

    Raises:
        UserError: `out` belongs to another running process or to a run with other settings, is not empty, or its disk
            is full.
    """
    work = out / WORK
    try:
        present = [p.name for p in out.iterdir() if p.name != WORK] if out.exists() else []
        if present and not work.exists():
            raise UserError(f"--out {os.fspath(out)!r} is not empty (it contains {present[0]}): name a new folder")
        work.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {os.fspath(out)!r}: {error.strerror or 'is not a folder'}") from error
    with _full_disk_as_user_error(out), (work / "lock").open("w") as lock:
        held = flock(lock)
        if held is False:
            raise UserError(f"another run is writing to {os.fspath(out)!r}")
        if held is None:
            logging.warning("%s is on a disk without flock: start one run in it at a time", os.fspath(out))
        _check_settings(work / "settings.json", json.loads(json.dumps(settings)), repeated)
        for partial in work.glob(".*-*"):  # left by a killed run
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        yield work


@contextlib.contextmanager
def _full_disk_as_user_error(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise UserError(
            f"the disk of {os.fspath(out)!r} is full: free some space and run the same command to resume"
        ) from error


def _check_settings(path: Path, settings: dict[str, object], repeated: Collection[str]) -> None:
    """Stores the settings of a new run; raises UserError if the run was started with others."""
    before = json.loads(path.read_text()) if path.exists() else settings
    names = [name for name in {**settings, **before} if before.get(name) != settings.get(name)]
    if fixed := [name for name in names if name not in repeated]:
        changed = "; ".join(f"{name} was {before.get(name)}, now {settings.get(name)}" for name in fixed)
        raise UserError(
            f"{os.fspath(path.parents[1])!r} was started with other settings ({changed}): "
            "use those, or name another --out"
        )
    if names:
        for stale in (*path.parents[1].glob(f"*{shards.SUFFIX}"), *path.parents[1].glob(f"*/*{shards.SUFFIX}")):
            stale.unlink()
    if names or not path.exists():
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(settings))
        temporary.replace(path)


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes one line of JSON per row."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def index_shards(out: Path, manifest: Mapping[str, Any]) -> None:
    """Stores the index of a set of many shards, with which training opens them at once."""
    if len(manifest["files"]) >= shards.MANY:
        shards.store_index(out, "latents" if "latents" in manifest else "video")


def write_manifest(out: Path, manifest: Mapping[str, object]) -> None:
    """Writes the manifest, which marks the set as finished."""
    with new_file(out / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def file_hashes(out: Path, paths: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Returns the size and SHA-256 of each file, keyed by its path relative to `out`."""
    return {path.relative_to(out).as_posix(): _size_and_hash(path) for path in paths}


def _size_and_hash(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}
