"""A run that is stopped, or killed at any moment, also inside a save, comes out as if nothing had happened."""

import importlib.util
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from lavie_jax import weights

SCRIPT = Path(__file__).parents[1] / "tools" / "crash_test.py"
STEPS = 60


@pytest.fixture
def crash_test():
    spec = importlib.util.spec_from_file_location("crash_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_stop_and_three_kills_change_nothing(crash_test, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = crash_test.finish(crash_test.start(whole, STEPS), whole)

    process = crash_test.start(parts, STEPS)
    deadline = time.monotonic() + 300
    while not (parts / "metrics.jsonl").exists() or not (parts / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    stopped = crash_test.finish(process, parts)
    at = crash_test.newest(parts)
    assert 0 < at < STEPS and stopped != wanted
    judged = json.loads((parts / f"checkpoints/{at}/metrics/metrics").read_text())
    assert judged == {"held_out": float("inf")}  # it was saved before anything was measured: there may be no time
    assert weights.load_folder(parts / "weights", stage="vae")

    assert crash_test.survive(parts, ["training", "save", "training"], steps=STEPS, seed=0) == wanted
    losses = crash_test.losses(whole)
    assert crash_test.losses(parts) == losses and len(losses) == STEPS
    shutil.rmtree(parts / "weights")  # as if it was killed before it could write them
    assert crash_test.finish(crash_test.start(parts, STEPS), parts) == wanted  # nothing else is left to do
    assert weights.load_folder(parts / "weights", stage="vae")

    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out/reconstruction"] < 0.8 * losses[1]  # it learns
    vae = weights.load_part(whole / "weights", "vae")
    np.testing.assert_allclose(1 / vae.config.scaling_factor, last["held_out/latent_std"], rtol=1e-6)

    refused = crash_test.start(parts, STEPS, seed=1)
    assert refused.wait(300) == 2
    error = parts.with_suffix(".err").read_text()
    assert "seed = 0, not 1" in error and error.count("error:") == 1
