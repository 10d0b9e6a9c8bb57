"""Every config builds at full size with `eval_shape`, and its tiny mode trains and writes its files."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax import weights
from lavie_jax.data import pipeline
from lavie_jax.data.config import latent_paths
from lavie_jax.errors import UserError
from lavie_jax.models import registry
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.planner.training import abstract_batch, abstract_init
from lavie_jax.stages import STAGES as STAGE
from lavie_jax.training import build, optimizer, options
from lavie_jax.training.state import abstract_params, make_state
from lavie_jax.weights.diffusers_configs import clip_text_config, unet_config, vae_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py") if "def get_config" in path.read_text()
)
STAGES = [name for name in CONFIGS if not name.endswith("vae.py")]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.heavy] * (name != "configs/base.py")) for name in STAGES]
)
def test_a_stage_builds_at_full_size(name):
    config = options.load(name)
    build.check_stage(config)
    task = build.stage_task(config, jnp.bfloat16, abstract_init(config))
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(**config.optimizer), config.steps)
    params = abstract_params(task)
    state = jax.eval_shape(lambda params: make_state(params, task, tx), params)
    # Only the loss: the tiny modes test the update, and tracing it would double the time.
    batch = abstract_batch(config, config.batch // config.accumulate)
    loss, losses = jax.eval_shape(task.loss, params, task.frozen, batch, jax.random.key(0))
    assert loss.shape == ()
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    assert ("video_loss" in losses, "image_loss" in losses) == (bool(config.data.frames), bool(config.data.images))
    if name in RELEASED:
        data, (shape, total, trained) = config.data, RELEASED[name]
        assert (data.frames, data.images, data.height, data.width) == shape
        assert (millions(params["unet"]), millions(state["params"]), millions(state["ema"])) == (
            total,
            trained,
            trained,
        )
        moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
        assert sum(x.size for x in moments) == 2 * sum(
            x.size for x in jax.tree.leaves(state["params"])
        )  # only for trained parameters


RELEASED = {  # batch, UNet and trained parameters in millions (paper, and the released checkpoints)
    "configs/base.py": ((16, 4, 320, 512), 909.1, 909.1),
    "configs/prediction.py": ((16, 4, 320, 512), 909.1, 909.1),
    "configs/interpolation.py": ((61, 0, 256, 256), 909.1, 909.1),
    "configs/vsr.py": ((8, 0, 320, 320), 691.0, 217.6),
    "configs/lora.py": ((0, 1, 320, 512), 909.1, 1.6),
}


def millions(tree) -> float:
    return round(sum(np.prod(x.shape) for x in jax.tree.leaves(tree)) / 1e6, 1)


@pytest.mark.parametrize(
    ("stage", "case", "vae", "text"),
    [
        ("base", "base", "sd", "sd"),
        ("prediction", "seine", "sd", "sd"),
        ("interpolation", "interpolation", "sd", "sd"),
        ("vsr", "vsr", "x4", "x4"),
    ],
)
def test_full_size_is_the_released_models_size(stage, case, vae, text):
    """The outputs of `convert_torch.py inflate` on Stable Diffusion 1.4 and the x4-upscaler can be trained."""

    def released(name):
        return json.loads((ROOT / "tests/golden" / f"{name}.json").read_text())["model"]

    config = options.load(f"configs/{stage}.py")
    models = build.make_models(config, jnp.float32, VAEConfig().scaling_factor)
    assert models.unet.config == unet_config(released(f"{case}_unet_full"), STAGE[stage])
    assert models.vae.config == dataclasses.replace(
        vae_config(released(f"{vae}_vae_full")), scaling_factor=VAEConfig().scaling_factor
    )
    assert models.text_encoder.config == clip_text_config(released(f"{text}_text_full"))
    assert models.schedule == STAGE[stage].schedule
    assert all(STAGE[stage].sampling[name] == value for name, value in config.sampling.items() if value is not None)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_start_with_command_hardware_and_result(name):
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
    settings = STAGE[config.stage].info.settings.make(build.sampling_defaults(config), {})
    assert not settings.height % models.vae.config.factor and not settings.width % models.vae.config.factor


def test_the_vae_of_moving_shapes_fits_its_stages():
    vae = options.load("configs/moving_shapes/vae.py").vae
    for name in ("image", "base", "prediction", "interpolation"):
        for mode in ("", ":cpu"):
            assert options.load(f"configs/moving_shapes/{name}.py{mode}").vae == vae
    large = options.load("configs/moving_shapes/vsr_vae.py").vae
    for name in ("upscaler", "vsr"):
        assert options.load(f"configs/moving_shapes/{name}.py").vae == large
    images = jnp.zeros((1, 64, 64, 3))
    models = build.make_models(options.load("configs/moving_shapes/base.py"), jnp.float32, 1.0)
    mean, _ = jax.eval_shape(
        lambda rng: VAE(models.vae.config).init_with_output(rng, images, method="encode")[0], jax.random.key(0)
    )
    assert mean.shape == (1, 16, 16, 4)


@pytest.mark.parametrize("stage", ["base", "prediction", "interpolation", "vsr"])
def test_the_full_size_config_is_tiny_on_moving_shapes(stage):
    a, b = options.load(f"configs/{stage}.py:tiny"), options.load(f"configs/moving_shapes/{stage}.py:tiny")
    assert a == b  # so the run below covers both


def test_the_small_interpolation_and_upscaler_fit_their_initial_weights():
    """Their networks equal those of the base stage and of super-resolution, in every mode."""
    for mode in ("", ":cpu"):
        base, later = (options.load(f"configs/moving_shapes/{name}.py{mode}") for name in ("base", "interpolation"))
        assert later.text_encoder == base.text_encoder and later.vae == base.vae
        for field in ("block_out_channels", "attention_levels", "attention_heads", "norm_num_groups"):
            assert later.unet[field] == base.unet[field]
        a, b = (options.load(f"configs/moving_shapes/{name}.py{mode}") for name in ("upscaler", "vsr"))
        assert (a.unet, a.vae, a.text_encoder) == (b.unet, b.vae, b.text_encoder)
        shipped = weights.load_part(a.text_from, "text_encoder").config
        assert CLIPTextConfig.from_dict(a.text_encoder.to_dict()) == shipped


def test_images_that_a_config_does_not_use_are_not_opened():
    """The config does not set `image_path`, and a set of latents without images does not open its own."""
    config = build.data_config(options.load("configs/interpolation.py"))
    with pytest.raises(UserError, match="data/clips"):
        pipeline.open_examples(config, batch_size=1)
    assert latent_paths(dataclasses.replace(config, source="latents", path="here", image_path="there")) == ["here"]


def test_tiny_trains_and_writes_a_model_and_samples(tmp_path):
    workdir = tmp_path / "base"
    lines = tiny_run("base", workdir)
    assert {"video_loss", "image_loss"} <= set(lines[0])
    assert [path.name for path in (workdir / "samples").iterdir()] == ["00000002.png"]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert weights.load_folder(workdir / "weights").unet.params


@pytest.mark.heavy  # test_stage_training.py has a lighter version
def test_each_tiny_model_starts_from_the_previous_one(tmp_path):
    """The image model, the base stage from its weights folder, and interpolation from that."""
    tiny_run("image", tmp_path / "image", "--config.prompts=()")
    tiny_run("base", tmp_path / "base", "--config.vae_from=", f"--config.init_from={tmp_path}/image/weights")
    image, base = (weights.load_folder(tmp_path / name / "weights") for name in ("image", "base"))
    jax.tree.map(np.testing.assert_array_equal, image.vae.params, base.vae.params)
    start, end = (w.unet.params["conv_in"]["kernel"] for w in (image, base))
    assert 0 < np.abs(end - start).max() < 0.01  # trained from the same start

    words = ("--config.vae_from=", "--config.train_text_encoder=false", f"--config.init_from={tmp_path}/base/weights")
    tiny_run("interpolation", tmp_path / "interpolation", *words)
    later = weights.load_folder(tmp_path / "interpolation" / "weights", stage="interpolation")
    jax.tree.map(np.testing.assert_array_equal, base.text_encoder.params, later.text_encoder.params)
    assert 0 < np.abs(later.unet.params["conv_in"]["kernel"][:, :, :4] - end).max() < 0.01

    tiny_run("prediction", tmp_path / "prediction", *words)
    later = weights.load_folder(tmp_path / "prediction" / "weights", stage="prediction")
    kernel = later.unet.params["conv_in"]["kernel"]
    assert 0 < np.abs(kernel[:, :, :4] - end).max() < 0.01
    assert all(kernel[:, :, channel].any() for channel in range(4, 9))  # the mask and the masked latents are used


@pytest.mark.heavy  # test_stage_training.py has a lighter version
def test_tiny_super_resolution_starts_from_an_image_upscaler(tmp_path):
    tiny_run("upscaler", tmp_path / "upscaler")
    words = ("--config.vae_from=", "--config.regime=temporal_only", "--config.train_text_encoder=false")
    tiny_run("vsr", tmp_path / "vsr", *words, f"--config.init_from={tmp_path}/upscaler/weights")
    start, end = (weights.load_folder(tmp_path / name / "weights", stage="vsr") for name in ("upscaler", "vsr"))
    assert end.low_res_schedule == STAGE["vsr"].low_res_schedule
    np.testing.assert_array_equal(start.unet.params["conv_in"]["kernel"], end.unet.params["conv_in"]["kernel"])
    moved = "mid_temporal_block", "shift_conv", "kernel"
    before, after = start.unet.params, end.unet.params
    for name in moved:
        before, after = before[name], after[name]
    assert not before.any() and after.any()


@pytest.mark.heavy  # test_text_network.py traces it
def test_tiny_with_t5_trains_resumes_and_is_sampled_from_its_weights_folder(tmp_path):
    """The text encoder, its projection and the tokenizer are all that training left."""
    workdir, out = tmp_path / "t5", tmp_path / "out"
    command = [
        sys.executable, "train.py", "--config", "configs/base_t5.py:tiny", "--workdir", str(workdir),
        "--config.log_every=1", "--config.checkpoint_every=2", "--config.sample_every=2",
    ]  # fmt: skip
    for steps in (2, 4):
        done = subprocess.run([*command, f"--config.steps={steps}"], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert "resumed at step 2 of 4" in done.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()
    folder = weights.load_folder(workdir / "weights")
    assert registry.network_name(folder.text_encoder.config) == "t5_text"
    assert np.abs(folder.unet.params["encoder_hid_proj"]["bias"]).max() > 0  # it starts at zero
    prompt = "a red circle moving left " * 4  # longer than the encoder's texts
    sample = [sys.executable, "sample.py", "--weights", str(workdir / "weights"), "--prompt", prompt, "--out", str(out)]
    done = subprocess.run(sample, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "longer than the model's 16 tokens" in done.stdout + done.stderr
    assert len(list(out.glob("*.mp4"))) == 1


@pytest.mark.heavy
def test_tiny_with_two_objects_trains(tmp_path):
    lines = tiny_run("pairs", tmp_path / "pairs", "--config.prompts=()")
    assert np.isfinite([line["image_loss"] for line in lines if "loss" in line]).all()


FRAMES = {
    "image": 1,
    "pairs": 1,
    "base": 4,
    "prediction": 4,
    "interpolation": 5,
    "upscaler": 3,
    "vsr": 3,
}  # in the weights' sampling settings


def tiny_run(name, workdir, *extra):
    """Trains two steps of a config's tiny mode, checks the outputs that all stages have, and returns the metrics."""
    command = [
        sys.executable, "train.py", "--config", f"configs/moving_shapes/{name}.py:tiny", "--workdir", str(workdir),
        "--config.steps=2", "--config.log_every=1", "--config.checkpoint_every=2", "--config.sample_every=2",
        "--config.metrics=tensorboard", *extra,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()[-1]) == 64
    assert weights.load_folder(workdir / "weights", params=False).sampling["frames"] == FRAMES[name]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "learning_rate"} <= set(lines[0])
    assert "clips_per_second" in lines[1]  # the first step compiles and has no speed
    assert ("video_loss" in lines[0], "image_loss" in lines[0]) == (
        name not in ("image", "pairs", "upscaler"), name in ("image", "pairs", "base", "prediction", "upscaler")
    )  # fmt: skip
    kind = "video" if "video_loss" in lines[0] else "image"
    assert {f"held_out/{kind}_loss_t{t}" for t in (100, 300, 500, 700, 900)} <= set(lines[-1])
    return lines
