"""What a sample leaves behind on its way: every stage's frames, exact, and the state of a stage that is not done.

`OUT/stages/{stem}/{stage}.npy` holds uint8 (T, H, W, 3), `{stage}.json` beside it what it was made with, and while the
stage is at work `{stage}.state.npz` has the denoising state. Every file is complete when its name appears, so a run
that was killed goes on at the stage and the step where it was. A shelf that another request has filled is refused.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from lavie_jax.data.video_files import finished
from lavie_jax.errors import UserError
from lavie_jax.samples.settings import complete


class Memory:
    """A shelf that keeps frames in memory and no states: for those who call the library."""

    def __init__(self):
        self.frames = {}

    def get(self, stage: str) -> UInt8[np.ndarray, "t h w 3"] | None:
        """A stage's frames, None when they are not finished."""
        return self.frames.get(stage)

    def put(
        self, stage: str, shape: tuple[int, ...], pieces: Iterable[UInt8[np.ndarray, "n h w 3"]]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Keep a stage's frames, of that shape, which come in pieces; returns them."""
        self.frames[stage] = np.concatenate(list(pieces))
        return self.frames[stage]

    def load_state(self, stage: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """(next step, arrays) of an unfinished stage, None when there is none."""
        return None

    def save_state(self, stage: str, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Keep the state that step number `step` starts from."""


class Shelf(Memory):
    """A shelf on disk. `records`: for each stage all that decides its frames, as JSON values.

    Without `keep` nothing is left once the sample is finished (`clear`).
    """

    def __init__(self, folder: Path, records: Mapping[str, Mapping[str, Any]], *, keep: bool):
        self.folder, self.records, self.keep = folder, records, keep

    def check(self) -> None:
        """UserError when something on the shelf was made with other settings."""
        for stage, record in self.records.items():
            path = self._path(stage, "json")
            if not path.exists():
                continue
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise UserError(
                    f"{path} is there but does not say how its stage was made; choose another --out, or --overwrite"
                )
            found = complete(found)
            if name := next((n for n in sorted({*found, *record}) if found.get(n) != record.get(n)), None):
                raise UserError(
                    f"{path} was made with {name} = {json.dumps(found.get(name))}, asked for is "
                    f"{json.dumps(record.get(name))}; choose another --out, or --overwrite"
                )

    def get(self, stage: str) -> UInt8[np.ndarray, "t h w 3"] | None:
        """A stage's frames as a mapped file: only what is looked at is read."""
        path = self._path(stage, "npy")
        return np.load(path, mmap_mode="r") if path.exists() else None

    def put(
        self, stage: str, shape: tuple[int, ...], pieces: Iterable[UInt8[np.ndarray, "n h w 3"]]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Write a stage's frames as they come, so that memory holds one piece; its state is done with."""
        self._record(stage)
        path = self._path(stage, "npy")
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        with finished(path) as part, part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for piece in pieces:
                file.write(np.ascontiguousarray(piece).data)
        self._path(stage, "state.npz").unlink(missing_ok=True)
        return self.get(stage)

    def load_state(self, stage: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """(next step, arrays) of an unfinished stage, None when there is none that can be read."""
        try:
            with self._path(stage, "state.npz").open("rb") as file, np.load(file) as arrays:
                state = dict(arrays)
            return int(state.pop("step")), state
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def save_state(self, stage: str, step: int, state: Mapping[str, np.ndarray]) -> None:
        """Write the state that step number `step` starts from."""
        self._record(stage)
        with finished(self._path(stage, "state.npz")) as part, part.open("wb") as file:
            np.savez(file, step=step, **state)

    def clear(self) -> None:
        """The sample is finished: remove what nobody needs any more."""
        if not self.keep:
            self.remove()

    def renew(self) -> None:
        """Take off what --overwrite replaces: another request's frames, or a finished sample. What this very request
        left half done stays, to be gone on with."""
        try:
            self.check()
            finished = self.get(list(self.records)[-1]) is not None
        except UserError:
            finished = True
        if finished:
            self.remove()

    def remove(self) -> None:
        """Take everything off the shelf."""
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.parent.rmdir()
        except OSError:  # other samples' shelves are in it, or it never was
            pass

    def _record(self, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(stage, "json")
        if not path.exists():
            with finished(path) as part:
                part.write_text(json.dumps(self.records[stage], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _path(self, stage: str, ending: str) -> Path:
        return self.folder / f"{stage}.{ending}"
