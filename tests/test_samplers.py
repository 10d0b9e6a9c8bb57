"""Samplers against the original loops and against exact solutions; guidance.

The model is the exact denoiser of Gaussian data with mean 0.3 and variance 0.25. Its probability-flow ODE has
a closed solution: (x_t - alpha_t mean) / std(x_t) stays what it is.
"""

import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.diffusion import SAMPLERS, Schedule, guide, make_sampler
from lavie_jax.diffusion.samplers import DDIM, DPMSolver2M
from lavie_jax.diffusion.schedule import PREDICTIONS
from lavie_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
MEAN, VARIANCE = 0.3, 0.25
DETERMINISTIC = [name for name in SAMPLERS if name != "ddpm"]
# case in the golden file -> sampler, prediction
CASES = {
    "ddpm": ("ddpm", "epsilon"),
    "ddim": ("ddim", "epsilon"),
    "euler": ("euler", "epsilon"),
    "vsr_ddim_v": ("ddim", "v_prediction"),
    "interp_ddim": ("respaced_ddim", "epsilon"),
}


def gaussian_denoiser(schedule):
    """E[eps | x_t] of the Gaussian data in the schedule's parameterisation, at the nearest whole timestep."""
    abar = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def denoise(x_t, t):
        assert x_t.dtype == jnp.float32
        assert t.shape == x_t.shape[:1]
        t = jnp.round(t).astype(jnp.int32)
        a = abar[t].reshape(t.shape + (1,) * (x_t.ndim - 1))
        alpha, sigma = jnp.sqrt(a), jnp.sqrt(1 - a)
        x0 = MEAN + VARIANCE * alpha * (x_t - alpha * MEAN) / (VARIANCE * a + 1 - a)
        eps = sigma * (x_t - alpha * MEAN) / (VARIANCE * a + 1 - a)
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[schedule.prediction]

    return denoise


def exact_solution(sampler, noise):
    """Where the ODE leads from the sampler's first level; the state there is the noise itself."""
    a = sampler.levels[0]
    return MEAN + VARIANCE**0.5 * (noise - a**0.5 * MEAN) / (VARIANCE * a + 1 - a) ** 0.5


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def normal(seed, shape=(2, 3, 4, 4, 1)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(sampler, noise, noises=None):
    """The whole chain as one loop, the step's number traced."""
    denoise = gaussian_denoiser(sampler.schedule)

    def step(i, state):
        return sampler.step(state, i, denoise, noises[i] if sampler.needs_noise else None)

    return jax.lax.fori_loop(0, sampler.steps, step, sampler.init(noise))["x"]


def make(name, steps, prediction="epsilon"):
    return make_sampler(name, steps, Schedule(prediction=prediction))


@pytest.mark.parametrize("steps", [7, 50])
@pytest.mark.parametrize("case", CASES)
def test_the_original_loops_are_reproduced(case, steps):
    config = json.loads((GOLDEN / "sampling_loops.json").read_text())
    stored = np.load(GOLDEN / "sampling_loops.npz")

    def draw(what):
        rng = np.random.RandomState(zlib.crc32(f"{config['salt']}loop/{case}/{steps}/{what}".encode()))
        return rng.standard_normal(config["shape"]).astype(np.float32)

    name, prediction = CASES[case]
    sampler = make(name, steps, prediction)
    np.testing.assert_allclose(sampler.timesteps, stored[f"{case}_{steps}_timesteps"], rtol=1e-14)
    if case != "interp_ddim":
        expected_sigma = config["meta"][f"{case}_{steps}"]["init_noise_sigma"]
        assert sampler.init_noise_sigma == pytest.approx(expected_sigma, rel=1e-6)

    noises = np.stack([draw(f"noise/{i}") for i in range(steps)]) if sampler.needs_noise else None
    assert distance(run(sampler, draw("init"), noises), stored[f"{case}_{steps}"]) < 4e-6


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_prediction_type_is_only_a_way_to_say_it(name):
    noise, noises = normal(0), normal(1, (10, 2, 3, 4, 4, 1))
    expected, *others = (run(make(name, 10, kind), noise, noises) for kind in PREDICTIONS)
    for x0 in others:
        assert distance(x0, expected) < 2e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_saved_in_the_middle_goes_on_as_if_never_stopped(name, tmp_path):
    sampler = make(name, 6)
    noises = normal(1, (6, 2, 3, 4, 4, 1))
    denoise = gaussian_denoiser(sampler.schedule)
    step = jax.jit(lambda state, i, noise: sampler.step(state, i, denoise, noise))

    state = sampler.init(normal(0))
    for i in range(6):
        if i == 3:
            np.savez(tmp_path / "state.npz", **state)
        state = step(state, i, noises[i])
    resumed = dict(np.load(tmp_path / "state.npz"))
    for i in range(3, 6):
        resumed = step(resumed, i, noises[i])

    assert jax.tree.map(lambda x: (x.shape, x.dtype), resumed) == jax.tree.map(
        lambda x: (x.shape, x.dtype), sampler.init(normal(0))
    )
    np.testing.assert_array_equal(resumed["x"], state["x"])
    assert distance(run(sampler, normal(0), noises), state["x"]) < 1e-6  # the lax loop is the Python loop


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_more_steps_lead_to_the_exact_solution(name):
    errors = []
    for steps in (25, 100):
        sampler = make(name, steps)
        errors.append(distance(run(sampler, normal(0)), exact_solution(sampler, normal(0))))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.03


def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    def error(name, steps):
        sampler = make(name, steps)
        return distance(run(sampler, normal(0)), exact_solution(sampler, normal(0)))

    assert error("dpm++2m", 10) < error("ddim", 10) / 3
    # four times the steps: a sixteenth of the error at second order, a quarter at first
    assert error("dpm++2m", 40) < error("dpm++2m", 10) / 10
    assert error("ddim", 10) / 5 < error("ddim", 40) < error("ddim", 10) / 3


@pytest.mark.parametrize("steps", [10, 20])
def test_quadratic_timesteps_serve_dpm_solver_better_than_even_ones(steps):
    ours = make("dpm++2m", steps)

    class EvenlySpaced(DPMSolver2M):
        timesteps = np.linspace(999, 0, steps + 1).astype(int)[:-1]

    errors = [
        distance(run(sampler, normal(0)), exact_solution(sampler, normal(0)))
        for sampler in (ours, EvenlySpaced(steps, ours.schedule))
    ]
    assert errors[0] < errors[1] / 2


def test_ddpm_draws_from_the_data_distribution():
    # few steps give too little variance (0.205 at 50): the price of variance fixed_small
    x0 = np.asarray(run(make("ddpm", 500), normal(0, (4096, 1)), normal(1, (500, 4096, 1))))
    assert x0.mean() == pytest.approx(MEAN, abs=0.03)
    assert x0.var() == pytest.approx(VARIANCE, rel=0.1)


def test_euler_is_ddim_on_its_levels():
    euler = make("euler", 9)

    class OnEulersLevels(DDIM):
        timesteps = euler.timesteps
        levels = euler.levels

    noise = normal(0)
    start = euler.levels[0] ** 0.5 * euler.init_noise_sigma * noise  # Euler's first x_t
    assert distance(run(euler, noise), run(OnEulersLevels(9, euler.schedule), start)) < 1e-5


def test_the_last_ddpm_step_adds_no_noise():
    sampler = make("ddpm", 5)
    denoise = gaussian_denoiser(sampler.schedule)
    quiet, loud = (sampler.step(sampler.init(normal(0)), 4, denoise, np.full_like(normal(0), c))["x"] for c in (0, 1e6))
    np.testing.assert_array_equal(quiet, loud)


def test_ddpm_without_noise_is_refused():
    sampler = make("ddpm", 5)
    with pytest.raises(ValueError, match="noise"):
        sampler.step(sampler.init(normal(0)), 0, gaussian_denoiser(sampler.schedule))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_number_of_steps_has_falling_timesteps_and_rising_levels(name):
    schedule = Schedule()
    for steps in range(1, 1001):
        sampler = make_sampler(name, steps, schedule)
        assert sampler.timesteps.shape == (steps,)
        assert 0 <= sampler.timesteps[-1] and sampler.timesteps[0] <= 999
        assert (np.diff(sampler.timesteps) < 0).all()
        assert (np.diff(sampler.levels) >= 0).all() and sampler.levels[-1] <= 1


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_extreme_numbers_of_steps_stay_finite(name, steps):
    x0 = run(make(name, steps), normal(0), normal(1, (steps, 2, 3, 4, 4, 1)))
    assert np.isfinite(x0).all() and np.abs(x0).max() < 10


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_half_precision_network_does_not_make_the_state_half_precision(name):
    sampler = make(name, 4)
    state = sampler.init(jnp.asarray(normal(0), jnp.bfloat16))
    state = sampler.step(state, 0, lambda x_t, t: x_t.astype(jnp.bfloat16), normal(1))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def test_whole_timesteps_reach_the_network_as_integers():
    seen = {}
    for name in SAMPLERS:
        sampler = make(name, 4)

        def denoise(x_t, t):
            seen[name] = t  # noqa: B023
            return x_t

        sampler.step(sampler.init(normal(0)), 1, denoise, normal(1))
        np.testing.assert_allclose(seen[name], sampler.timesteps[1], rtol=1e-6)
    assert {name: str(t.dtype) for name, t in seen.items()} == {
        name: "float32" if name == "euler" else "int32" for name in SAMPLERS
    }


def test_a_shorter_schedule_has_fewer_timesteps():
    schedule = Schedule(steps=20)
    for name in SAMPLERS:
        assert make_sampler(name, 20, schedule).timesteps.max() == 19
        with pytest.raises(UserError, match="from 1 to 20"):
            make_sampler(name, 21, schedule)


def test_unknown_samplers_are_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'dpm\+\+'.*mean 'dpm\+\+2m'.*euler"):
        make("dpm++", 10)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(UserError, match="from 1 to 1000"):
        make("ddim", steps)


# --- guidance ---------------------------------------------------------------------------------------------


def test_guidance_goes_from_uncond_through_cond_and_on():
    cond, uncond = jnp.asarray(normal(0)), jnp.asarray(normal(1))
    np.testing.assert_allclose(guide(cond, uncond, 0.0), uncond, atol=1e-6)
    np.testing.assert_allclose(guide(cond, uncond, 1.0), cond, atol=1e-6)
    np.testing.assert_allclose(guide(cond, uncond, 7.5) - cond, 6.5 * (cond - uncond), rtol=1e-3, atol=1e-5)


def test_rescaled_guidance_has_the_deviation_of_cond_in_each_sample():
    cond, uncond = (
        jnp.asarray(normal(0)) * jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1, 1),
        jnp.asarray(normal(1)),
    )
    axes = (1, 2, 3, 4)
    full, half, none = (guide(cond, uncond, 7.5, rescale) for rescale in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(full.std(axes), cond.std(axes), rtol=1e-5)
    np.testing.assert_allclose(half, (full + none) / 2, rtol=1e-5)
