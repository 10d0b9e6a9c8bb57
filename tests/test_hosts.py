"""Hosts that train together end together, within seconds, with the reason in the first host's log. Two processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

ROOT = Path(__file__).parents[1]
LIMIT = 30.0  # seconds from a fault to the end of the last host

# The parts that an error can come from, without the minutes of compiling of a real run.
PROGRAM = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
import jax
from jax.experimental import multihost_utils
from lavie_jax import parallel
from lavie_jax.errors import UserError, one_line_errors
from lavie_jax.training import lock
from lavie_jax.training.hosts import Hosts

fault, workdir = sys.argv[1], Path(sys.argv[2])

def main(cleanup):
    parallel.initialise(distributed=True)
    hosts, host = Hosts(), jax.process_index()
    with hosts.leave_together():
        with hosts.agreed():
            if host == 0:
                held = lock.Lock(workdir)
                cleanup.callback(held.release)
                hosts.before_leaving(held.release)
        hosts.check_shared(workdir)
        with hosts.agreed():
            if fault == "data" and host == 1:
                raise UserError("no folder '/data'")
            if fault == "memory at the start" and host == 1:
                raise MemoryError("too little memory")
        multihost_utils.sync_global_devices("started")
        print("started", flush=True)
        if fault == "late" and host == 1 or fault == "late, first host" and host == 0:
            raise OSError("the disk went away")
        if fault != "none":
            multihost_utils.sync_global_devices("a step that waits for ever")
            if fault == "killed":
                time.sleep(600)
    print("ended", flush=True)

if __name__ == "__main__":
    with one_line_errors(), ExitStack() as stack:
        main(stack)
"""


def start(words, tmp_path):
    """Starts two hosts. `words(host)` are the arguments of Python. Returns the processes and their logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    logs, hosts = [tmp_path / f"host-{i}.log" for i in range(2)], []
    for i, log in enumerate(logs):
        env = {**os.environ, **shared, "JAX_PROCESS_ID": str(i), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        with log.open("w") as out:
            words_of_host = [sys.executable, *map(str, words(i))]
            hosts.append(subprocess.Popen(words_of_host, cwd=ROOT, env=env, stdout=out, stderr=out))
    return hosts, logs


def ended(hosts, logs):
    """Waits for both hosts. Returns their exit codes, their logs, and the seconds between their ends."""
    ends, end = {}, time.monotonic() + 300
    while len(ends) < 2 and time.monotonic() < end:
        ends |= {i: time.monotonic() for i, host in enumerate(hosts) if i not in ends and host.poll() is not None}
        time.sleep(0.05)
    for host in hosts:
        host.kill()
    assert len(ends) == 2, [log.read_text()[-2000:] for log in logs]
    return [host.returncode for host in hosts], [log.read_text() for log in logs], abs(ends[0] - ends[1])


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


FAULTS = [
    ("data", "host 1: no folder '/data'"),
    pytest.param("memory at the start", "host 1: MemoryError: too little memory", marks=pytest.mark.heavy),
    ("late", "host 1: OSError: the disk went away"),
    ("late, first host", "OSError: the disk went away"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_an_error_of_one_host_ends_both_with_the_reason_in_the_first_log(fault, reason, program, tmp_path):
    codes, logs, apart = ended(*start(lambda i: [program, fault, tmp_path / "run"], tmp_path))
    assert codes == [2, 2] and apart < LIMIT, (codes, logs)
    assert f"error: {reason}" in logs[0] and logs[0].count("error:") == 1, logs[0]
    assert ("started" in logs[0]) == fault.startswith("late")
    assert not (tmp_path / "run").exists()  # the lock is released, and nothing is left behind


def test_hosts_without_errors_end_normally(program, tmp_path):
    codes, logs, _ = ended(*start(lambda i: [program, "none", tmp_path / "run"], tmp_path))
    assert codes == [0, 0] and all("ended" in log for log in logs), logs


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.heavy)])
def test_a_host_that_is_killed_ends_the_other(victim, program, tmp_path):
    hosts, logs = start(lambda i: [program, "killed", tmp_path / "run"], tmp_path)
    end = time.monotonic() + 120
    while not all("started" in log.read_text() for log in logs):
        assert time.monotonic() < end and [host.poll() for host in hosts] == [None, None]
        time.sleep(0.05)
    hosts[victim].send_signal(signal.SIGKILL)
    codes, texts, apart = ended(hosts, logs)
    assert apart < LIMIT, texts
    if victim == 1:
        # Some collectives fail at once when a peer is gone; the heartbeat ends those that wait.
        assert codes[0] == 2 and re.search(
            "error: (host 1 is silent for 20 s|.*Connection (reset|closed))", texts[0]
        ), texts
        assert not (tmp_path / "run" / "lock").exists()
    else:
        assert codes[1] != 0


@pytest.mark.heavy
def test_hosts_that_do_not_share_the_workdir_are_refused(program, tmp_path):
    codes, logs, apart = ended(*start(lambda i: [program, "none", tmp_path / f"run-{i}"], tmp_path))
    assert codes == [2, 2] and apart < LIMIT, (codes, logs)
    assert "error: host 1: --workdir" in logs[0] and "is not the first host's" in logs[0]
    assert not list(tmp_path.glob("run-*"))


@pytest.mark.heavy
def test_two_hosts_make_one_sample_and_the_first_writes_it(tmp_path):
    """With a device each, through two stages; the sample is then found, and replaced on request."""
    weights = tiny.make_base(tmp_path / "weights" / "base").parent
    tiny.make_stage(weights / "interpolation", "interpolation")
    words = ["sample.py", "--weights", weights, "--prompt", "a red circle", "--stages", "base,interpolation"]
    words += ["--format", "npz", "--steps", "7"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    alone = [sys.executable, *map(str, words), "--out", str(tmp_path / "alone")]
    subprocess.run(alone, cwd=ROOT, env=environment, check=True, capture_output=True)

    def together(*more):
        started = start(lambda i: [*words, "--distributed", "--out", tmp_path / "out", *more], tmp_path)
        return ended(*started)

    codes, logs, _ = together()
    assert codes == [0, 0], logs
    assert "samples" not in logs[1] and "step" not in logs[1]
    (file,), (reference,) = (list((tmp_path / name).glob("*.npz")) for name in ("out", "alone"))
    video, expected = (np.load(path)["video"].astype(int) for path in (file, reference))
    assert video.shape == (13, 16, 24, 3) and np.abs(video - expected).max() <= 1
    codes, logs, _ = together()
    assert codes == [0, 0] and "1 of 1 samples exist" in logs[0], logs
    codes, logs, _ = together("--overwrite")
    assert codes == [0, 0] and np.array_equal(np.load(file)["video"], video), logs


@pytest.mark.heavy
def test_hosts_that_sample_other_prompts_are_refused(tmp_path):
    weights = tiny.make_base(tmp_path / "base")
    codes, logs, _ = ended(*start(lambda i: ["sample.py", "--weights", weights, "--prompt", "a red circle", "--seed", i,
                                             "--distributed", "--out", tmp_path / "out"], tmp_path))  # fmt: skip
    assert codes == [2, 2] and "error: the hosts differ in samples" in logs[0], logs
    assert not (tmp_path / "out").exists()
