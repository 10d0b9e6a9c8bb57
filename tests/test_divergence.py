"""Steps without a finite loss or gradients are skipped and counted; too many in a row are dumped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lavie_jax import parallel, random
from lavie_jax.errors import UserError
from lavie_jax.training import divergence, optimizer
from lavie_jax.training.state import make_state
from lavie_jax.training.step import AVERAGE, Task, make_update, step_rng


def toy_task(rows_to_loss) -> Task:
    """Returns a task whose loss is that of one kernel times the mean of `rows_to_loss(batch)`."""

    def loss(params, frozen, batch, rng):
        value = jnp.square(params["kernel"]).sum() * rows_to_loss(batch["x"]).mean()
        return value, {"noise": random.normal(rng, batch["x"].shape).mean()}

    init = lambda rng: {"kernel": jnp.arange(1.0, 4.0)}  # noqa: E731
    return Task(init=init, start=None, frozen={}, loss=loss, held_out=loss, export=lambda *_: None)


def started(rows_to_loss=lambda x: x, **options):
    task, tx = toy_task(rows_to_loss), optax.adamw(0.1)
    state = make_state(task.init(None), task, tx)
    return state, jax.jit(make_update(task, tx, ema_decay=0.5, **options))


RNG = jax.random.key(3)
GOOD, BAD = {"x": np.ones(4, np.float32)}, {"x": np.array([1, np.nan, 1, 1], np.float32)}


def learnt(state):
    return {name: state[name] for name in ("params", "opt_state", "ema")}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_only_the_counters(accumulate):
    state, update = started(accumulate=accumulate)
    state, losses = update(state, {}, GOOD, RNG)
    before = learnt(state)
    assert losses["skipped"] == 0
    for row in (1, 2):
        state, losses = update(state, {}, BAD, RNG)
        assert losses["skipped"] == row and state["step"] == 1 + row and same(learnt(state), before)
    state, losses = update(state, {}, GOOD, RNG)
    assert losses["skipped"] == 0 and state["step"] == 4 and not same(learnt(state), before)
    assert np.isfinite(jax.tree.leaves(learnt(state))[0]).all()


@pytest.mark.parametrize("kind", optimizer.KINDS)
def test_the_learning_rate_depends_on_the_number_of_applied_updates(kind):
    """After two skipped steps the third update has the learning rate of a third update."""
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(kind=kind, warmup=4, learning_rate=1.0, clip=0.0), 10)
    task = toy_task(lambda x: x)
    update = jax.jit(make_update(task, tx, ema_decay=0.5))

    def learn(batches):
        state = make_state(task.init(None), task, tx)
        for batch in batches:
            state, _ = update(state, {}, batch, RNG)
        return state

    without, skipping = learn([GOOD] * 3), learn([GOOD, BAD, GOOD, BAD, GOOD])
    assert same(without["params"], skipping["params"])
    assert optimizer.updates_done(skipping["opt_state"]) == 3 and skipping["step"] == 5


def test_a_finite_loss_with_gradients_that_are_not_is_skipped():
    """The gradient of the square root at 0 is infinite."""
    state, _ = started()

    def loss(params, frozen, batch, rng):
        return jnp.sqrt(jnp.abs(params["kernel"] - params["kernel"])).sum(), {}

    task = dataclasses.replace(toy_task(lambda x: x), loss=loss)
    update = jax.jit(make_update(task, optax.adamw(0.1), ema_decay=0.5))
    after, losses = update(state, {}, GOOD, RNG)
    assert losses["loss"] == 0 and losses["skipped"] == 1 and same(learnt(after), learnt(state))


def test_too_many_in_a_row_stop_the_run_with_a_dump_that_reproduces_the_step(tmp_path):
    """Steps that were dispatched after the limit was reached must not change the dump."""
    state, update = started(skip_limit=3)
    monitor = divergence.DivergenceMonitor(tmp_path, config={}, dtype="float32", limit=3)
    batches = [GOOD, BAD, GOOD, BAD, BAD, {"x": BAD["x"][::-1]}, GOOD, GOOD, GOOD, GOOD]
    with pytest.raises(divergence.Diverged, match=r"3 steps in a row, up to step 6.*divergence .*/6"):
        for step, rows in enumerate(batches, start=1):
            state, losses = update(state, {}, rows, RNG)
            monitor.step(step, losses["skipped"], rows, state, wait=False)
    assert step == 8  # two more had been dispatched

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(parallel.make_mesh())), state
    )
    back, batch = divergence.load(tmp_path / "6", shapes)
    np.testing.assert_array_equal(batch["x"], BAD["x"][::-1])
    assert back["step"] == 5 and same(learnt(back), learnt(state))
    again, losses = update(back, {}, batch, RNG)
    assert losses["skipped"] == 1 and np.isnan(losses["loss"])
    assert losses["noise"] == jax.jit(lambda: jax.random.normal(step_rng(RNG, 5), (4,)).mean())()


def test_the_batch_of_a_dump_is_in_the_order_of_its_rows(tmp_path, monkeypatch):
    """On a 4x4 slice of v5e, the first host has rows 0, 1, 6 and 15."""
    whole, state = {"x": np.arange(8.0)}, {"w": jnp.ones(2)}
    for host, rows in enumerate([[0, 1, 6], [2, 7], [3, 4, 5]]):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        with monkeypatch.context() as one:  # the state is saved once, by the first
            one.setattr(divergence.ocp.StandardCheckpointer, "save", lambda *_, **__: (tmp_path).mkdir(exist_ok=True))
            divergence.dump(tmp_path, 3, state, {"x": whole["x"][rows]}, {"processes": 3}, indices=rows)
    monkeypatch.setattr(divergence.ocp.StandardCheckpointer, "restore", lambda *_, **__: {})
    np.testing.assert_array_equal(divergence.load(tmp_path, {})[1]["x"], whole["x"])


def test_a_replayed_step_reads_the_average_that_the_run_read(tmp_path, monkeypatch):
    """As the targets of consistency distillation do."""

    def loss(params, frozen, batch, rng):
        return frozen[AVERAGE]["kernel"].sum() * batch["x"].mean() + 0 * params["kernel"].sum(), {}

    task = dataclasses.replace(toy_task(lambda x: x), loss=loss)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(), 10)
    state = make_state(task.init(None), task, tx) | {"ema": {"kernel": jnp.full(3, 5.0)}}
    config = {"cpu_devices": 0, "batch": 4, "accumulate": 1, "optimizer": {}, "steps": 10, "seed": 3}
    divergence.dump(tmp_path, 1, state, GOOD, {"config": config, "dtype": "float32", "processes": 1})
    monkeypatch.setattr(divergence.build, "make_task", lambda *_: (task, None))
    assert "update 1, float32, on 4 x cpu: gradient_norm 0, loss 15" in next(divergence.replay(tmp_path, tmp_path))


def test_a_dump_that_a_full_disk_cut_short_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "config.json").write_text('{"config": ')
    with pytest.raises(UserError, match="config.json cannot be read as JSON"):
        next(divergence.replay(tmp_path, tmp_path))


def test_waiting_detects_a_skipped_step_immediately(tmp_path):
    state, update = started(skip_limit=1)
    monitor = divergence.DivergenceMonitor(tmp_path, config={}, dtype="float32", limit=1)
    state, losses = update(state, {}, BAD, RNG)
    with pytest.raises(divergence.Diverged, match="1 steps in a row, up to step 1"):
        monitor.step(1, losses["skipped"], BAD, state, wait=True)
