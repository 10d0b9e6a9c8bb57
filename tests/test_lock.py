"""The lock that allows one run at a time in a workdir."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from lavie_jax.curation import output
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


def refuse_flock(monkeypatch, code=errno.ENOLCK):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_flock_is_warned_of_and_still_keeps_a_second_run_out(code, tmp_path, monkeypatch):
    refuse_flock(monkeypatch, code)
    warnings = []
    monkeypatch.setattr(lock.logging, "warning", lambda text, *args: warnings.append(text % args))
    held = lock.Lock(tmp_path)
    assert len(warnings) == 1 and "without flock" in warnings[0]
    held.release()
    assert not (tmp_path / "lock").exists()
    (tmp_path / "lock").write_text(json.dumps({"host": platform.node(), "pid": os.getppid()}))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()} "):
        lock.Lock(tmp_path)
    os.utime(tmp_path / "lock", times=(time.time() - 2 * lock.STALE,) * 2)
    lock.Lock(tmp_path).release()  # no heartbeats: the number is another process's by now
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    (tmp_path / "lock").write_text(json.dumps({"host": platform.node(), "pid": process.pid}))
    lock.Lock(tmp_path).release()  # its process is gone


def test_a_disk_that_cannot_be_locked_is_one_line_and_nothing_is_left(tmp_path, monkeypatch):
    refuse_flock(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match=r"^--workdir .*/run cannot be locked: .*Input/output error"):
        lock.Lock(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_curation_takes_a_disk_without_flock(tmp_path, monkeypatch):
    refuse_flock(monkeypatch)
    warnings = []
    monkeypatch.setattr(output.logging, "warning", lambda text, *args: warnings.append(text % args))
    with output.open_output(tmp_path / "out", {"a": 1}) as work:
        assert work.is_dir()
    assert len(warnings) == 1 and "without flock" in warnings[0]


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
