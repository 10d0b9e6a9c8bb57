"""A lock in a bucket of Google Cloud Storage that allows one run at a time in a workdir."""

import json
import math
import os
import platform
import threading
import time
from datetime import datetime
from urllib.parse import quote

from absl import logging

from lavie_jax import remote
from lavie_jax.errors import UserError
from lavie_jax.training.lock import BEAT, LOCK, STALE, alive

BOUNDARY = "==lavie=="  # between an object's description and its content


class BucketLock:
    """Holds the object `WORKDIR/lock` during a run.

    Every write names the generation that it replaces (0: none), so that of two runs only one succeeds, also when both
    take over a lock whose run was killed. The lock is stale a minute after its last heartbeat, or when its process, on
    this host, is gone.

    Raises:
        UserError: another run uses the workdir, or the bucket cannot be written.
    """

    def __init__(self, url: str):
        self._url, self._stopped = f"{url}/{LOCK}", threading.Event()
        self._workdir = url
        self._bucket, _, self._name = self._url.partition("://")[2].partition("/")
        with remote.one_line(url):
            self._system = remote.filesystem(url)
            existing = self._read()
            if existing is not None:
                self._check_stale(*existing)
            self._generation = self._write(0 if existing is None else existing[0])
            if self._generation is None:
                raise UserError(f"--workdir {url} was taken by another run at this moment: name another --workdir.")
        threading.Thread(target=self._beat, daemon=True).start()

    def _check_stale(self, generation: int, silent: float) -> None:
        """Raises UserError unless the run that wrote this generation, `silent` seconds ago, is gone."""
        try:
            holder = json.loads(self._system.cat_file(self._url))
        except ValueError:
            holder = {}
        here = holder.get("host") == platform.node()
        if silent >= STALE or (here and not alive(holder.get("pid"))):
            return
        raise UserError(
            f"--workdir {self._workdir} is in use by process {holder.get('pid', '?')} on host "
            f"{holder.get('host', '?')}: wait for it, stop it, or name another --workdir. If you are sure that it was "
            f"killed, wait {math.ceil(STALE - silent)} s: after {STALE:.0f} s without a heartbeat its lock expires."
        )

    def _read(self) -> tuple[int, float] | None:
        """Returns the lock's generation and its age in seconds, or None if there is none."""
        try:
            info = self._system.call("GET", "b/{}/o/{}", self._bucket, self._name, json_out=True)
        except FileNotFoundError:
            return None
        written = datetime.fromisoformat(info["updated"]).timestamp()
        return int(info["generation"]), time.time() - written

    def _write(self, generation: int) -> int | None:
        """Replaces this generation of the lock, and returns the new one; None if there is another generation by now."""
        path = f"{self._system._location}/upload/storage/v1/b/{quote(self._bucket)}/o"
        parts = [
            ("application/json; charset=UTF-8", {"name": self._name}),
            ("application/json", {"host": platform.node(), "pid": os.getpid()}),
        ]
        text = "".join(f"--{BOUNDARY}\nContent-Type: {kind}\n\n{json.dumps(part)}\n" for kind, part in parts)
        try:
            info = self._system.call(
                "POST", path, uploadType="multipart", ifGenerationMatch=str(generation), json_out=True,
                data=f"{text}--{BOUNDARY}--".encode(),
                headers={"Content-Type": f'multipart/related; boundary="{BOUNDARY}"'},
            )  # fmt: skip
        except Exception as error:
            if _precondition_failed(error):
                return None
            raise
        return int(info["generation"])

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                generation = self._write(self._generation)
            except Exception:  # the network: the next beat tries again
                continue
            if generation is None:
                logging.error("%s was taken by another run: this one was silent for too long", self._url)
                return
            self._generation = generation

    def release(self) -> None:
        """Removes the lock, if it is still this run's."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        try:
            self._system.call("DELETE", "b/{}/o/{}", self._bucket, self._name, ifGenerationMatch=str(self._generation))
        except Exception as error:  # it expires by itself
            logging.warning("%s could not be removed (%s); it expires after %.0f s", self._url, error, STALE)


def _precondition_failed(error: Exception) -> bool:
    """Whether the store refused a write because of its condition: HTTP status 412."""
    return isinstance(error, FileExistsError) or str(getattr(error, "code", "")) == "412"
