"""Checkpoints, the parameter hash, and the files of metrics."""

import errno
import json
import os
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from lavie_jax import disk, parallel
from lavie_jax.errors import UserError
from lavie_jax.training import checkpoint, metrics, sinks
from lavie_jax.training.step import UNTRAINED

CONFIG = {
    "stage": "base", "seed": 0, "unet": {"block_out_channels": [32, 64]}, "steps": 10,
    "optimizer": {"kind": "adamw", "clip": 1.0},
    checkpoint.FROZEN: "this", checkpoint.FROZEN_PART: "none",
}  # fmt: skip


def state(value: float = 0.0) -> dict:
    """Returns arrays that do not compress, so that they are in a file of their own."""
    a = np.random.default_rng(int(value)).normal(size=(64, 64)).astype(np.float32)
    a[0, 0] = value
    return {"params": {"a": jnp.asarray(a)}, "step": jnp.int32(value)}


def abstract(mesh) -> dict:
    shapes = jax.eval_shape(state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, parallel.shardings(shapes, mesh)
    )


def saved(path, steps, keep=2, held_out=None, **policy):
    checkpoints = checkpoint.Checkpoints(path, keep=keep, **policy)
    for step in steps:
        checkpoints.save(step, state(step), CONFIG)
        checkpoints.measured(step, held_out[step] if held_out else 1.0)
    checkpoints.close()


def kept(path):
    return {int(p.name) for p in path.iterdir() if p.name.isdigit()}


def read(path, **options):
    """Returns the step that a run would resume at, and a value of its state."""
    checkpoints = checkpoint.Checkpoints(path, keep=2, **options)
    try:
        step = checkpoints.latest()
        return step, float(
            checkpoints.restore(step, abstract(parallel.make_mesh()), CONFIG, untrained={})["params"]["a"][0, 0]
        )
    finally:
        checkpoints.close()


def test_the_newest_are_kept_and_can_be_restored_on_another_mesh(tmp_path):
    saved(tmp_path, [1, 2, 3])
    assert {p.name for p in tmp_path.iterdir()} == {"2", "3", "held_out.json"}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() == 3
    mesh = parallel.make_mesh(data=4, fsdp=2)
    back = checkpoints.restore(3, abstract(mesh), {**CONFIG, "steps": 99}, untrained={})
    checkpoints.close()
    np.testing.assert_array_equal(back["params"]["a"], state(3.0)["params"]["a"])
    assert back["params"]["a"].sharding.mesh == mesh


def test_best_newest_and_every_nth_are_kept_across_a_restart(tmp_path):
    """The newest is never deleted in favour of the best, and a loss that is not finite is never the best."""
    held_out = {1: 3.0, 2: float("nan"), 3: 1.0, 4: 2.0, 5: float("inf"), 6: 4.0, 7: 5.0, 8: 6.0}
    policy = {"keep": 1, "best": 1, "every": 4, "held_out": held_out}
    saved(tmp_path, [1, 2, 3, 4, 5], **policy)
    assert kept(tmp_path) == {3, 4, 5}
    saved(tmp_path, [6, 7], **policy)
    assert kept(tmp_path) == {3, 4, 7}
    saved(tmp_path, [8], **{**policy, "held_out": {8: 0.5}})
    assert kept(tmp_path) == {3, 4, 8}  # 8 was measured after it was saved, and so after others were deleted
    saved(tmp_path, [9], **{**policy, "held_out": {9: 3.0}})
    assert kept(tmp_path) == {4, 8, 9}


def test_held_out_losses_of_earlier_versions_are_read_from_the_checkpoints(tmp_path):
    saved(tmp_path, [1, 2], keep=2, held_out={1: 0.5, 2: 3.0})
    for step, held_out in ((1, 0.5), (2, 3.0)):
        (tmp_path / f"{step}/metrics").mkdir()
        (tmp_path / f"{step}/metrics/metrics").write_text(json.dumps({"held_out": held_out}))
    (tmp_path / "held_out.json").unlink()
    saved(tmp_path, [3], keep=1, best=1, held_out={3: 2.0})
    assert kept(tmp_path) == {1, 3}


def half_copied(step):
    step.mkdir()
    (step / "part").write_text("of an incomplete copy")
    return "no _CHECKPOINT_METADATA"


def emptied(step):
    step.mkdir()
    return "no _CHECKPOINT_METADATA, no state/_METADATA, no meta/metadata"


def without_commit_file(step):
    shutil.copytree(step.parent / "1", step)
    (step / "commit_success.txt").unlink()
    return "no commit_success.txt"


def truncated(step):
    shutil.copytree(step.parent / "1", step)
    arrays = max((step / "state").rglob("*"), key=lambda p: p.stat().st_size if p.parent.name == "d" else 0)
    arrays.write_bytes(arrays.read_bytes()[: arrays.stat().st_size // 2])
    return "cannot be read"


@pytest.mark.parametrize("damage", [half_copied, emptied, without_commit_file, truncated])
def test_a_damaged_checkpoint_is_refused_by_name_and_an_older_one_offered(damage, tmp_path):
    saved(tmp_path, [1, 2], keep=5)
    why = damage(tmp_path / "7")
    files = sorted(p.relative_to(tmp_path / "7") for p in (tmp_path / "7").rglob("*"))
    with pytest.raises(UserError, match=rf"/7 .*{why}.*--restore-step 2 \(there are 1, 2\)"):
        read(tmp_path)
    assert read(tmp_path, restore_step=2) == (2, 2.0)
    (aside,) = tmp_path.glob("*-7-*")  # renamed, not deleted
    assert sorted(p.relative_to(aside) for p in aside.rglob("*")) == files
    saved(tmp_path, [7], keep=5)
    assert read(tmp_path) == (7, 7.0)


def test_going_back_sets_newer_checkpoints_aside(tmp_path):
    saved(tmp_path, [1, 2, 3], keep=5)
    with pytest.raises(UserError, match=r"no checkpoint .*/9. .*--restore-step 3"):
        read(tmp_path, restore_step=9)
    assert read(tmp_path, restore_step=1) == (1, 1.0)
    assert kept(tmp_path) == {1} and len(list(tmp_path.glob("newer-*"))) == 2
    saved(tmp_path, [2], keep=5)
    assert read(tmp_path, restore_step=1) == (1, 1.0)  # as by the next run in a container, with the same number
    assert kept(tmp_path) == {1} and len(list(tmp_path.glob("newer-*"))) == 3


def test_a_refused_restore_step_leaves_newer_checkpoints_in_place(tmp_path):
    saved(tmp_path, [1, 2, 3], keep=5)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, restore_step=1)
    assert checkpoints.latest() == 1
    with pytest.raises(UserError, match="seed = 0, not 5"):
        checkpoints.restore(1, abstract(parallel.make_mesh()), {**CONFIG, "seed": 5}, untrained={})
    checkpoints.close()
    assert kept(tmp_path) == {1, 2, 3} and read(tmp_path) == (3, 3.0)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of 5 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def noise(seed):
    return {"params": {"a": jax.random.normal(jax.random.key(seed), (512, 1024))}, "step": jnp.int32(seed)}


def test_a_full_disk_loses_the_new_checkpoint_and_no_older_one(small_disk):
    checkpoints = checkpoint.Checkpoints(small_disk / "checkpoints", keep=1)
    checkpoints.save(1, noise(1), CONFIG)
    assert checkpoints.settle()
    (small_disk / "other").write_bytes(bytes(3 << 20))
    for step in (2, 3):
        checkpoints.save(step, noise(step), CONFIG)
        assert not checkpoints.settle()
        assert checkpoints.latest() == 1 and kept(small_disk / "checkpoints") == {1}
    (small_disk / "other").unlink()
    checkpoints.save(4, noise(4), CONFIG)
    assert checkpoints.settle() and kept(small_disk / "checkpoints") == {4}
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(parallel.make_mesh())), noise(4)
    )
    np.testing.assert_array_equal(
        checkpoints.restore(4, shapes, CONFIG, untrained={})["params"]["a"], noise(4)["params"]["a"]
    )
    checkpoints.close()


def test_a_save_that_fails_for_another_reason_stops_the_run(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    with pytest.raises(ValueError, match="step"):
        checkpoints.save(1, {"step": object()}, CONFIG)
        checkpoints.settle()
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"unet": {"block_out_channels": [32]}}, r"unet.block_out_channels = \[32, 64\]"),
        ({"optimizer": {"kind": "muon", "clip": 1.0}}, "optimizer.kind = 'adamw', not 'muon'"),
        ({"optimizer": {"kind": "adamw", "clip": 0.0}}, "optimizer.clip = 1.0, not 0.0"),
        ({checkpoint.FROZEN: "other"}, "SHA-256 of the frozen models = 'this', not 'other'"),
        ({checkpoint.FROZEN_PART: "other"}, "SHA-256 of the untrained parameters in init_from = 'none', not 'other'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    saved(tmp_path, [1])
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    with pytest.raises(UserError, match=message):
        checkpoints.restore(1, abstract(parallel.make_mesh()), CONFIG | change, untrained={})
    checkpoints.close()


@pytest.mark.parametrize("random", [True, False])
def test_older_checkpoints_with_untrained_parameters_inside_are_read(random, tmp_path):
    """They had whole trees as "params" and "ema", and no hash of the untrained half."""
    whole = {"unet": {"conv": np.arange(3.0, dtype=np.float32), "temporal": np.full(2, 7.0, np.float32)}}
    old = {"params": whole, "ema": jax.tree.map(lambda x: x + 1, whole), "opt_state": np.ones(2), "step": np.int32(1)}
    manager = ocp.CheckpointManager(tmp_path)
    meta = {"step": 1, "config": {k: v for k, v in CONFIG.items() if k != checkpoint.FROZEN_PART}}
    manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(old), meta=ocp.args.JsonSave(meta)))
    manager.close()

    sharding = parallel.replicated(parallel.make_mesh())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), old)
    conv, temporal = ({"unet": {name: shapes["params"]["unet"][name]}} for name in ("conv", "temporal"))
    wanted = {**shapes, "params": temporal, "ema": temporal}
    config = CONFIG | {
        checkpoint.FROZEN_PART: checkpoint.array_hash({UNTRAINED: {"unet": {"conv": whole["unet"]["conv"]}}})
    }

    def restore(config):
        checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
        try:
            saved = wanted | ({UNTRAINED: conv} if random else {})
            return checkpoints.restore(1, saved, config, untrained={UNTRAINED: conv})
        finally:
            checkpoints.close()

    state = restore(config)
    np.testing.assert_array_equal(state["params"]["unet"].pop("temporal"), 7.0)
    np.testing.assert_array_equal(state["ema"]["unet"].pop("temporal"), 8.0)
    assert state["params"] == state["ema"] == {"unet": {}} and (UNTRAINED in state) == random
    if random:
        np.testing.assert_array_equal(state[UNTRAINED]["unet"]["conv"], whole["unet"]["conv"])
    else:
        with pytest.raises(UserError, match="other untrained parameters than those in init_from"):
            restore(CONFIG)


def test_parameter_hash_sees_one_bit_and_not_the_sharding():
    params = {"a": {"kernel": np.ones((4, 8), np.float32)}, "b": np.zeros(3, np.float32)}
    mesh = parallel.make_mesh(data=1, fsdp=8)
    first = checkpoint.parameter_hash(params)
    assert checkpoint.parameter_hash(parallel.put(params, parallel.shardings(params, mesh))) == first
    params["a"]["kernel"][0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert checkpoint.parameter_hash(params) != first


def test_metrics_of_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    writer = metrics.Metrics(tmp_path, step=0)
    for step in (5, 10, 15):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # killed while writing
    writer = metrics.Metrics(tmp_path, step=10)
    writer.write(20, {"loss": 2.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "loss": float(v)} for s, v in ((5, 5), (10, 10), (20, 2))]


def test_metrics_of_another_program_are_refused_and_kept(tmp_path):
    for text in ('{"loss": 1.0}\n', "step,loss\n"):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match="metrics.jsonl has a line that is not of a run"):
            metrics.Metrics(tmp_path, step=0)
        assert (tmp_path / "metrics.jsonl").read_text() == text


def with_tensorboard(workdir, step):
    others = sinks.Sinks(("tensorboard",), workdir, step=step, config={})
    return metrics.Metrics(workdir, step=step, sinks=others)


def test_event_files_hold_scalars_and_pictures(tmp_path):
    """Read by TensorBoard itself; what a killed run wrote after its checkpoint is hidden."""
    png = tmp_path / "a.png"
    Image.new("RGB", (30, 2)).save(png)
    for step, value in ((0, 0.5), (200, 0.25)):  # started, killed after step 300, resumed at 200
        writer = with_tensorboard(tmp_path, step)
        for at in (200, 300):
            if at > step:
                writer.write(at, {"loss": value})
        writer.picture(300, "samples", png)
        writer.close()
        time.sleep(1.1)  # TensorBoard sorts the files by their second
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(200, 0.5), (300, 0.25)]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (300, 30, 2)
    assert picture.encoded_image_string == png.read_bytes()


def test_means_leave_skipped_steps_out():
    rows = [{"loss": jnp.float32(a), "skipped": jnp.int32(b)} for a, b in ((1, 0), (np.nan, 1), (2, 0))]
    assert metrics.mean_of_steps(rows) == {"loss": 1.5, "skipped": 1}
    assert metrics.mean_of_steps(rows[1:2]) == {"skipped": 1}


def test_step_timer_separates_steps_data_and_the_rest(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    timer = metrics.StepTimer()

    def step(wait, work, compiled=False):
        with timer.waiting():
            now[0] += wait
        now[0] += work
        timer.step(compiled=compiled, flops=6e12)

    step(1.0, 9.0, compiled=True)  # does not count
    for work in (0.5, 1.5, 1.5, 3.5):
        step(0.5, work)
    step(0.5, 7.5, compiled=True)  # nor does another bucket's first step
    now[0] += 6.0  # a checkpoint
    timer.resume()
    step(0.5, 0.5)
    values = timer.report(batch=8, peak=12e12)
    assert values == {
        "goodput": 10 / 34, "clips_per_second": 4.0, "step_seconds_p50": 2.0, "step_seconds_p95": pytest.approx(3.6),
        "data_wait": 0.25, "mfu": 5 * 6e12 / 10 / 12e12,
    }  # fmt: skip
    assert timer.report(batch=8, peak=12e12) == {"goodput": 10 / 34}  # no steps since
    step(0.0, 1.0)
    assert "mfu" not in timer.report(batch=8, peak=0.0)


def test_memory_is_reported_where_devices_report_it(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None), Device({"peak_bytes_in_use": 3 * 2**30})])
    assert metrics.memory() == {"memory_gib": 3.0}
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert metrics.memory() == {}


def test_event_files_survive_a_full_disk(tmp_path, monkeypatch):
    """It ends TensorBoard's writing thread; the points of the next interval go to a new file."""
    with_events = with_tensorboard(tmp_path, 0)
    events = with_events._sinks._sinks["tensorboard"]
    monkeypatch.setattr(events._writer, "add_event", full_disk)
    with_events.write(1, {"loss": 1.0})
    with_events.write(2, {"loss": 2.0})
    with_events.close()
    accumulated = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in accumulated.Scalars("loss")] == [(2, 2.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_tolerated_full_disk_is_logged_and_other_errors_are_raised(caplog):
    with disk.tolerate_full_disk("something") as written:
        pass
    assert written
    with disk.tolerate_full_disk("something") as written:
        full_disk()
    assert not written and "something could not be written: the disk is full" in caplog.text
    with pytest.raises(ValueError), disk.tolerate_full_disk("something"):
        raise ValueError
