"""Schedules: the forward process, the three prediction types, diffusers' JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.diffusion import Schedule
from lavie_jax.diffusion.schedule import PREDICTIONS, split_prediction
from lavie_jax.errors import UserError

T = np.array([0, 1, 250, 999])


def normal(*shape):
    keys = jax.random.split(jax.random.key(len(shape)))
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)


def test_betas_of_both_kinds():
    for kind, middle in (("linear", (1e-4 + 0.02) / 2), ("scaled_linear", ((1e-2 + 0.02**0.5) / 2) ** 2)):
        abar = Schedule(kind=kind, steps=3).alphas_cumprod
        assert abar.dtype == np.float64
        betas = 1 - abar / np.append(1.0, abar[:-1])
        np.testing.assert_allclose(betas, [1e-4, middle, 0.02], rtol=1e-12)


def test_signal_and_noise_have_the_variances_of_abar():
    x0, eps = jnp.full((4, 20_000), 2.0), normal(4, 20_000)[0]
    schedule = Schedule()
    x_t = schedule.add_noise(x0, eps, T)
    np.testing.assert_allclose(x_t.mean(1), 2 * schedule.alphas_cumprod[T] ** 0.5, atol=0.03)
    np.testing.assert_allclose(x_t.var(1), 1 - schedule.alphas_cumprod[T], rtol=0.05)


def test_little_noise_is_exact_in_float32():
    schedule = Schedule()
    sigma = schedule.add_noise(jnp.zeros((1, 1)), jnp.ones((1, 1)), np.array([0]))
    np.testing.assert_allclose(sigma, 0.01, rtol=1e-6)  # sqrt(beta_start); with 1 - abar in float32, wrong by 2e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_splits_into_x0_and_eps(prediction):
    schedule = Schedule(prediction=prediction)
    x0, eps = normal(4, 5, 3)
    t = np.array([20, 250, 500, 900])  # at both ends rounding loses x0 or eps
    abar = schedule.alphas_cumprod[t][:, None, None]
    target, x_t = schedule.target(x0, eps, t), schedule.add_noise(x0, eps, t)
    alpha, sigma = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (abar, 1 - abar))
    split = split_prediction(prediction, target, x_t, alpha, sigma)
    np.testing.assert_allclose(split[0], x0, atol=1e-4)
    np.testing.assert_allclose(split[1], eps, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_timestep_of_each_frame(prediction):
    schedule = Schedule(prediction=prediction)
    x0, eps = normal(2, 3, 4, 4, 1)
    t = np.array([[1, 500, 999], [7, 7, 300]])
    x_t, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
    for frame in range(3):
        one = x0[:, frame], eps[:, frame], t[:, frame]
        np.testing.assert_array_equal(x_t[:, frame], schedule.add_noise(*one))
        np.testing.assert_array_equal(target[:, frame], schedule.target(*one))


def test_snr():
    abar = Schedule().alphas_cumprod
    snr = Schedule().snr(T.reshape(2, 2))
    np.testing.assert_allclose(snr, (abar[T] / (1 - abar[T])).reshape(2, 2), rtol=1e-6)


def test_a_schedule_is_a_static_argument():
    noisy = jax.jit(lambda schedule, x0, eps, t: schedule.add_noise(x0, eps, t), static_argnums=0)
    x0, eps = normal(4, 5)
    np.testing.assert_allclose(noisy(Schedule(), x0, eps, T), Schedule().add_noise(x0, eps, T), rtol=1e-6)
    assert hash(Schedule()) == hash(Schedule()) and Schedule() != Schedule(prediction="sample")


def test_json_both_ways():
    schedule = Schedule("scaled_linear", 0.00085, 0.012, 500, "v_prediction")
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert Schedule.from_json({}) == Schedule()


def test_a_scheduler_config_of_stable_diffusion():
    config = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert Schedule.from_json(config) == Schedule("scaled_linear", 0.00085, 0.012)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, r"squaredcos_cap_v2.*linear, scaled_linear"),
        ({"prediction_type": "v-pred"}, r"'v-pred'.*mean 'v_prediction'.*epsilon, sample"),
        ({"beta_start": 0.5, "beta_end": 0.1}, r"beta_start <= beta_end.*0\.5 and 0\.1"),
        ({"beta_start": 0}, "0 < beta_start"),
        ({"beta_end": float("nan")}, "0 < beta_start.*nan"),
        ({"beta_end": "0.02"}, "beta_end must be a number, not '0.02'"),
        ({"num_train_timesteps": 0}, "at least 1 timestep, not 0"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps must be a whole number, not 10.5"),
        ({"num_train_timesteps": True}, "not True"),
        ({"prediction_type": None}, "prediction_type must be a string, not None"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_unsupported_configs_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        Schedule.from_json(config)


def test_a_schedule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule().steps = 10
