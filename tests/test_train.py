"""Training: its parts on toy tasks, and whole runs of train.py from the command line."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from lavie_jax import parallel, random
from lavie_jax.data import pipeline
from lavie_jax.data.tokens import load_tokenizer
from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages import STAGES
from lavie_jax.training import autoencoder, build, diffusion, initial, optimizer, options
from lavie_jax.training.state import abstract_params, init_state, make_state, place_frozen
from lavie_jax.training.step import UNTRAINED, Task, make_gradients, make_held_out, make_update, step_rng, update_ema

ROOT = Path(__file__).parents[1]


# ---- parts ----


def toy_task(regime: str = "joint", images_only: bool = False) -> Task:
    """Returns a linear regression with temporal and spatial parameters, and noise from the step's key."""

    def loss(params, frozen, batch, rng):
        unet = params["unet"]
        x = batch["x"] @ unet["conv"]["kernel"] + unet["attn_temporal"]["bias"]
        x += unet["motion_embedding_temporal"]["bias"]
        value = jnp.square(x - frozen["target"]).mean()
        return value, {"noise": random.normal(rng, x.shape).mean()}

    bias = {"bias": jnp.ones(2)}
    params = {"unet": {"conv": {"kernel": jnp.ones((3, 2))}, "attn_temporal": bias, "motion_embedding_temporal": bias}}
    return Task(
        init=lambda rng: params, start=None, frozen={"target": jnp.arange(2.0)}, loss=loss, held_out=loss,
        export=lambda *_: None, regime=regime, images_only=images_only,
    )  # fmt: skip


def one_update(task: Task, *, accumulate: int = 1, tx=None):
    tx = tx or optax.sgd(0.1)
    params = task.init(None)
    state, frozen = make_state(params, task, tx), {**task.frozen, UNTRAINED: task.split(params)[1]}
    update = make_update(task, tx, ema_decay=0.5, accumulate=accumulate)
    return update(state, frozen, {"x": jnp.arange(24.0).reshape(8, 3) / 24}, jax.random.key(0))


def test_accumulated_parts_give_the_update_of_the_whole_batch():
    (whole, losses), (parts, part_losses) = one_update(toy_task()), one_update(toy_task(), accumulate=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, parts)
    for name in ("loss", "noise"):
        np.testing.assert_allclose(losses[name], part_losses[name], rtol=1e-6)


class Linear:
    """A stand-in for any network: its output is linear in its input and depends on every value of it."""

    def __init__(self, config):
        self.config = config

    def clone(self, **_):
        return self

    def apply(self, params, x, t=None, text=None, method="", **more):
        y = x * params["params"]["scale"] + 0.1 * x.mean(axis=(-3, -2), keepdims=True)
        if method == "encode":
            small = einops.reduce(y, "... (h i) (w j) c -> ... h w c", "mean", i=2, j=2)
            return small, jnp.tanh(small)
        if method == "decode":
            return jnp.repeat(jnp.repeat(y, 2, axis=-2), 2, axis=-3)
        shift = more.get("noise_level", t) + more["image_t"].sum(axis=1)
        return y[..., :3] * (1 + shift / 1000)[:, None, None, None, None]


def drawing_task(stage: str) -> Task:
    """Returns the task of a stage or of the VAE, configured to use every kind of random number."""
    vae = VAEConfig(latent_channels=3, block_out_channels=(8, 8), norm_num_groups=4)
    if stage == "vae":
        task = autoencoder.make_autoencoder_task(
            vae, autoencoder.AutoencoderLoss(crop=4, kl=1.0), side=(8, 8), dtype=jnp.float32
        )
        return dataclasses.replace(task, init=lambda _: {"scale": jnp.ones(3)})
    models = object.__new__(diffusion.Models)  # its constructor checks types
    for name, value in (("unet", Linear(None)), ("vae", Linear(vae)), ("schedule", Schedule())):
        object.__setattr__(models, name, value)
    losses = diffusion.StageLoss(
        stage=STAGES[stage], models=models, frames=5, images=2, train_text_encoder=False,
        loss=diffusion.DiffusionLoss(min_snr_gamma=5.0, logit_normal=(0.0, 1.0) if stage == "base" else ()),
        options={group: cls() for group, cls in STAGES[stage].info.training.items()},
    )  # fmt: skip
    return Task(
        init=lambda _: {"unet": {"scale": jnp.ones(3 + {"base": 0, "prediction": 4}.get(stage, 3))}}, start=None,
        frozen={"vae": {"scale": jnp.ones(3)}}, loss=losses.train, held_out=losses.held_out, export=lambda *_: None,
        judged_by="video_loss",
    )  # fmt: skip


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    "stage",
    ["vae", "base", "vsr", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("prediction", "interpolation"))],
)
def test_losses_and_gradients_do_not_depend_on_the_number_of_parts(stage, parts, monkeypatch):
    """Each row has the same noise, timesteps and crops in 1, 2 and 4 parts. The same holds for held-out losses."""
    monkeypatch.setattr(autoencoder, "VAE", lambda config, dtype: Linear(config))
    encode = lambda vae, params, frames: vae.apply({"params": params}, frames, method="encode")  # noqa: E731
    monkeypatch.setattr(diffusion, "encode_frames", encode)
    task, rng = drawing_task(stage), np.random.default_rng(0)
    params, frames = task.init(None), {"video": 5, "images": 2}
    batch = {name: rng.uniform(-1, 1, (4, n, 8, 8, 3)).astype(np.float32) for name, n in frames.items()}
    if stage != "vae":
        batch |= {"text": np.zeros((4, 1, 1), np.float32), "image_text": np.zeros((4, 2, 1, 1), np.float32)}
    trained, untrained = task.split(params)
    arguments = trained, {**task.frozen, UNTRAINED: untrained}, batch, step_rng(jax.random.key(0), 7)

    def run(accumulate):
        gradients, held_out = make_gradients(task, accumulate=accumulate), make_held_out(task, accumulate=accumulate)
        both = jax.jit(lambda *arguments: (*gradients(*arguments), held_out(*arguments)))  # one program to compile
        grads, losses, held_out_losses = jax.device_get(both(*arguments))
        return {**grads, **losses}, held_out_losses

    whole, other = run(1), jax.jit(task.loss)(params, task.frozen, batch, step_rng(jax.random.key(0), 8))[0]
    assert not np.isclose(whole[0]["loss"], other, rtol=1e-3)  # the loss is random
    for values, expected in zip(run(parts), whole):
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("regime", "images_only", "trained"),
    [
        ("joint", False, {"conv", "attn_temporal", "motion_embedding_temporal"}),
        ("video_only", False, {"conv", "attn_temporal", "motion_embedding_temporal"}),
        ("temporal_only", False, {"attn_temporal", "motion_embedding_temporal"}),
        ("motion_only", False, {"motion_embedding_temporal"}),
        ("joint", True, {"conv"}),  # weight decay would wear down layers that see no video
    ],
)
def test_each_regime_trains_its_parameters_and_holds_no_others(regime, images_only, trained):
    task = toy_task(regime, images_only)
    before = task.init(None)["unet"]
    state, _ = one_update(task, tx=optax.adamw(0.1, weight_decay=0.1))
    changed = {
        name for name, group in state["params"]["unet"].items()
        if any(bool((new != old).any()) for new, old in zip(group.values(), before[name].values(), strict=True))
    }  # fmt: skip
    assert changed == set(state["params"]["unet"]) == set(state["ema"]["unet"]) == trained
    moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(state["opt_state"])]
    assert not [p for p in moments for name in set(before) - trained if name in jax.tree_util.keystr(p)]


def test_split_and_join_are_inverse():
    task = toy_task("temporal_only")
    params = task.init(None)
    trained, untrained = task.split(params)
    jax.tree.map(np.testing.assert_array_equal, task.join(trained, {UNTRAINED: untrained}), params)
    assert task.join(params, {}) == params  # nothing is untrained


def test_random_untrained_parameters_are_for_checkpoints_and_loaded_ones_are_not():
    """Both reach the devices in float32, whatever the dtype of the frozen models."""
    task, tx, mesh = toy_task("temporal_only"), optax.sgd(0.1), parallel.make_mesh()
    params = jax.tree.map(np.asarray, task.init(None))
    _, random = init_state(task, tx, mesh, seed=0)
    assert set(place_frozen(task, mesh, jnp.bfloat16)) == {"target"}
    started = dataclasses.replace(task, start=params)
    state, nothing = init_state(started, tx, mesh, seed=0)
    frozen = place_frozen(started, mesh, jnp.bfloat16)
    assert nothing == {} and set(state["params"]["unet"]) == {"attn_temporal", "motion_embedding_temporal"}
    assert frozen["target"].dtype == jnp.bfloat16 and set(frozen[UNTRAINED]["unet"]) == {"conv"}
    jax.tree.map(np.testing.assert_array_equal, frozen[UNTRAINED], random[UNTRAINED])
    assert {x.dtype for x in jax.tree.leaves(frozen[UNTRAINED])} == {jnp.dtype("float32")}


def test_regimes_that_train_nothing_are_refused():
    with pytest.raises(UserError, match="did you mean 'temporal_only'"):
        optimizer.split({"a": jnp.ones(2)}, regime="temporal", images_only=False)
    with pytest.raises(UserError, match="does not train any parameter"):
        optimizer.split({"a": jnp.ones(2)}, regime="temporal_only", images_only=False)


def test_every_step_has_its_own_random_key():
    task, tx = toy_task(), optax.sgd(0.1)
    update = make_update(task, tx, ema_decay=0.5)
    batch = {"x": jnp.ones((8, 3))}
    state = make_state(task.init(None), task, tx)
    middle, first = update(state, task.frozen, batch, jax.random.key(0))
    _, second = update(middle, task.frozen, batch, jax.random.key(0))
    _, again = update(state, task.frozen, batch, jax.random.key(0))
    assert first["noise"] == again["noise"] != second["noise"]


def test_ema_follows_early_and_averages_late():
    zeros, ones = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    np.testing.assert_allclose(update_ema(zeros, ones, jnp.int32(0), decay=0.999)["a"], 0.9)
    np.testing.assert_allclose(update_ema(zeros, ones, jnp.int32(10**6), decay=0.999)["a"], 0.001, rtol=1e-4)
    np.testing.assert_array_equal(update_ema(zeros, ones, jnp.int32(10**6), decay=0.0)["a"], ones["a"])


def test_learning_rate_warms_up_and_decays():
    rate = optimizer.learning_rate(optimizer.OptimizerConfig(learning_rate=1.0, warmup=10, decay="cosine"), 110)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(60), rate(110)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    constant = optimizer.learning_rate(optimizer.OptimizerConfig(learning_rate=1.0, warmup=0), 5)
    assert constant(0) == constant(1000) == 1.0
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        optimizer.learning_rate(optimizer.OptimizerConfig(decay="cosin"), 5)


def test_gradients_are_clipped_and_weight_decay_spares_biases():
    params = {"a/kernel": jnp.ones(4), "a/bias": jnp.ones(4)}
    tx = optimizer.make_optimizer(
        optimizer.OptimizerConfig(learning_rate=1.0, warmup=0, clip=1.0, weight_decay=0.5), 10
    )
    state = tx.init(params)
    decay, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(decay["a/kernel"], -0.5)
    np.testing.assert_array_equal(decay["a/bias"], 0.0)
    # Adam is invariant to the scale of one gradient, but not to that of one among two.
    state = tx.update(jax.tree.map(lambda p: 1e6 * p, params), state, params)[1]
    assert max(float(abs(m).max()) for m in jax.tree.leaves(state)) <= 10


def test_muon_equalises_directions_and_leaves_other_parameters_to_adam():
    """Muon's update has the same size, that of AdamW's updates, in strong and weak directions of a gradient."""
    kernel = jnp.zeros((3, 3, 16, 16))
    params = {"a/kernel": kernel, "a/bias": jnp.zeros(16), "e/embedding": jnp.ones((4, 8))}
    config = optimizer.OptimizerConfig(kind="muon", learning_rate=1.0, warmup=0, clip=0.0, weight_decay=0.5)
    tx = optimizer.make_optimizer(config, 10)
    left, right = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (144, 16)))[0], jnp.eye(16)
    strength = jnp.ones(16).at[0].set(100.0)
    gradient = {**params, "a/kernel": ((left * strength) @ right).reshape(kernel.shape), "a/bias": jnp.ones(16)}
    start, compiled = jax.jit(tx.init)(params), jax.jit(tx.update)
    update, _ = compiled(gradient, start, params)
    values = jnp.linalg.svd(update["a/kernel"].reshape(144, 16), compute_uv=False)
    assert values.max() / values.min() < 2
    np.testing.assert_allclose(jnp.sqrt(jnp.square(update["a/kernel"]).mean()), 0.2, rtol=0.4)
    assert len(set(np.asarray(update["a/bias"]))) == 1 and update["a/bias"][0] < -1  # Adam with Nesterov momentum
    decay, _ = compiled(jax.tree.map(jnp.zeros_like, params), start, {**params, "a/kernel": kernel + 1})
    np.testing.assert_allclose(decay["a/kernel"], -0.5)
    np.testing.assert_array_equal(decay["e/embedding"], 0.0)  # only kernels decay
    with pytest.raises(UserError, match="did you mean 'muon'"):
        optimizer.OptimizerConfig(kind="moun")


def test_detail_weights_and_crops_find_the_shape():
    image = np.full((2, 32, 32, 3), -0.5, np.float32)
    image[0, 4:8, 20:24] = 0.9
    weight = autoencoder.detail_weight(jnp.asarray(image), 10.0)
    np.testing.assert_allclose(weight.mean(axis=(1, 2, 3)), 1.0, rtol=1e-4)
    np.testing.assert_allclose(weight[0, 6, 22] / weight[0, 30, 2], 11.0, rtol=1e-5)
    np.testing.assert_allclose(weight[1], 1.0, rtol=1e-4)  # a uniform image: all pixels count the same
    crop = jax.jit(lambda key: autoencoder.crop_detail(jnp.asarray(image), 16, key))
    crops = jnp.stack([crop(jax.random.key(i)) for i in range(40)])
    assert crops.shape == (40, 2, 16, 16, 3)
    seen = (crops[:, 0] > 0).any(axis=(1, 2, 3))
    assert 0.3 < seen.mean() < 0.95  # often on the shape, but not always: the background must be learnt too


def test_timestep_weights():
    schedule, t = Schedule(), jnp.arange(1000)[None]
    weight = diffusion.timestep_weight(schedule, t, diffusion.DiffusionLoss(high_noise=1.0))
    np.testing.assert_allclose(weight.mean(), 1.0, rtol=1e-4)
    assert bool((jnp.diff(weight[0]) > 0).all())
    np.testing.assert_array_equal(diffusion.timestep_weight(schedule, t, diffusion.DiffusionLoss()), 1.0)


def test_logit_normal_timesteps_have_the_configured_median():
    schedule, loss = Schedule(), diffusion.DiffusionLoss(logit_normal=(1.0, 0.5))
    t = np.asarray(diffusion.timestep_distribution(schedule, loss)(jax.random.key(0), (4000,)))
    assert t.min() >= 0 and t.max() < 1000
    np.testing.assert_allclose(np.median(t) / 1000, 1 / (1 + np.exp(-1.0)), atol=0.01)
    uniform = diffusion.timestep_distribution(schedule, diffusion.DiffusionLoss())(jax.random.key(0), (4000,))
    np.testing.assert_allclose(np.quantile(uniform, [0.1, 0.5, 0.9]) / 1000, [0.1, 0.5, 0.9], atol=0.02)
    for wrong in ((0.5,), (0.5, 0.0), (1.0, 1.0, 1.0)):
        with pytest.raises(UserError, match="logit_normal"):
            diffusion.DiffusionLoss(logit_normal=wrong)


def test_inflation_zeroes_the_temporal_output_and_nothing_else():
    block = {"attn_temporal": {"to_out_0": {"kernel": np.ones(2), "bias": np.ones(2)}, "to_q": {"kernel": np.ones(2)}},
             "attn1": {"to_out_0": {"kernel": np.ones(2)}}}  # fmt: skip
    out = diffusion.image_as_video({"mid_block": block})["mid_block"]
    assert not out["attn_temporal"]["to_out_0"]["kernel"].any() and not out["attn_temporal"]["to_out_0"]["bias"].any()
    assert out["attn_temporal"]["to_q"]["kernel"].all() and out["attn1"]["to_out_0"]["kernel"].all()


# ---- whole runs ----


def train(config: str, workdir: Path, extra: Mapping[str, str] | None = None, /, **fields) -> subprocess.Popen:
    """Starts train.py as a subprocess."""
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    words = [sys.executable, "train.py", "--config", config, "--workdir", str(workdir), *flags]
    env = {**os.environ, **(extra or {})}
    return subprocess.Popen(words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process: subprocess.Popen) -> str:
    """Returns the last line of a successful run, the hash of its parameters."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    digest = out.splitlines()[-1]
    assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    return digest


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_hosts_with_different_configs_stop_with_an_error(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = [
        train(
            "configs/moving_shapes/vae.py:tiny", tmp_path / "run",
            {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)},
            distributed=True, seed=i,
        )
        for i in range(2)
    ]  # fmt: skip
    errors = [host.communicate(timeout=600)[1] for host in hosts]
    for i, (host, error) in enumerate(zip(hosts, errors)):
        assert host.returncode == 2 and f"differ in config.seed; on host {i}: config.seed = {i}" in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy  # test_crash.py compares two hosts with one, test_parallel.py what each device holds
@pytest.mark.parametrize("meshes", [((2, 2, 2),), ((8, 1, 1), (1, 8, 1), (2, 4, 1))], ids=str)
def test_training_on_one_device_equals_training_on_eight(meshes, tmp_path, monkeypatch):
    """Joint training gives the same losses and parameters on every kind of mesh."""
    monkeypatch.chdir(ROOT)
    config = options.load("configs/moving_shapes/base.py:tiny")
    config.data.frames, config.batch = 2, 8
    assert config.optimizer.kind == "adamw", "Muon would amplify rounding errors"
    task, tokenizer = build.make_task(config, jnp.float32, tmp_path)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), 20)
    rng = np.random.default_rng(0)
    # Filled by numpy: compiling the initialisation takes longer than the rest of the test.
    params = jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), abstract_params(task))
    state = jax.device_get(make_state(params, task, tx))
    with contextlib.closing(
        pipeline.batches(
            pipeline.open_examples(pipeline.DataConfig(**config.data), batch_size=8), load_tokenizer(tokenizer)
        )
    ) as data:
        batches = [next(data) for _ in range(20)]

    def trained(mesh):
        shardings = parallel.shardings(jax.eval_shape(lambda: state), mesh)
        update = jax.jit(
            make_update(task, tx, ema_decay=0.9), out_shardings=(shardings, parallel.replicated(mesh)),
            compiler_options={"xla_backend_optimization_level": 0},
        )  # fmt: skip
        update = parallel.on_mesh(update, mesh)
        now, frozen, out = parallel.put(state, shardings), parallel.put(task.frozen, parallel.replicated(mesh)), []
        for batch in batches:
            now, values = update(now, frozen, parallel.put_batch(batch, mesh), jax.random.key(0))
            out.append([values[name] for name in ("loss", "video_loss", "image_loss")])
        return np.array(out), parallel.gather(now["params"])

    def distance(a, b):
        """Leaves out the biases of keys: their gradients are only rounding errors, which AdamW amplifies."""
        a, b = (traverse_util.flatten_dict(tree, sep="/") for tree in (a, b))
        return np.sqrt(sum(np.square(a[k] - b[k]).sum() for k in a if not k.endswith("k_proj/bias")))

    expected, end = trained(parallel.make_mesh(devices=jax.devices()[:1]))
    assert np.ptp(expected[:, 0]) > 0.01  # training makes progress
    for axes in meshes:
        losses, result = trained(parallel.make_mesh(data=axes[0], fsdp=axes[1], tensor=axes[2]))
        np.testing.assert_allclose(losses[:10], expected[:10], rtol=1e-5, err_msg=str(axes))
        np.testing.assert_allclose(losses, expected, rtol=1e-4, err_msg=str(axes))
        assert distance(result, end) <= 1e-3 * distance(end, state["params"]), axes


def test_fields_that_may_be_none_are_unset_on_the_command_line():
    config = options.load(str(ROOT / "configs/base.py"))
    for field, text in (("data.path", ""), ("data.image_path", "None"), ("data.fps", "None")):
        options.override(config, field, text)
    assert (config.data.path, config.data.image_path, config.data.fps) == (None, None, None)
    options.override(config, "init_from", "")
    assert config.init_from == ""


@pytest.mark.parametrize(
    "error", [UserError("the samples are not finite"), MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")]
)
def test_a_sample_grid_that_fails_is_only_logged(error, tmp_path, monkeypatch, caplog):
    import train

    def load(folder):
        raise error

    monkeypatch.setattr(train.cascade, "load", load)
    assert not train.write_sample_grid(tmp_path, "base", ["a red circle"], tmp_path / "00000010.png")
    assert f"no sample grid 00000010.png ({type(error).__name__}" in caplog.text and "Training continues" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_wrong_command_line_still_shows_whether_there_are_other_hosts():
    words = ["--config=nowhere.py", "--config.stepz=3"]
    assert options.is_distributed([*words, "--config.distributed=True"])
    assert options.is_distributed([*words, "--config.distributed", "true"])
    assert options.is_distributed([*words, "--config.distributed=1"])  # as the field is parsed
    assert not options.is_distributed(words) and not options.is_distributed([*words, "--config.distributed=False"])


def test_hosts_compare_the_package_the_script_and_the_configs(tmp_path, monkeypatch):
    config = options.load(str(ROOT / "configs/moving_shapes/vae.py:tiny"))
    for name in ("lavie_jax/__init__.py", "train.py", "configs/base.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(options.lavie_jax, "__file__", str(tmp_path / "lavie_jax/__init__.py"))
    codes = [options.facts(config)["code"]]
    for name in ("lavie_jax/__init__.py", "train.py", "configs/base.py"):
        (tmp_path / name).write_text("changed")
        codes.append(options.facts(config)["code"])
    assert len(set(codes)) == 4


def test_prompts_are_refused_where_nothing_can_be_sampled(tmp_path):
    config = options.load(str(ROOT / "configs/moving_shapes/interpolation.py:tiny"))
    options.override(config, "prompts", "('a red circle',)")
    with pytest.raises(UserError, match="start from text .base, prediction., not by 'interpolation': set prompts"):
        options.check(config, tmp_path)


BAD = [
    (["--config.stepz=3"], "did you mean 'steps'"),
    (["--config.optimizer.lr=3"], "Allowed: .*learning_rate"),
    (["--config.optimiser.clip=3"], "unknown config group 'optimiser'; did you mean 'optimizer.clip'"),
    (["--config.steps=many"], "takes a whole number, not 'many'"),
    (["--config.optimizer=3"], "is a group"),
    (["--config.steps=0"], "at least 1"),
    (["--config.batch=7", "--config.accumulate=2"], "batch=7 cannot be split"),
    (["--config.init_from=nowhere"], "nowhere does not exist"),
    (["--config.vae_from="], "a VAE is needed"),
    (["--config.regime=temporal"], "did you mean 'temporal_only'"),
    (["--config.regime=video_only"], "data.images=0"),
    (["--config.regime=lora", "--config.prompts=", "--config.lora.rank=0"], "'lora.rank' must be at least 1, not 0"),
    (
        ["--config.regime=lora", "--config.prompts=", "--config.lora.targets=temporal"],
        "'lora.targets': unknown 'temporal'",
    ),
    (["--config.regime=lora", "--config.prompts=", "--config.lora.targets="], "'lora.targets' is empty"),
    (["--config.regime=lora", "--config.prompts=('a',)"], "set init_from, or prompts"),
    (["--config.data.image_captions=('a', 'b')"], "one caption for image_path"),
    (["--config.data.height=30"], "not multiples of the VAE's factor"),
    (["--config.data.source=video_folder", "--config.data.path=nowhere"], "no folder 'nowhere'"),
    (["--config.sample_every=15"], "multiple of checkpoint_every"),
    (["--config.attention_kernel=block"], "did you mean 'blockwise'"),
    (["--config.loss.alpha=-1"], "'loss.alpha' must be finite, at least 0; given -1"),
    (["--config.loss.held_out_timesteps=100,1000"], "must be from 0 to 999"),
    (["--config.optimizer.decay=cosin"], "unknown optimizer.decay 'cosin'; did you mean 'cosine'"),
    (["--config.optimizer.learning_rate=1e999"], "'optimizer.learning_rate' must be finite"),
    (["--config.optimizer.b2=1"], "at least 0 and below 1"),
    (["--config.steps=1e999"], "takes a whole number"),
    (["--config.keep_checkpoints=0"], "at least 1"),
    (["--config.sampling.sampler=dimm"], "did you mean 'ddim'"),
    (["--config.sampling.steps=0"], "group 'sampling': steps must be at least 1"),
    (["--config.sampling.steps=1001"], "group 'sampling': steps must be a whole number from 1 to 1000"),
    (
        ["--config.sampling.guidance_low=999"],
        "group 'sampling': guidance_low = 999 and guidance_high = inf contain none",
    ),
    (["--config.sampling.guidance=1e999"], "group 'sampling': guidance must be finite"),
    (["--config.unet.cross_attention_dim=48"], "must be the text encoder's width 32"),
    (["--config.text_encoder.vocab_size=10"], "vocab_size = 10 is too small"),
    (["--steps=3"], "unknown flag --steps"),
    (["--restore-step=best"], "--restore-step takes the step of a checkpoint"),
    (["--restore-step=7"], "there is no checkpoint .*/7. There is no other"),
    (["steps"], "unexpected argument 'steps'"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words[-1] for words, _ in BAD])
def test_bad_input_is_refused_before_anything_is_written(words, message, tmp_path, monkeypatch):
    import train

    monkeypatch.chdir(ROOT)
    # The suite has 8 devices. Without an error this would start training.
    argv = [
        "--config",
        "configs/moving_shapes/base.py:tiny",
        "--workdir",
        str(tmp_path / "run"),
        "--config.batch=8",
        *words,
    ]
    with pytest.raises(UserError, match=message), contextlib.ExitStack() as cleanup:
        train.main(argv, cleanup)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["batch=0", "optimizer.kind=adam", "optimizer.clip=-1"])
def test_values_are_checked_before_weights_are_downloaded(wrong, monkeypatch):
    monkeypatch.setattr(options, "local_folder", lambda location: pytest.fail(f"downloads {location}"))
    words = [f"--config={ROOT}/configs/moving_shapes/base.py:tiny", "--workdir=run", "--config.init_from=hub:a/b"]
    with pytest.raises(UserError, match=wrong.partition("=")[0]):
        options.parse([*words, f"--config.{wrong}"])


def test_losses_are_checked_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(initial, "load", lambda *_: pytest.fail("reads weights"))
    for wrong, message in (("loss.alpha=-1", "loss.alpha"), ("loss.held_out_timesteps=2000", "from 0 to 999")):
        config = options.load("configs/moving_shapes/base.py:tiny")
        options.override(config, *wrong.split("="))
        with pytest.raises(UserError, match=message):
            build.make_task(config, jnp.float32, tmp_path)


def test_weights_that_no_run_wrote_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "weights").mkdir()
    config = options.load("configs/moving_shapes/base.py:tiny")
    with pytest.raises(UserError, match="no checkpoints/"):
        options.check(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    options.check(config, tmp_path)


@pytest.mark.parametrize("source", ["moving_shapes", "video_folder"])
def test_held_out_clips_are_not_trained_on(source):
    data = pipeline.DataConfig(source=source, caption_drop=0.1)
    held_out = build.held_out_data(data)
    assert (data.split, held_out.split, held_out.caption_drop) == ("train", "val", 0.0)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("precious")
    process = train("configs/moving_shapes/vae.py:tiny", tmp_path / "file" / "run")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and out == ""
    assert err.strip().count("\n") == 0 and err.startswith("error: --workdir") and "is a file" in err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [("steps", "1e3", 1000), ("optimizer.clip", "2", 2.0), ("init_from", "a/b", "a/b"), ("inflate", "false", False),
     ("prompts", "('a, b', 'c')", ("a, b", "c")), ("data.frames", "4", 4),
     ("unet.block_out_channels", "32,64", (32, 64))],
)  # fmt: skip
def test_fields_are_read_as_the_type_they_have(field, text, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = options.parse(
        ["--config=configs/moving_shapes/base.py:tiny", "--workdir=w", f"--config.{field}={text}"]
    ).config
    for name in field.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)
