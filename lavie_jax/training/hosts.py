"""Hosts that train together end together: the error of one ends the run on all of them, and the first host prints it.

A host whose program fails leaves the others waiting in a collective, for ever or until jax gives up after minutes.
Three things prevent that, all of them by the key-value store of jax's coordination service, which the first host runs:

* Errors at the start are shared: at the end of a `Hosts.agreed` block, every host reports whether it succeeded. All of
  them raise an error if one did not, so that each can clean up.
* Later, a host that fails stores the reason and leaves at once (`Hosts.leave_together`). A thread of each other host
  sees the reason within a second, prints it and ends the process, whatever the main thread waits for.
* That thread also sends the host's heartbeat. The first host watches all heartbeats, and ends the run if one stops.

With one host, everything here does nothing.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the only way to the key-value store

from lavie_jax.errors import AgreedError, UserError

BEAT = 1.0  # seconds between checks of the other hosts
SILENT = 20.0  # seconds without a heartbeat after which a host counts as dead
GRACE = 2.0  # seconds in which a host may report an error of its own before it leaves because of another's
PATIENCE = 5.0  # seconds that the first host stays for the others, which need its service to learn the reason
SHARED = 15.0  # seconds until a file of the first host must be visible to all: network disks are cached

PREFIX = "lavie_jax/"
FAILED, ALIVE, LEFT = "failed", "alive/", "left/"
OK = "ok"


class Hosts:
    """The hosts of this run. Must be made after `parallel.initialise`, on all of them."""

    def __init__(self):
        self._index, self._count = jax.process_index(), jax.process_count()
        self._client: Any = distributed.global_state.client if self._count > 1 else None
        self._clean: list[Callable[[], None]] = []
        self._leaving, self._closed = threading.Lock(), threading.Event()
        self._agreements = 0
        if self._client:
            self._set(f"{ALIVE}{self._index}", "0")
            threading.Thread(target=self._watch, name="hosts", daemon=True).start()

    def before_leaving(self, clean: Callable[[], None]) -> None:
        """Adds a function to be called before this process leaves because of an error, here or on another host."""
        self._clean.append(clean)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Encloses work that may fail on some hosts; must not contain collectives. Waits for all hosts at its end.

        Raises:
            AgreedError: a host raised an error in the block; it is this host's, or else that of the first with one.
        """
        if not self._client:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        self._agreements += 1
        key = f"agreed/{self._agreements}/"
        self._set(f"{key}{self._index}", OK if own is None else _line(own))
        reasons = [self._wait(f"{key}{host}") for host in range(self._count)]
        if own is not None:
            if not isinstance(own, UserError):
                traceback.print_exception(own)
            raise AgreedError(_line(own)) from own
        for host, reason in enumerate(reasons):
            if reason != OK:
                raise AgreedError(f"host {host}: {reason}")

    def check_shared(self, folder: Path) -> None:
        """Refuses a `folder` that is not the same on all hosts. The first host must have created it.

        Raises:
            AgreedError: another host does not see a file that the first one writes.
        """
        if not self._client:
            return
        file = None
        if self._index == 0:
            file = folder / f".hosts-{uuid.uuid4().hex}"
            with self.agreed():
                file.touch()
                self._set("shared", file.name)
        else:
            with self.agreed():
                pass
        try:
            with self.agreed():
                name, end = self._wait("shared"), time.monotonic() + SHARED
                while not folder.is_dir() or name not in os.listdir(folder):  # listing it makes NFS look again
                    if time.monotonic() > end:
                        raise UserError(
                            f"--workdir {folder} is not the first host's: a file written there is not visible on this "
                            "host. All hosts must share the folder, on a network disk with the same path."
                        )
                    time.sleep(0.2)
        finally:
            if file is not None:
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def leave_together(self, *together: type[Exception]) -> Iterator[None]:
        """Encloses a run on all hosts. An error in it ends the process at once, and those of the other hosts.

        Errors that all hosts raise, which are AgreedError and those of the classes `together`, unwind instead.
        """
        try:
            yield
        except (AgreedError, *together):
            self._closed.set()
            raise
        except (Exception, KeyboardInterrupt) as error:
            if not self._client:
                raise
            if not isinstance(error, UserError):
                if reason := self._reason_of_another():
                    self._leave(reason, own=False)
                traceback.print_exc()
            self._leave(_line(error), own=True)
        else:
            self.close()

    def close(self) -> None:
        """Waits for all hosts at the end of a run, and stops watching them."""
        with self.agreed():
            pass
        self._closed.set()

    def _watch(self) -> None:
        """Runs in a thread: sends heartbeats, and looks for errors of other hosts."""
        beats, seen, looked = 0, {host: ("", time.monotonic()) for host in range(self._count)}, time.monotonic()
        while not self._closed.wait(BEAT):
            beats += 1
            try:
                self._set(f"{ALIVE}{self._index}", str(beats))
                reason = self._get(FAILED)
                alive = dict(self._client.key_value_dir_get(PREFIX + ALIVE)) if self._index == 0 else {}
            except jax.errors.JaxRuntimeError as error:
                if not self._closed.is_set():
                    self._leave(f"the first host does not answer: {_line(error)}", own=False)
                return
            now = time.monotonic()
            if now - looked > SILENT / 2:  # this host was suspended: the others' silence means nothing
                seen = {host: (beat, now) for host, (beat, _) in seen.items()}
            looked = now
            for host in range(self._count) if self._index == 0 else ():
                beat = next((value for key, value in alive.items() if key.endswith(f"/{ALIVE}{host}")), "")
                seen[host] = seen[host] if beat == seen[host][0] else (beat, now)
                if not reason and now - seen[host][1] > SILENT:
                    reason = f"host {host} is silent for {SILENT:.0f} s: killed, out of memory, or not reachable"
                    self._fail(reason)
            if reason:
                time.sleep(GRACE)
                self._leave(reason, own=False)

    def _reason_of_another(self) -> str:
        """Returns why another host left, which may be why a collective failed here; "" if none did in a moment."""
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if reason := self._get(FAILED):
                    return reason
            time.sleep(0.1)
        return ""

    def _fail(self, reason: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was first, or the service is gone
            self._set(FAILED, reason, overwrite=False)

    def _leave(self, reason: str, *, own: bool) -> NoReturn:
        """Prints the reason and ends this process; the first host waits until the others know."""
        if not self._leaving.acquire(blocking=False):  # the other thread is about to end the process
            time.sleep(60 + PATIENCE)
        sys.stderr.write(f"\nerror: {reason}\n")
        sys.stderr.flush()
        if own:
            self._fail(f"host {self._index}: {reason}")
        end = time.monotonic() + PATIENCE
        for clean in self._clean:
            with contextlib.suppress(Exception):
                clean()
        for child in multiprocessing.active_children():  # data workers, which nobody else would end
            child.kill()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._set(f"{LEFT}{self._index}", "1")
            while self._index == 0 and time.monotonic() < end:
                if len(self._client.key_value_dir_get(PREFIX + LEFT)) == self._count:
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    def _set(self, key: str, value: str, *, overwrite: bool = True) -> None:
        self._client.key_value_set(PREFIX + key, value, allow_overwrite=overwrite)

    def _get(self, key: str) -> str:
        """Returns a value, "" if there is none."""
        try:
            return self._client.key_value_try_get(PREFIX + key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return ""
            raise

    def _wait(self, key: str) -> str:
        """Returns a value as soon as there is one. If its host fails instead, the watching thread ends the process."""
        while True:
            try:
                return self._client.blocking_key_value_get(PREFIX + key, 10_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


def _line(error: BaseException) -> str:
    """Returns an error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"[:1000]
