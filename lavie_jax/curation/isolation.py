"""Calls functions in a process of its own, which may crash, hang or be killed without harm to the caller."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from lavie_jax.errors import UserError

LONGEST = 2e6  # seconds, 23 days: a pipe cannot wait for longer


class Interrupted(Exception):
    """A call did not return; the message says why: its process died, or it ran out of time."""


class OutOfTime(Interrupted):
    """A call took longer than its limit."""


class Worker:
    """A process that is started for the first call, and again after it died.

    Args:
        initializer: is called with `arguments` in the process when it starts, for example to load models.
    """

    def __init__(self, initializer: Callable[..., None], *arguments: Any):
        self._start = (initializer, arguments)
        self._process: Any = None
        self._pipe: Any = None
        self._closed = False

    def __call__(self, function: Callable, *arguments: Any, seconds: float = 0.0) -> Any:
        """Returns what the function returns, or raises what it raises.

        Args:
            function: of a module, as it is pickled, like its arguments.
            seconds: limit after which the process is killed; 0 = none.

        Raises:
            Interrupted: the process died or ran out of time. The next call starts another.
        """
        if self._closed:
            raise RuntimeError("this worker is closed")
        if self._process is None:
            # A fork would copy locks held by threads of libraries.
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
            self._process.start()
            theirs.close()
            self._exchange(*self._start, seconds=0.0)
        return self._exchange(function, arguments, seconds=seconds)

    def _exchange(self, function: Callable, arguments: tuple, *, seconds: float) -> Any:
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(min(seconds, LONGEST) or None):
                self._end()
                raise OutOfTime(f"took longer than {seconds:g} s")
            returned, value = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            if self._closed:
                raise RuntimeError("this worker was closed") from error
            raise Interrupted(self._cause_of_death()) from error
        if not returned:
            raise value
        return value

    def _cause_of_death(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        self._end()
        if code is not None and code < 0:
            how = signal.Signals(-code).name
            return f"was killed by {how}" + (", perhaps for lack of memory" if how == "SIGKILL" else "")
        return f"ended with exit code {code}"

    def close(self) -> None:
        """Ends the process for good, also within a call of another thread."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if process is not None:
            process.kill()
            process.join()
            pipe.close()


def _serve(pipe: Any, parent: int) -> None:
    """Runs in the process: answers calls until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, error)
        try:
            content = pickle.dumps(answer)
            pickle.loads(content)  # some exceptions can be pickled only
        except Exception:
            content = pickle.dumps((False, UserError(f"{type(answer[1]).__name__}: {answer[1]}")))
        pipe.send_bytes(content)


def _die_with(parent: int) -> None:
    """Ends this process when its parent is gone, even while a call hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
