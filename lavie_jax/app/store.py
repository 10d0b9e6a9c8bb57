"""Jobs on disk: `OUT/{id}/job.json`, with the files that a job was given and those that it made.

The id is 128 random bits. Who has it can see the job, and nobody can guess it. Jobs of one browser have the same owner.

    OUT/{id}/job.json            what was asked for, and how far it has come
    OUT/{id}/inputs/             pictures, clip and LoRA files that were uploaded for it
    OUT/{id}/{stage}/            the video of each stage, and the JSON file of how it was made
    OUT/{id}/stages/             states of an unfinished job
"""

import contextlib
import dataclasses
import json
import re
import secrets
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from lavie_jax.disk import flock, new_file
from lavie_jax.errors import UserError, check_folder

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = "queued", "in_progress", "completed", "failed", "cancelled"
FINISHED = (COMPLETED, FAILED, CANCELLED)
VERSION = 1
KEPT = 256  # finished jobs in memory
_ID = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True)
class Result:
    """The video of one stage; paths are relative to the job's folder."""

    stage: str
    video: str
    json: str


@dataclasses.dataclass(kw_only=True)
class Job:
    """One video to make.

    Attributes:
        id: names its folder.
        owner: who asked for it; "" for a request without a browser.
        generation: what was asked for (`Generation.to_json`).
        created: when, in seconds since 1970; likewise `started` and `finished`.
        status: one of QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED.
        error: why it failed.
        notes: warnings, such as of words that the model does not know.
        results: the videos of the stages that are finished.
        stage: the stage that is running.
        phase: what it does, such as "denoising".
        share: how much of the job is done, from 0 to 1.
        seconds_left: estimate; None while there is nothing to estimate it from.
        stop: set when the job is to be cancelled.
    """

    id: str
    owner: str
    generation: Mapping[str, Any]
    created: float
    status: str = QUEUED
    started: float | None = None
    finished: float | None = None
    error: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    results: list[Result] = dataclasses.field(default_factory=list)
    # of a running job, in memory only
    stage: str | None = None
    phase: str | None = None
    share: float = 0.0
    seconds_left: float | None = None
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def is_finished(self) -> bool:
        """Whether nothing will change anymore."""
        return self.status in FINISHED

    def result(self, stage: str | None = None) -> Result | None:
        """Returns the video of a stage, by default of the last one that is finished."""
        found = [result for result in self.results if stage in (None, result.stage)]
        return found[-1] if found else None


_STORED = ("id", "owner", "generation", "created", "status", "started", "finished", "error", "notes", "results")


class Store:
    """The folder of all jobs. Memory holds their ids, and a few finished jobs."""

    def __init__(self, folder: Path):
        """Opens or makes the folder, and reads its jobs.

        Raises:
            UserError: it cannot be written, or another server uses it.
        """
        self.folder = folder.absolute()
        check_folder(self.folder, f"--out {folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = (self.folder / ".lock").open("w")
        if flock(self._lock_file) is False:
            self._lock_file.close()
            raise UserError(f"--out {folder} is in use by another server: end it, or choose another --out")
        self._lock = threading.Lock()
        self._by_owner: dict[str, dict[str, None]] = {}  # ids, oldest first
        self._read: dict[str, Job] = {}  # finished jobs that were read lately
        jobs = [job for path in self.folder.glob("*/job.json") if (job := self.get(path.parent.name)) is not None]
        jobs.sort(key=lambda job: job.created)
        for job in jobs:
            self._by_owner.setdefault(job.owner, {})[job.id] = None
        self.unfinished = [job for job in jobs if not job.is_finished]

    def close(self) -> None:
        """Lets another server use the folder."""
        self._lock_file.close()

    def new_id(self) -> str:
        """Returns the id of a new job, whose folder it makes."""
        id = secrets.token_hex(16)
        (self.folder / id).mkdir()
        return id

    def folder_of(self, id: str) -> Path:
        """The folder of a job. Raises ValueError for text that is not an id."""
        if not _ID.fullmatch(id):
            raise ValueError(f"not the id of a job: {id!r}")
        return self.folder / id

    def save(self, job: Job) -> None:
        """Writes a job."""
        content: dict[str, Any] = {name: getattr(job, name) for name in _STORED}
        content["results"] = [dataclasses.asdict(result) for result in job.results]
        text = json.dumps({"format_version": VERSION, **content}, indent=2, ensure_ascii=False) + "\n"
        with new_file(self.folder_of(job.id) / "job.json") as part:
            part.write_text(text, encoding="utf-8")
        with self._lock:
            self._by_owner.setdefault(job.owner, {})[job.id] = None

    def get(self, id: str) -> Job | None:
        """Reads a job; None if there is none of this id."""
        if not _ID.fullmatch(id):
            return None
        with self._lock:
            if (job := self._read.get(id)) is not None:
                return job
        job = self._from_disk(id)
        if job is not None and job.is_finished:
            with self._lock:
                self._read[id] = job
                if len(self._read) > KEPT:
                    self._read.pop(next(iter(self._read)))
        return job

    def _from_disk(self, id: str) -> Job | None:
        try:
            content = json.loads((self.folder / id / "job.json").read_text(encoding="utf-8"))
            results = [Result(**result) for result in content["results"]]
            return Job(**{name: content[name] for name in _STORED} | {"results": results, "id": id})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logging.warning("%s is not readable: %s", self.folder / id / "job.json", error)
            return None

    def ids_of(self, owner: str) -> list[str]:
        """The ids of an owner's jobs, newest first."""
        with self._lock:
            return list(reversed(self._by_owner.get(owner, {})))

    def path_of(self, job: Job, name: str) -> Path:
        """The file of a result."""
        return self.folder_of(job.id) / name

    def discard(self, id: str, owner: str = "") -> None:
        """Deletes a job and its files."""
        with self._lock:
            self._by_owner.get(owner, {}).pop(id, None)
            self._read.pop(id, None)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder_of(id))
