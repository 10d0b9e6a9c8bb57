"""Every config builds at full size without being run, and its tiny mode trains a step and leaves its files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax import weights
from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.samples.settings import Settings
from lavie_jax.stages import STAGES as STAGE
from lavie_jax.training import build, optimizer, options
from lavie_jax.training.step import make_state, make_update

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py") if "def get_config" in path.read_text()
)
STAGES = [name for name in CONFIGS if not name.endswith("vae.py")]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def abstract_batch(config) -> dict:
    data, b, length = config.data, config.batch, config.text_encoder.max_position_embeddings
    shapes = {
        "video": ((b, data.frames, data.height, data.width, 3), jnp.float32),
        "images": ((b, data.images, data.height, data.width, 3), jnp.float32),
        "tokens": ((b, length), jnp.int32),
        "image_tokens": ((b, data.images, length), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def abstract_origin(config) -> build.Origin:
    """Where the parameters would come from, as shapes."""
    models = build.make_models(config, jnp.float32, 1.0)
    side = models.vae.config.factor
    frozen = {"vae": jax.eval_shape(models.vae.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]}
    if not config.train_text_encoder:
        text = jax.eval_shape(models.text_encoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        frozen["text_encoder"] = text["params"]
    return build.Origin(start=None, frozen=frozen, scaling_factor=0.5, tokenizer=Path("tokenizer"))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_builds_at_full_size(name):
    config = options.load(name)
    build.check_stage(config)
    task = build.stage_task(config, jnp.bfloat16, abstract_origin(config))
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    state = jax.eval_shape(lambda rng: make_state(task.init(rng), task, tx), jax.random.key(0))
    update = make_update(task, tx, seed=0, ema_decay=config.ema_decay, accumulate=config.accumulate)
    new, losses = jax.eval_shape(update, state, task.frozen, abstract_batch(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {x.dtype for x in jax.tree.leaves(new["params"])} == {jnp.dtype("float32")}
    assert ("video_loss" in losses) == bool(config.data.frames) and "image_loss" in losses
    if name == "configs/base.py":  # LaVie's base UNet, 909.1 M parameters (paper, and its checkpoint)
        count = sum(np.prod(x.shape) for x in jax.tree.leaves(new["params"]["unet"]))
        assert round(count / 1e6, 1) == 909.1
        assert (config.data.frames, config.data.images, config.data.height, config.data.width) == (16, 4, 320, 512)


def test_full_size_is_the_released_models_size():
    """What `convert_torch.py inflate` makes of Stable Diffusion 1.4 can be trained."""

    def released(name):
        return json.loads((ROOT / "tests/golden" / f"{name}.json").read_text())["model"]

    config = options.load("configs/base.py")
    models = build.make_models(config, jnp.float32, VAEConfig().scaling_factor)
    assert models.unet.config == UNetConfig.from_diffusers(released("base_unet_full"), "base")
    assert models.vae.config == VAEConfig.from_diffusers(released("sd_vae_full"))
    assert models.text_encoder.config == CLIPTextConfig.from_diffusers(released("sd_text_full"))
    assert models.schedule == STAGE["base"].schedule


@pytest.mark.parametrize("name", CONFIGS)
def test_files_say_what_they_are(name):
    """The command, the hardware and what to expect open every config."""
    spec = importlib.util.spec_from_file_location("config", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"python train.py --config {name}" in module.__doc__
    assert f"{name}:tiny" in module.__doc__ and "Hardware" in module.__doc__
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        module.get_config("tinny")


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("mode", ["", ":tiny"])
def test_sampling_settings_can_be_used(name, mode):
    config = options.load(name + mode)
    models = build.make_models(config, jnp.float32, 1.0)
    given = {
        **config.sampling,
        "height": config.data.height,
        "width": config.data.width,
        "frames": 1,
        "fps": config.data.fps,
    }
    Settings.make({}, given).check_sides(models.vae.config.factor)


def test_the_vae_of_moving_shapes_fits_what_trains_on_it():
    vae = options.load("configs/moving_shapes/vae.py").vae
    for name in ("image.py", "image.py:cpu", "base.py", "base.py:cpu"):
        assert options.load(f"configs/moving_shapes/{name}").vae == vae
    images = jnp.zeros((1, 64, 64, 3))
    models = build.make_models(options.load("configs/moving_shapes/base.py"), jnp.float32, 1.0)
    mean, _ = jax.eval_shape(
        lambda rng: VAE(models.vae.config).init_with_output(rng, images, method="encode")[0], jax.random.key(0)
    )
    assert mean.shape == (1, 16, 16, 4)


def test_the_full_size_config_is_tiny_on_moving_shapes():
    a, b = options.load("configs/base.py:tiny"), options.load("configs/moving_shapes/base.py:tiny")
    assert a == b  # so the run below is its run too


def test_tiny_trains_and_leaves_a_model_and_samples(tmp_path):
    """The image model, then the base stage from its weights folder, as the small world is trained."""
    tiny_run("image", tmp_path / "image", "--config.prompts=()")
    tiny_run("base", tmp_path / "base", "--config.vae_from=", f"--config.init_from={tmp_path}/image/weights")
    image, base = (weights.load_folder(tmp_path / name / "weights") for name in ("image", "base"))
    jax.tree.map(np.testing.assert_array_equal, image.vae.params, base.vae.params)
    start, end = (w.unet.params["conv_in"]["kernel"] for w in (image, base))
    assert 0 < np.abs(end - start).max() < 0.01  # from there, and on


def tiny_run(name, workdir, *extra):
    """Trains two steps of a config's tiny mode, and looks at all that it leaves."""
    command = [
        sys.executable, "train.py", "--config", f"configs/moving_shapes/{name}.py:tiny", "--workdir", str(workdir),
        "--config.steps=2", "--config.log_every=1", "--config.checkpoint_every=2", "--config.sample_every=2",
        "--config.tensorboard=true", *extra,
    ]  # fmt: skip
    flags = "--xla_backend_optimization_level=0"  # compile fast, run slowly
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()[-1]) == 64
    found = weights.load_folder(workdir / "weights", stage="base")
    assert found.sampling["frames"] == (1 if name == "image" else 4)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "image_loss", "learning_rate", "clips_per_second"} <= set(lines[0])
    assert ("video_loss" in lines[0]) == (name == "base")
    assert {f"held_out/image_loss_t{t}" for t in (100, 300, 500, 700, 900)} <= set(lines[-1])
    assert [p.name for p in workdir.glob("samples/*")] == (["00000002.png"] if name == "base" else [])
    assert len(list((workdir / "tensorboard").iterdir())) == 1
