"""Checkpoints, the parameter hash, and the files of metrics."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from lavie_jax import parallel
from lavie_jax.errors import UserError
from lavie_jax.training import checkpoint, metrics

CONFIG = {"stage": "base", "seed": 0, "unet": {"block_out_channels": [32, 64]}, "steps": 10}


def state(value: float = 0.0) -> dict:
    return {"params": {"a": jnp.full((4, 8), value)}, "step": jnp.int32(value)}


def abstract(mesh) -> dict:
    shapes = jax.eval_shape(state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, parallel.shardings(shapes, mesh)
    )


def saved(path, steps, keep=2):
    checkpoints = checkpoint.Checkpoints(path, keep=keep)
    for step in steps:
        checkpoints.save(step, state(step), CONFIG)
    checkpoints.close()


def test_the_newest_are_kept_and_come_back_on_another_mesh(tmp_path):
    saved(tmp_path, [1, 2, 3])
    assert {p.name for p in tmp_path.iterdir()} == {"2", "3"}
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() == 3
    mesh = parallel.make_mesh(data=4, fsdp=2)
    back = checkpoints.restore(3, abstract(mesh), {**CONFIG, "steps": 99})
    checkpoints.close()
    np.testing.assert_array_equal(back["params"]["a"], np.full((4, 8), 3.0))
    assert back["params"]["a"].sharding.mesh == mesh


def test_half_a_checkpoint_is_not_taken_for_the_latest_and_not_deleted(tmp_path):
    saved(tmp_path, [1])
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "part").write_text("of a copy that was cut short")
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() == 1
    checkpoints.close()
    assert [p.read_text() for p in tmp_path.glob("incomplete-7-*/part")] == ["of a copy that was cut short"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"unet": {"block_out_channels": [32]}}, r"unet.block_out_channels = \[32, 64\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    saved(tmp_path, [1])
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    with pytest.raises(UserError, match=message):
        checkpoints.restore(1, abstract(parallel.make_mesh()), CONFIG | change)
    checkpoints.close()


def test_parameter_hash_sees_one_bit_and_not_the_sharding():
    params = {"a": {"kernel": np.ones((4, 8), np.float32)}, "b": np.zeros(3, np.float32)}
    mesh = parallel.make_mesh(data=1, fsdp=8)
    first = checkpoint.parameter_hash(params)
    assert checkpoint.parameter_hash(parallel.put(params, parallel.shardings(params, mesh))) == first
    params["a"]["kernel"][0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert checkpoint.parameter_hash(params) != first


def test_metrics_of_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    writer = metrics.Metrics(tmp_path, step=0, tensorboard=False)
    for step in (5, 10, 15):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # killed while writing
    writer = metrics.Metrics(tmp_path, step=10, tensorboard=False)
    writer.write(20, {"loss": 2.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": s, "loss": float(v)} for s, v in ((5, 5), (10, 10), (20, 2))]


def test_event_files_hold_scalars_and_pictures(tmp_path):
    """Read by TensorBoard itself; what a killed run wrote after its checkpoint is hidden."""
    png = tmp_path / "a.png"
    Image.new("RGB", (30, 2)).save(png)
    for step, value in ((0, 0.5), (200, 0.25)):  # started, killed after step 300, resumed at 200
        writer = metrics.Metrics(tmp_path, step=step, tensorboard=True)
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


def test_finite():
    assert metrics.finite({"a": 1.0})
    assert not metrics.finite({"a": 1.0, "b": float("nan")})
    assert not metrics.finite({"a": -np.inf})
