"""Intermediate results of a sample: the lossless frames of every stage, and the state of an unfinished stage.

`OUT/stages/{stem}/{stage}.npy` contains frames, uint8 (T, H, W, 3), `{stage}.json` the request that they belong to, and
`{stage}.state.npz` the state during denoising. A stage that generates several segments has `{stage}.{segment}.npy` and
`{stage}.{segment}.state.npz` until all are finished. Every file is complete when its name appears, so that an
interrupted run resumes at the stage, segment and step where it stopped. A cache of another request is refused.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lavie_jax.disk import new_file
from lavie_jax.errors import UserError
from lavie_jax.stages.settings import complete

STATE = "state.npz"  # ending of the files that only an unfinished sample has


def segment_name(stage: str, index: int) -> str:
    """The name under which a cache holds one segment of a stage's output."""
    return f"{stage}.{index}"


class MemoryCache:
    """A stage cache in memory, which stores no states, for users of the library.

    Its methods take the name of a stage, or that of a segment (`segment_name`).

    Attributes:
        frames: finished frames by name.
        states: states of an interrupted run by name.
    """

    def __init__(self):
        self.frames, self.states = {}, {}

    def get(self, stage: str) -> UInt8[np.ndarray, "t h w 3"] | None:
        """Returns a stage's frames, or None if they are not finished."""
        return self.frames.get(stage)

    def put(
        self, stage: str, shape: tuple[int, ...], pieces: Iterable[UInt8[np.ndarray, "n h w 3"]]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Stores and returns frames of the given shape, which arrive in pieces. A stage's replace its segments'."""
        frames, start = np.empty(shape, np.uint8), 0
        for piece in pieces:
            frames[start : start + len(piece)] = piece
            start += len(piece)
        self.frames = {name: other for name, other in self.frames.items() if not name.startswith(f"{stage}.")}
        self.frames[stage] = frames
        return frames

    def load_state(self, stage: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """Returns (next step, arrays) of an unfinished stage, or None."""
        return self.states.get(stage)

    def save_state(self, stage: str, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Stores the state before step `step`."""

    def contents(self) -> list[tuple[str, int]]:
        """Returns the names of what is stored, with the next step of unfinished stages, -1 of others."""
        return sorted([(name, -1) for name in self.frames] + [(name, step) for name, (step, _) in self.states.items()])


class StageCache(MemoryCache):
    """A stage cache on disk.

    Attributes:
        folder: the folder of the files.
        records: {stage: everything that determines its frames, as JSON values}.
        keep: whether `clear` keeps the files of a finished sample.
    """

    def __init__(self, folder: Path, records: Mapping[str, Mapping[str, Any]], *, keep: bool):
        self.folder, self.records, self.keep = folder, records, keep

    def check(self) -> None:
        """Raises UserError if stored frames or states belong to another request."""
        for stage, record in self.records.items():
            path = self._path(stage, "json")
            if not path.exists():
                continue
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                stored = None
            if not isinstance(stored, dict):
                raise UserError(
                    f"{path} exists but does not record how its stage was generated; choose another --out, or "
                    "--overwrite"
                )
            stored = complete(stored)
            if name := next((n for n in sorted({*stored, *record}) if stored.get(n) != record.get(n)), None):
                raise UserError(
                    f"{path} was made with {name} = {json.dumps(stored.get(name))}, not {json.dumps(record.get(name))} "
                    "as requested now; choose another --out, or --overwrite"
                )

    def get(self, stage: str) -> UInt8[np.ndarray, "t h w 3"] | None:
        """Returns a stage's frames as a memory-mapped array, or None if they are not finished."""
        path = self._path(stage, "npy")
        return np.load(path, mmap_mode="r") if path.exists() else None

    def put(
        self, stage: str, shape: tuple[int, ...], pieces: Iterable[UInt8[np.ndarray, "n h w 3"]]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Writes frames as they arrive, so that memory holds one piece, and removes their state and segments."""
        self._record(stage)
        path = self._path(stage, "npy")
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        with new_file(path) as part, part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for piece in pieces:
                file.write(np.ascontiguousarray(piece).data)
        self._path(stage, STATE).unlink(missing_ok=True)
        for segment in self.folder.glob(f"{stage}.[0-9]*"):
            segment.unlink()
        return self.get(stage)

    def load_state(self, stage: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """Returns (next step, arrays) of an unfinished stage, or None without a readable state."""
        try:
            with self._path(stage, STATE).open("rb") as file, np.load(file) as arrays:
                state = dict(arrays)
            return int(state.pop("step")), state
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def save_state(self, stage: str, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Writes the state before step `step`."""
        self._record(stage)
        with new_file(self._path(stage, STATE)) as part, part.open("wb") as file:
            np.savez(file, step=step, **state)

    def in_memory(self) -> MemoryCache:
        """Returns a copy for a host that samples with others and does not write: the files change meanwhile."""
        copy = MemoryCache()
        for path in self.folder.glob("*.npy"):
            copy.frames[path.stem] = np.load(path)
        for path in self.folder.glob("*.state.npz"):
            name = path.name.removesuffix(".state.npz")
            if (state := self.load_state(name)) is not None:
                copy.states[name] = state
        return copy

    def clear(self) -> None:
        """Removes the files of a finished sample, unless `keep`."""
        if not self.keep:
            self.remove()

    def prepare_overwrite(self) -> None:
        """Discards stored frames of a different or finished request. Unfinished work of this request is kept."""
        try:
            self.check()
            discard = self.get(list(self.records)[-1]) is not None
        except UserError:
            discard = True
        if discard:
            self.remove()

    def remove(self) -> None:
        """Deletes the cache."""
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.parent.rmdir()
        except OSError:  # it contains caches of other samples, or does not exist
            pass

    def _record(self, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        stage, _, _ = stage.partition(".")  # segments have the record of their stage
        path = self._path(stage, "json")
        if not path.exists():
            with new_file(path) as part:
                part.write_text(json.dumps(self.records[stage], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _path(self, stage: str, ending: str) -> Path:
        return self.folder / f"{stage}.{ending}"
