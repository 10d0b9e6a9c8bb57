"""Tests of the lock that allows one run at a time in a workdir."""

import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from lavie_jax.errors import UserError
from lavie_jax.training import lock


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    first = lock.Lock(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on host {platform.node()}"):
        lock.Lock(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()  # unchanged by the refused run
    first.release()
    lock.Lock(tmp_path).release()
    assert not (tmp_path / "lock").exists()


def test_a_killed_process_holds_nothing(tmp_path):
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    hold += "f.write(sys.argv[2]); f.flush(); print(flush=True); time.sleep(600)"
    words = [sys.executable, "-c", hold, tmp_path / "lock", json.dumps({"host": platform.node(), "pid": 1})]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match="in use by process 1 "):
            lock.Lock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        lock.Lock(tmp_path).release()


@pytest.mark.parametrize("silent", [5, 2 * lock.STALE])
def test_a_lock_of_another_host_expires_without_heartbeats(silent, tmp_path):
    (tmp_path / "lock").write_text('{"host": "elsewhere", "pid": 7}')
    os.utime(tmp_path / "lock", times=(time.time() - silent,) * 2)
    if silent > lock.STALE:
        lock.Lock(tmp_path).release()
    else:
        message = "in use by process 7 on host elsewhere.*killed, delete .*/lock. Or wait [0-9]+ s"
        with pytest.raises(UserError, match=message):
            lock.Lock(tmp_path)
        (tmp_path / "lock").unlink()
        lock.Lock(tmp_path).release()


def test_a_run_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    held = lock.Lock(tmp_path)
    os.utime(tmp_path / "lock", times=(0, 0))
    deadline = time.monotonic() + 10
    while not (tmp_path / "lock").stat().st_mtime:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()


def test_an_empty_workdir_that_the_run_created_is_removed(tmp_path):
    held = lock.Lock(tmp_path / "run")
    held.release()
    assert not (tmp_path / "run").exists()
    held = lock.Lock(tmp_path)
    held.release()
    assert tmp_path.exists()  # existed before
