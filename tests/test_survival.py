"""Whole runs of train.py whose training diverges, or whose disk is full."""

import contextlib
import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from lavie_jax import parallel
from lavie_jax.errors import UserError
from lavie_jax.training import checkpoint, divergence, lock

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs train.py in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(parallel, "keep_compiled_programs", lambda: None)
    one_device = functools.partial(parallel.make_mesh, devices=jax.devices()[:1])  # faster to compile
    monkeypatch.setattr(parallel, "make_mesh", one_device)

    def run(workdir, *words, **fields):
        fields = {"steps": 6, "log_every": 1, "checkpoint_every": 2, "held_out_every": 6, **fields}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        with contextlib.ExitStack() as cleanup:
            train.main(["--config=configs/moving_shapes/vae.py:tiny", f"--workdir={workdir}", *flags, *words], cleanup)

    return run


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.heavy  # test_divergence.py dumps steps and repeats them without a run
def test_a_run_that_diverges_stops_and_leaves_a_dump_that_shows_why(run, tmp_path, capsys):
    workdir = tmp_path / "run"
    with pytest.raises(divergence.Diverged, match="2 steps in a row, up to step"):
        run(workdir, **{"optimizer.learning_rate": 1e30, "optimizer.warmup": 0, "skip_limit": 2})
    (dump,) = (workdir / "diverged").iterdir()
    with np.load(dump / "batch-0.npz") as batch:
        assert batch["step"] == int(dump.name) - 1 and batch["batch/images"].shape[0] == 8
    assert (dump / "state").is_dir() and not (workdir / "lock").exists()
    assert [row["loss"] for row in lines(workdir) if "loss" in row]  # averages are over finite steps
    assert sum(row.get("skipped", 0) for row in lines(workdir)) == 1  # the second one stopped the run

    capsys.readouterr()
    divergence.main([str(dump)])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"update {dump.name}, float32, on 8 x cpu: ") and re.search(r"[ ,]loss (nan|inf)", first)
    assert "the batch: all finite" in rest
    assert any(re.fullmatch(r"gradients: \d+ of \d+ arrays are not finite", line) for line in rest)
    assert any(re.fullmatch(r"  decoder/\S+/kernel: \d+ of \d+ numbers", line) for line in rest)
    (dump / "batch-0.npz").rename(dump / "batch-1.npz")
    for wrong, message in ((workdir, "is not a dump of a step"), (dump, "lacks batch-0.npz")):
        with pytest.raises(SystemExit, match="2"):
            divergence.main([str(wrong)])
        assert message in capsys.readouterr().err


@pytest.mark.heavy  # test_train.py has the schedules without a run
def test_the_logged_learning_rate_is_the_applied_one(run, tmp_path, monkeypatch):
    """A batch that is not finite skips an update, so that warm-up takes a step longer."""
    put, calls = parallel.put_batch, []

    def with_nan(rows, mesh):
        calls.append(rows)
        if len(calls) == 3:  # the first is the held-out batch
            rows = {k: v * np.float32(np.nan) if v.dtype == np.uint8 else v for k, v in rows.items()}
        return put(rows, mesh)

    monkeypatch.setattr(parallel, "put_batch", with_nan)
    run(tmp_path / "run", held_out_batches=1, steps=4)
    rows = [row for row in lines(tmp_path / "run") if "skipped" in row]
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], [0, 0, 3e-3 / 5, 2 * 3e-3 / 5], atol=1e-7)


@pytest.mark.heavy  # test_checkpoint.py has one that is tolerated, without a run
def test_a_full_disk_stops_the_run_only_at_its_end(run, tmp_path, monkeypatch, caplog):
    """Saves fail from step 4 on; the run trains to its end, reports the error, and can be completed later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    save = checkpoint.Checkpoints.save

    def fill(self, step, *args, **options):
        self.settle()
        if step == 4:
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free))
        save(self, step, *args, **options)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Checkpoints, "save", fill)
            with pytest.raises(checkpoint.Unsaved, match="the disk is full: the run is at step 6"):
                run(disk / "run")
        assert "the disk is full. Training continues" in caplog.text
        assert {p.name for p in (disk / "run/checkpoints").iterdir()} == {"2", checkpoint.HELD_OUT}
        (disk / "other").unlink()
        run(disk / "run", "--profile")
        assert {p.name for p in (disk / "run/checkpoints").iterdir()} == {"4", "6", checkpoint.HELD_OUT}
        assert {row["step"] for row in lines(disk / "run") if "loss" in row} == {1, 2, 3, 4, 5, 6}
        assert {"goodput", "step_seconds_p50", "step_seconds_p95", "data_wait"} <= set(lines(disk / "run")[-2])
        assert list((disk / "run/profile").rglob("*.xplane.pb"))
        held = lock.Lock(disk / "run")
        with pytest.raises(UserError, match="in use by process"):
            run(disk / "run")
        held.release()
    finally:
        subprocess.run(["umount", disk], check=True)
