"""A run that is stopped, killed at any moment, or shared by two hosts gives the same result as an uninterrupted one."""

import importlib.util
import json
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from lavie_jax import weights

SCRIPT = Path(__file__).parents[1] / "tools" / "crash_test.py"
STEPS = 24  # a checkpoint every 4 of them: room for a stop, a kill and repeated ones


@pytest.fixture(scope="module")
def crash_test():
    spec = importlib.util.spec_from_file_location("crash_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(crash_test, tmp_path_factory):
    """Returns the workdir of an uninterrupted run and the hash of its parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, crash_test.finish(crash_test.start(workdir, STEPS, checkpoint_every=STEPS), workdir)


def test_a_stop_and_a_kill_do_not_change_the_result(crash_test, whole, tmp_path):
    (whole, expected), parts = whole, tmp_path / "parts"
    process = crash_test.start(parts, STEPS)
    deadline = time.monotonic() + 300
    while not (parts / "metrics.jsonl").exists() or not (parts / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    stopped = crash_test.finish(process, parts)
    at = crash_test.newest(parts)
    assert 0 < at < STEPS and stopped != expected
    held_out = json.loads((parts / "checkpoints/held_out.json").read_text())
    assert np.isfinite(held_out[str(at)])  # measured after the save
    assert weights.load_folder(parts / "weights", stage="vae")

    assert crash_test.survive(parts, ["save"], steps=STEPS, seed=0) == expected
    losses = crash_test.losses(whole)
    assert crash_test.losses(parts) == losses and len(losses) == STEPS
    shutil.rmtree(parts / "weights")  # as if killed before they were written
    assert crash_test.finish(crash_test.start(parts, STEPS), parts) == expected  # only the export is left
    assert weights.load_folder(parts / "weights", stage="vae")

    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out/reconstruction"] < 0.8 * losses[1]  # it learns
    vae = weights.load_part(whole / "weights", "vae")
    np.testing.assert_allclose(1 / vae.config.scaling_factor, last["held_out/latent_std"], rtol=1e-6)


@pytest.mark.heavy  # test_hosts.py starts and ends two hosts
def test_two_hosts_train_and_stop_together_and_one_of_them_resumes(crash_test, whole, tmp_path):
    """Two processes, a device each, share the parameters. One receives the signal and both stop; then one resumes."""
    workdir, second = tmp_path / "run", tmp_path / "second"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    fields = {"checkpoint_every": 100_000, "distributed": True, "mesh.fsdp": 2}
    hosts = [
        crash_test.start(workdir, 100_000, log=log, env={**shared, "JAX_PROCESS_ID": str(i)}, **fields)
        for i, log in enumerate((workdir, second))
    ]
    deadline = time.monotonic() + 600
    while len(crash_test.losses(workdir)) < 4:
        assert [host.poll() for host in hosts] == [None, None] and time.monotonic() < deadline
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGUSR1)  # which that host turns into a SIGTERM of its own
    crash_test.finish(hosts[0], workdir)
    assert hosts[1].wait(600) == 0, second.with_suffix(".err").read_text()
    vae = weights.load_part(workdir / "weights", "vae")
    assert vae.params["encoder"]["conv_in"]["kernel"].shape == (3, 3, 48, 16)
    at = crash_test.newest(workdir)
    assert f"stopped at step {at} of 100000" in workdir.with_suffix(".err").read_text()

    crash_test.finish(crash_test.start(workdir, at + 1), workdir)
    assert f"resumed at step {at} of {at + 1}" in workdir.with_suffix(".err").read_text()

    one, two = (crash_test.losses(run) for run in (whole[0], workdir))
    assert {step: two[step] for step in (1, 2, 3)} == pytest.approx({step: one[step] for step in (1, 2, 3)}, rel=1e-4)
