"""Distillation: targets with known students, what a run starts from and exports, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lavie_jax.diffusion import Schedule, make_sampler, sample
from lavie_jax.diffusion.consistency import boundary_weights
from lavie_jax.errors import UserError
from lavie_jax.stages.conditioning import Condition, Text, TrainingPair
from lavie_jax.training import build, initial, optimizer, options
from lavie_jax.training.distillation import Distillation, consistent_x0, student_presets
from lavie_jax.training.state import make_state
from lavie_jax.training.step import make_update
from lavie_jax.weights import load_folder

ROOT = Path(__file__).parents[1]
MEAN, STD = 0.3, 0.5  # of Gaussian data, whose denoiser and whose ODE are known
NULL = np.zeros((1, 4), np.int32)


def load_init(config, scratch, resumed=None) -> initial.InitialWeights:
    return initial.load(config, build.make_models(config, jnp.float32, 1.0), scratch, resumed)


def pair(schedule, t, image_t=(), seed=0) -> TrainingPair:
    """Returns x_t of Gaussian data at timesteps t of clips of two frames, and image_t of images beside them."""
    rng, count = np.random.default_rng(seed), len(t)
    t, image_t = jnp.asarray(t), jnp.broadcast_to(jnp.asarray(image_t, jnp.int32), (count, len(image_t)))
    shape = (count, 2 + image_t.shape[1], 3, 4, 1)
    x0, eps = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    made = TrainingPair(x0, t, image_t, jnp.zeros(shape), Condition())
    return made._replace(x_t=schedule.add_noise(MEAN + STD * x0, eps, made.frame_t))


def compare(kind, predict, made, schedule, *, skip=1, scale=1.0, **params):
    distillation = Distillation(kind=kind, scale=scale, skip=skip, null_tokens=NULL, null_mask=None)
    given = {"student": None, "average": None, "teacher": None} | params
    captions, null = (Text(jnp.full((len(made.t), 4, 5), value)) for value in (2.0, 1.0))
    return distillation.compare(predict, schedule, made, captions, null, **given)


def alpha_sigma(schedule, made):
    abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[made.frame_t][..., None, None, None]
    return abar**0.5, (1 - abar) ** 0.5


def test_a_student_that_equals_the_guided_teacher_has_no_loss_and_its_teacher_no_gradient():
    def predict(weight, made, text):
        return weight * text.video.mean() * made.x_t

    schedule = Schedule()
    made = pair(schedule, [100, 700], [300])

    def loss(student, teacher):
        prediction, target = compare("guidance", predict, made, schedule, scale=7.5, student=student, teacher=teacher)
        return jnp.square(prediction - target).mean()

    # the teacher predicts 0.1 x_t without the text and 0.2 x_t with it: 0.1 + 7.5 (0.2 - 0.1) under guidance
    assert loss(0.85 / 2, 0.1) < 1e-12 < loss(0.2, 0.1)
    assert jax.grad(loss, argnums=1)(0.2, 0.1) == 0 != jax.grad(loss)(0.2, 0.1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_exact_consistency_function_agrees_with_itself_along_the_teachers_chain(kind):
    """The end of the ODE of Gaussian data is MEAN + STD (x_t - alpha MEAN) / std(x_t)."""
    schedule = Schedule(prediction=kind)

    def as_prediction(x0, made):
        alpha, sigma = alpha_sigma(schedule, made)
        eps = (made.x_t - alpha * x0) / sigma
        return eps if kind == "epsilon" else alpha * eps - sigma * x0

    def predict(who, made, text):
        alpha, sigma = alpha_sigma(schedule, made)
        variance = alpha**2 * STD**2 + sigma**2
        centred = made.x_t - alpha * MEAN
        if who == "denoiser":
            return as_prediction(MEAN + STD**2 * alpha * centred / variance, made)
        skip, out = (w[..., None, None, None] for w in boundary_weights(made.frame_t))
        return as_prediction((MEAN + STD * centred / variance**0.5 - skip * made.x_t) / out, made)

    made = pair(schedule, [40, 300, 999], [60, 800])

    def error(who, skip):
        prediction, target = compare(
            "consistency", predict, made, schedule, skip=skip, student=who, average=who, teacher="denoiser"
        )
        return float(jnp.square(prediction - target).mean() ** 0.5)

    assert error("consistency", 1) < 2e-3
    assert error("consistency", 20) < error("denoiser", 20) / 2
    # the target is the average's, and prediction and target are estimates of x0
    prediction, target = compare(
        "consistency", predict, made, schedule, skip=20, student="denoiser", average="consistency", teacher="denoiser"
    )
    np.testing.assert_allclose(prediction[:, :, 0].std(), STD, rtol=0.6)
    np.testing.assert_allclose(target, consistent_x0(schedule, predict("consistency", made, None), made), atol=0.1)


def test_at_timestep_0_the_consistency_function_is_x():
    made = pair(Schedule(), [0, 500])
    out = consistent_x0(Schedule(), jnp.full(made.x_t.shape, 9.0), made)
    np.testing.assert_array_equal(out[0], made.x_t[0])
    assert np.abs(out[1] - made.x_t[1]).max() > 1


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_with_the_exact_consistency_function_samples_the_data(steps):
    sampler, rng = make_sampler("lcm", steps, Schedule(prediction="sample")), np.random.default_rng(0)
    noise, *more = rng.normal(size=(1 + steps, 4000, 1)).astype(np.float32)

    def network(x_t, t):
        abar = np.float32(sampler.schedule.alphas_cumprod[int(t[0])])
        return MEAN + STD * (x_t - abar**0.5 * MEAN) / (abar * STD**2 + 1 - abar) ** 0.5

    x0 = np.asarray(sample(sampler, network, noise, lambda i: more[i]))
    assert x0.mean() == pytest.approx(MEAN, abs=0.03) and x0.std() == pytest.approx(STD, abs=0.02)


# ---- runs ----


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_folder(tiny.make_base(tmp_path_factory.mktemp("teacher") / "base", negative_prompt="blue square"))


def config_for(base, **overrides):
    """Returns the config of a run whose teacher is a folder of tiny models."""
    config = options.load(str(ROOT / "configs/moving_shapes/distill.py:cpu"))
    for part, fields in (("unet", tiny.UNET), ("text_encoder", tiny.TEXT), ("vae", tiny.VAE_CONFIG)):
        for name, value in dataclasses.asdict(fields).items():
            if name in config[part]:
                config[part][name] = value
    config.schedule.update(dataclasses.asdict(base.schedule))
    for name, value in {"init_from": base.path, **overrides}.items():
        options.override(config, name, str(value))
    return config


@pytest.mark.parametrize("kind", ["guidance", "consistency"])
def test_a_student_starts_from_its_teacher_and_its_folder_says_how_it_is_sampled(kind, base, tmp_path):
    config = config_for(base, **{"distill.kind": kind})
    build.check_stage(config)
    init = load_init(config, tmp_path)
    task = build.stage_task(config, np.float32, init)
    jax.tree.map(np.testing.assert_array_equal, task.frozen["teacher"], base.unet.params)
    jax.tree.map(np.testing.assert_array_equal, task.start, {"unet": base.unet.params})
    task.export(tmp_path / "weights", task.start, {})
    student = load_folder(tmp_path / "weights", stage="base", params=False)
    changed = {name for name, value in student.sampling.items() if value != base.sampling.get(name)}
    assert student.sampling["guidance"] == 1 and student.sampling["negative_prompt"] == "blue square"
    if kind == "guidance":
        assert changed == {"guidance"} and not student.presets
    else:
        assert changed == {"guidance", "sampler", "steps"} and student.sampling["sampler"] == "lcm"
        assert student.presets == {"balanced": {}, "fast": {}}  # not those of the stage, for other samplers
    # on resuming, the teacher is read again
    again = load_init(config, tmp_path, tmp_path / "weights")
    jax.tree.map(np.testing.assert_array_equal, again.frozen["teacher"], base.unet.params)
    assert again.teacher_sampling == base.sampling


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"unet.block_out_channels": "(32,)"}, "UNetConfig.block_out_channels = .* they must be equal"),
        ({"init_from": ""}, "needs a teacher: set init_from"),
        ({"train_text_encoder": "true"}, "set train_text_encoder=False"),
        ({"regime": "lora"}, "another regime than 'lora'"),
        ({"sampling.guidance": "4"}, "set sampling.guidance=1"),
        ({"sampling.negative_prompt": "red"}, "leave out sampling.negative_prompt"),
        ({"distill.kind": "consistency", "sampling.sampler": "ddim"}, "set sampling.sampler='lcm'"),
        ({"distill.guidance": "1"}, "nothing to learn; set distill.guidance"),
        ({"distill.kind": "speed"}, "config field 'distill.kind': unknown value 'speed'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_distilled_is_refused(overrides, match, base, tmp_path):
    config = config_for(base, **overrides)
    with pytest.raises(UserError, match=match):
        build.check_stage(config)
        build.stage_task(config, np.float32, load_init(config, tmp_path))


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["consistency", "guidance"])
def test_updates_lower_the_loss_and_leave_the_teacher_alone(kind, base, tmp_path):
    config = config_for(base, **{"distill.kind": kind, "distill.guidance": 3, "data.frames": 2, "data.height": 16,
                                 "data.width": 16, "data.images": 1})  # fmt: skip
    task = build.stage_task(config, np.float32, load_init(config, tmp_path))
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(learning_rate=1e-3, warmup=0), 10)
    state, rng = make_state(task.start, task, tx), np.random.default_rng(0)
    batch = {
        "video": rng.integers(0, 255, (2, 2, 16, 16, 3), np.uint8),
        "images": rng.integers(0, 255, (2, 1, 16, 16, 3), np.uint8),
        "tokens": np.full((2, tiny.CONTEXT), 3, np.int32),
        "image_tokens": np.full((2, 1, tiny.CONTEXT), 4, np.int32),
    }
    update, held_out = jax.jit(make_update(task, tx, ema_decay=0.5)), jax.jit(task.held_out)
    before = held_out(state["ema"], task.frozen, batch, jax.random.key(0))
    for _ in range(8):
        state, losses = update(state, task.frozen, batch, jax.random.key(0))
        assert losses["skipped"] == 0
    after = held_out(state["ema"], task.frozen, batch, jax.random.key(0))
    assert after["video_loss"] < before["video_loss"]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["guidance", "consistency"])
def test_tiny_trains_resumes_and_is_sampled(kind, tmp_path):
    command = [sys.executable, "train.py", "--config", "configs/distill.py:tiny", "--config.steps=4",
               "--config.checkpoint_every=2", "--config.sample_every=2", "--config.prompts=()",
               f"--config.distill.kind={kind}"]  # fmt: skip
    digests = []
    for words in (["--workdir", "a"], ["--workdir", "b", "--config.steps=2"], ["--workdir", "b"]):
        words[1] = str(tmp_path / words[1])
        done = subprocess.run([*command, *words], cwd=ROOT, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.splitlines()[-1])
    assert digests[0] == digests[2] != digests[1]
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    words = ["--weights", str(tmp_path / "a/weights"), "--prompt", "a red circle", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "sample.py", *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "out").glob("0000-*.json")
    request = json.loads(made.read_text())["request"]
    assert request["guidance"] == 1 and (request["sampler"] == "lcm") == (kind == "consistency")


def test_a_student_of_guidance_keeps_the_samplers_of_its_teachers_presets():
    teacher = {"fast": {"sampler": "dpm++2m", "steps": 12, "guidance_low": 200, "guidance": 5.0}, "balanced": {}}
    assert student_presets("guidance", teacher) == {"fast": {"sampler": "dpm++2m", "steps": 12}, "balanced": {}}
    assert student_presets("consistency", teacher) == {"fast": {}, "balanced": {}}
    assert student_presets("guidance", {}) == {} == student_presets("none", {})
