"""The queue: jobs wait for one worker, which runs them in order. The page and the HTTP interface share it.

A job is on disk before it is accepted, so that a server that is ended or killed continues with the same queue, and an
unfinished job at the denoising step that was saved last.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from absl import logging

from lavie_jax.app.generation import Generation
from lavie_jax.app.store import CANCELLED, COMPLETED, FAILED, QUEUED, RUNNING, Job, Store
from lavie_jax.disk import is_full
from lavie_jax.errors import UserError

BROKEN = "Something went wrong on the server. Its log has the details."


class QueueFull(UserError):
    """As many jobs wait as are allowed."""


class Stopped(Exception):
    """Ends the work on a job between two steps: it was cancelled, or the server ends."""


def reason_of(error: Exception) -> str:
    """Returns what went wrong as a sentence for people, and logs what only the operator can mend."""
    if is_full(error):
        return "The server's disk is full."
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    logging.error("a request failed", exc_info=error)
    return BROKEN


class JobQueue:
    """Runs jobs one after the other in a thread.

    Args:
        store: the jobs on disk; unfinished ones are run again.
        plan: checks what is asked for, given the folder of its files, and returns warnings; raises UserError.
        run: makes the video of a job. It calls `check` between steps, and lets its `Stopped` pass.
        most_waiting: how many jobs may wait.
    """

    def __init__(
        self,
        store: Store,
        plan: Callable[[Generation, Path], list[str]],
        run: Callable[[Job], None],
        *,
        most_waiting: int,
    ):
        self.store, self._plan, self._run, self.most_waiting = store, plan, run, most_waiting
        self._changed = threading.Condition()
        self._live: dict[str, Job] = {}  # waiting and running jobs, in order
        self._unsaved: dict[str, Job] = {}  # finished jobs, from times when the disk was full
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        for job in store.unfinished:
            job.status = QUEUED
            self._live[job.id] = job
        store.unfinished = []

    def start(self) -> None:
        """Starts to work."""
        self._thread.start()

    def close(self) -> None:
        """Ends after the current step. Unfinished jobs stay on disk."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, owner: str, read: Callable[[Path], Generation]) -> Job:
        """Adds a job, which is completely checked before.

        Args:
            owner: who asks; "" without a browser.
            read: returns what is asked for, and writes its files into the folder that it is given.

        Raises:
            QueueFull: too many jobs wait.
            UserError: what is asked for is impossible.
        """
        with self._changed:
            self._check_room()
        id = self.store.new_id()
        try:
            inputs = self.store.folder_of(id) / "inputs"
            wanted = read(inputs)
            notes = self._plan(wanted, inputs)
            job = Job(id=id, owner=owner, generation=wanted.to_json(), created=time.time(), notes=notes)
            with self._changed:
                self._check_room()
                self.store.save(job)
                self._live[job.id] = job
                self._changed.notify_all()
        except BaseException:
            self.store.discard(id, owner)
            raise
        return job

    def _check_room(self) -> None:
        if len(self._live) > self.most_waiting:  # one of them is running
            raise QueueFull(f"{self.most_waiting} videos are waiting already: try again in a few minutes.")

    def find(self, id: str) -> Job | None:
        """Returns a job: its latest state if it is in the queue, else from disk."""
        with self._changed:
            job = self._live.get(id) or self._unsaved.get(id)
        return job or self.store.get(id)

    def ahead(self, id: str) -> int:
        """How many jobs are before this one."""
        with self._changed:
            return list(self._live).index(id) if id in self._live else 0

    def waiting(self) -> int:
        """How many jobs are not finished."""
        with self._changed:
            return len(self._live)

    def cancel(self, id: str) -> None:
        """Ends a job: a waiting one at once, a running one before its next step."""
        with self._changed:
            job = self._live.get(id)
            if job is None:
                return
            job.stop.set()
            if job.status == QUEUED:
                self._finish(job, CANCELLED)

    def delete(self, job: Job) -> None:
        """Deletes a finished job and its files."""
        with self._changed:  # not while its end is being stored, which would make its folder again
            self._unsaved.pop(job.id, None)
            self.store.discard(job.id, job.owner)

    def check(self, job: Job) -> None:
        """Raises Stopped if the work on the job is to end; called between steps."""
        if job.stop.is_set() or self._closing:
            raise Stopped

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._live and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                job = next(iter(self._live.values()))
                job.status, job.started = RUNNING, time.time()
            status, error = self._outcome(job)
            with self._changed:
                if status is None:
                    return
                job.error = error
                self._finish(job, status)

    def _outcome(self, job: Job) -> tuple[str | None, str | None]:
        """Runs a job; returns its status, None if the server ends, and what went wrong."""
        try:
            self._run(job)
        except Stopped:
            return (CANCELLED if job.stop.is_set() else None), None
        except Exception as error:  # of this job only: the others are still to be made
            return FAILED, reason_of(error)
        return COMPLETED, None

    def _finish(self, job: Job, status: str) -> None:
        """Stores the end of a job, and takes it from the queue."""
        job.status, job.finished, job.stage, job.phase, job.seconds_left = status, time.time(), None, None, None
        try:
            self.store.save(job)
        except (OSError, UserError) as error:  # a full disk must not stop the queue
            logging.error("job %s could not be stored: %s", job.id, error)
            self._unsaved[job.id] = job
        self._live.pop(job.id, None)
        self._changed.notify_all()
