"""Samplers against the original loops, exact solutions and independent implementations; guidance.

The model is the exact denoiser of Gaussian data with mean 0.3 and variance 0.25. Its probability-flow ODE has a closed
solution: (x_t - alpha_t mean) / std(x_t) is constant.
"""

import functools
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from lavie_jax.diffusion import SAMPLERS, SPACINGS, Schedule, chain_warning, guide, make_sampler, sample
from lavie_jax.diffusion.making import original_sampler, state_arrays
from lavie_jax.diffusion.samplers import DDIM
from lavie_jax.diffusion.schedule import PREDICTIONS
from lavie_jax.diffusion.spacing import AYS_SIGMAS
from lavie_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
MEAN, VARIANCE = 0.3, 0.25
DETERMINISTIC = [name for name in SAMPLERS if not make_sampler(name, 50, Schedule()).needs_noise]
ONE_STEP = ["dpm++2m", "euler", "heun", "unipc", "lcm"]
# case in the golden file -> sampler, prediction
CASES = {
    "ddpm": ("ddpm", "epsilon"),
    "ddim": ("ddim", "epsilon"),
    "euler": ("euler", "epsilon"),
    "vsr_ddim_v": ("ddim", "v_prediction"),
    "interp_ddim": ("respaced_ddim", "epsilon"),
}


def gaussian_denoiser(schedule, mean=MEAN, variance=VARIANCE, rounded=True):
    """The optimal prediction for Gaussian data, at the nearest whole timestep or at exactly t."""
    abar, sigmas = (jnp.asarray(x, jnp.float32) for x in (schedule.alphas_cumprod, schedule.sigmas))

    def denoise(x_t, t):
        assert x_t.dtype == jnp.float32
        assert t.shape == x_t.shape[:1]
        if rounded:
            a = abar[jnp.round(t).astype(jnp.int32)]
        else:
            a = 1 / (jnp.interp(t, jnp.arange(schedule.steps), sigmas) ** 2 + 1)
        a = a.reshape(t.shape + (1,) * (x_t.ndim - 1))
        alpha, sigma = jnp.sqrt(a), jnp.sqrt(1 - a)
        x0 = mean + variance * alpha * (x_t - alpha * mean) / (variance * a + 1 - a)
        eps = sigma * (x_t - alpha * mean) / (variance * a + 1 - a)
        return {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[schedule.prediction]

    return denoise


def exact_solution(sampler, noise):
    """Returns the solution at the end of the ODE that starts from the sampler's first x_t."""
    a = sampler.levels[0]
    noise = noise * a**0.5 * sampler.init_noise_sigma if sampler.fractional else noise
    return MEAN + VARIANCE**0.5 * (noise - a**0.5 * MEAN) / (VARIANCE * a + 1 - a) ** 0.5


def distance(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def normal(seed, shape=(2, 3, 4, 4, 1)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def advance(sampler, denoise, state, i, noise=None):
    return sampler.update(state, i, denoise(*sampler.model_input(state, i)), noise)


@functools.partial(jax.jit, static_argnames=("sampler", "rounded", "mean", "variance"))
def run(sampler, noise, noises=None, **data):
    """Runs the whole chain as one loop with a traced index of the evaluation."""
    denoise = gaussian_denoiser(sampler.schedule, **data)

    def step(i, state):
        return advance(sampler, denoise, state, i, noises[i] if sampler.needs_noise else None)

    return jax.lax.fori_loop(0, sampler.evaluations, step, sampler.init(noise))["x"]


def make(name, steps, prediction="epsilon", spacing=None):
    return make_sampler(name, steps, Schedule(prediction=prediction), spacing)


def error(name, steps, spacing=None):
    """Returns the distance from the exact solution."""
    sampler = make(name, steps, spacing=spacing)
    return distance(run(sampler, normal(0), rounded=False), exact_solution(sampler, normal(0)))


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
def test_prediction_types_give_the_same_samples(name):
    noise, noises = normal(0), normal(1, (10, 2, 3, 4, 4, 1))
    expected, *others = (run(make(name, 10, kind), noise, noises) for kind in PREDICTIONS)
    for x0 in others:
        assert distance(x0, expected) < 2e-5


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("stop", [3, 4])  # heun: within a step, between steps
def test_a_chain_resumes_from_a_state_on_disk(name, stop, tmp_path):
    sampler = make(name, 6) if name != "heun" else make(name, 3)
    count = sampler.evaluations
    noises = normal(1, (6, 2, 3, 4, 4, 1))
    denoise = gaussian_denoiser(sampler.schedule)
    step = jax.jit(lambda state, i, noise: advance(sampler, denoise, state, i, noise))

    state = sampler.init(normal(0))
    for i in range(count):
        if i == stop:
            np.savez(tmp_path / "state.npz", **state)
        state = step(state, i, noises[i])
    resumed = dict(np.load(tmp_path / "state.npz"))
    for i in range(stop, count):
        resumed = step(resumed, i, noises[i])

    assert jax.tree.map(lambda x: (x.shape, x.dtype), resumed) == jax.tree.map(
        lambda x: (x.shape, x.dtype), sampler.init(normal(0))
    )
    np.testing.assert_array_equal(resumed["x"], state["x"])
    assert distance(run(sampler, normal(0), noises), state["x"]) < (1e-4 if name == "heun" else 1e-6)
    assert distance(sample(sampler, denoise, normal(0), lambda i: noises[i]), state["x"]) < (
        1e-4 if name == "heun" else 1e-6
    )


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_more_steps_lead_to_the_exact_solution(name):
    errors = []
    for steps in (25, 100):
        sampler = make(name, steps)
        errors.append(distance(run(sampler, normal(0), rounded=False), exact_solution(sampler, normal(0))))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.03


def test_orders_of_convergence():
    assert error("dpm++2m", 10) < error("ddim", 10) / 3
    # four times the steps: a sixteenth of the error at second order, a quarter at first
    assert error("dpm++2m", 40) < error("dpm++2m", 10) / 10
    assert error("ddim", 10) / 5 < error("ddim", 40) < error("ddim", 10) / 3
    assert error("heun", 40) < error("heun", 10) / 10
    assert error("unipc", 40) < error("unipc", 10) / 10
    assert error("unipc", 40) < error("dpm++2m", 40)


@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_multistep_solvers_are_more_accurate_on_quadratic_than_on_even_timesteps(name, steps):
    assert error(name, steps) < error(name, steps, "linspace") / 2
    assert error(name, steps) < error(name, steps, "trailing") / 2


def test_ddpm_samples_the_data_distribution():
    # Few steps give too little variance (0.205 at 50), because the variance is that of the posterior.
    x0 = np.asarray(run(make("ddpm", 500), normal(0, (4096, 1)), normal(1, (500, 4096, 1))))
    assert x0.mean() == pytest.approx(MEAN, abs=0.03)
    assert x0.var() == pytest.approx(VARIANCE, rel=0.1)


def test_euler_is_ddim_on_its_levels():
    euler = make("euler", 9)

    class OnEulersLevels(DDIM):
        step_timesteps = euler.timesteps
        levels = euler.levels

    noise = normal(0)
    start = euler.levels[0] ** 0.5 * euler.init_noise_sigma * noise  # Euler's first x_t
    assert distance(run(euler, noise), run(OnEulersLevels(9, euler.schedule, "linspace"), start)) < 1e-5


def test_the_last_ddpm_step_adds_no_noise():
    sampler = make("ddpm", 5)
    denoise = gaussian_denoiser(sampler.schedule)
    state = sampler.init(normal(0))
    quiet, loud = (advance(sampler, denoise, state, 4, np.full_like(normal(0), c))["x"] for c in (0, 1e6))
    np.testing.assert_array_equal(quiet, loud)


def test_ddpm_without_noise_is_refused():
    sampler = make("ddpm", 5)
    with pytest.raises(ValueError, match="noise"):
        advance(sampler, gaussian_denoiser(sampler.schedule), sampler.init(normal(0)), 0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
def test_every_number_of_steps_has_falling_timesteps_and_rising_levels(name, spacing):
    schedule = Schedule()
    kind = type(make(name, 10))
    for steps in range(1, 1001, 1 if spacing is None else 7):
        sampler = kind(steps, schedule, spacing or kind.default_spacing)
        assert sampler.step_timesteps.shape == (steps,) and sampler.timesteps.shape == (sampler.evaluations,)
        assert 0 <= sampler.timesteps[-1] and sampler.timesteps[0] <= 999 + 1e-9
        assert (np.diff(sampler.step_timesteps) < 0).all()
        assert (np.diff(sampler.levels) >= 0).all() and sampler.levels[-1] <= 1


@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_extreme_numbers_of_steps_sample_the_data(name, steps):
    """Data of mean 2 and standard deviation 0.1, which noise (mean 0, standard deviation 1) is far from.

    Golden cases may have what the original programs do with fewer steps.
    """
    assert len(original_sampler(name, steps, Schedule()).step_timesteps) == steps
    if steps == 1 and name not in ONE_STEP:
        with pytest.raises(UserError, match="would return noise"):
            make(name, steps)
        return
    if name == "respaced_ddpm" and steps in (2, 3):
        with pytest.raises(UserError, match="would remain in the result. Use at least 4 steps"):
            make(name, steps)
        return
    shape = (2000, 1)
    x0 = run(make(name, steps), normal(0, shape), normal(1, (steps, *shape)), mean=2.0, variance=0.01, rounded=False)
    assert abs(x0.mean() - 2) < 0.1 and x0.std() < 0.2


def test_the_larger_variance_leaves_noise_in_short_chains():
    """The warned-about noise is in the result, in addition to the spread of the data."""
    shape = (2000, 1)
    for steps in (10, 39):
        sampler = make("respaced_ddpm", steps)
        x0 = run(sampler, normal(0, shape), normal(1, (steps, *shape)), mean=2.0, variance=0.01, rounded=False)
        assert float(x0.std()) == pytest.approx((0.01 + sampler.residual_noise**2) ** 0.5, rel=0.1)
        assert (chain_warning(sampler) is None) == (steps == 39)
    assert "Use at least 39 steps" in chain_warning(make("respaced_ddpm", 38))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_state_stays_float32_with_a_half_precision_network(name):
    sampler = make(name, 4)
    state = sampler.init(jnp.asarray(normal(0), jnp.bfloat16))
    state = advance(sampler, lambda x_t, t: jnp.asarray(x_t, jnp.bfloat16), state, 0, normal(1))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_gets_whole_timesteps_as_integers(name):
    sampler = make(name, 4)
    _, t = sampler.model_input(sampler.init(normal(0)), 1)
    np.testing.assert_allclose(t, sampler.timesteps[1], rtol=1e-6)
    assert t.dtype == (np.float32 if name == "euler" else np.int32)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_model_input_of_a_state_on_the_host_stays_on_the_host(name):
    sampler = make(name, 4)
    state = jax.device_get(sampler.init(normal(0)))
    on_host = sampler.model_input(state, 1)
    assert [type(array) for array in on_host] == [np.ndarray, np.ndarray]
    for array, traced in zip(on_host, jax.jit(sampler.model_input)(state, 1)):
        assert array.dtype == traced.dtype
        np.testing.assert_array_equal(array, traced)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_prediction_of_known_data_leads_to_the_data(name, prediction):
    sampler = make_sampler(name, 10, Schedule(prediction=prediction))
    x0, noise = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    state = sampler.init(noise)
    for i in range(sampler.evaluations):
        exact = sampler.prediction_of(state, i, x0)
        state = sampler.update(state, i, exact, np.zeros_like(noise) if sampler.needs_noise else None)
    left = (1 - sampler.final_level) ** 0.5  # noise, of samplers that end before level 1
    np.testing.assert_allclose(state["x"], x0, atol=3 * left + 1e-4)


def test_a_shorter_schedule_has_fewer_timesteps():
    schedule = Schedule(steps=20)
    for name in SAMPLERS:
        assert make_sampler(name, 20, schedule).timesteps.max() == 19
        with pytest.raises(UserError, match="from 1 to 20"):
            make_sampler(name, 21, schedule)


# ---- heun and unipc ----


def test_heun_takes_two_evaluations_a_step_but_for_the_last():
    sampler = make("heun", 3, spacing="trailing")
    assert sampler.evaluations == 5
    np.testing.assert_array_equal(sampler.timesteps, [999, 666, 666, 332, 332])


def heun_float64(sampler, denoise, noise):
    """Algorithm 1 of arXiv 2206.00364 without churn, as the paper writes it, with its denoiser D(x; sigma)."""
    sigmas = sampler.sigmas
    x = sigmas[0] * noise.astype(np.float64)
    for k in range(sampler.steps):
        d = (x - denoise(x, sigmas[k])) / sigmas[k]
        trial = x + (sigmas[k + 1] - sigmas[k]) * d
        if sigmas[k + 1] != 0:
            d_trial = (trial - denoise(trial, sigmas[k + 1])) / sigmas[k + 1]
            trial = x + (sigmas[k + 1] - sigmas[k]) * (d / 2 + d_trial / 2)
        x = trial
    return x


def unipc_float64(levels, x0_of, noise):
    """UniPC-2 with B(h) = 1 - e^-h, each step written as in arXiv 2302.04867, and UniC-2 as the integral it solves."""
    alpha, sigma = np.sqrt(levels), np.sqrt(1 - levels)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    nodes, weights = np.polynomial.legendre.leggauss(20)

    def parabola_step(x, t, s, times, values):
        """sigma_s / sigma_t x + sigma_s * integral of e^lambda x0(lambda), x0 the parabola through three estimates."""
        points = (lam[s] + lam[t]) / 2 + nodes * (lam[s] - lam[t]) / 2
        integral = 0
        for k, value in enumerate(values):
            others = [lam[times[m]] for m in range(3) if m != k]
            lagrange = np.prod([(points - other) / (lam[times[k]] - other) for other in others], axis=0)
            integral = integral + (weights * np.exp(points) * lagrange).sum() * (lam[s] - lam[t]) / 2 * value
        return sigma[s] / sigma[t] * x + sigma[s] * integral

    corrected, x, x0 = [], noise.astype(np.float64), []
    for i in range(len(levels) - 1):
        x0.append(x0_of(x, alpha[i], sigma[i]))
        if i == 1:  # UniC-1: a_1 = 1/2
            h = lam[1] - lam[0]
            x = sigma[1] / sigma[0] * corrected[0] + alpha[1] * (1 - np.exp(-h)) * (x0[0] + (x0[1] - x0[0]) / 2)
        elif i > 1:  # UniC-2
            x = parabola_step(corrected[-1], i - 1, i, (i - 2, i - 1, i), x0[-3:])
        corrected.append(x)
        h, mean = lam[i + 1] - lam[i], x0[i]
        if 0 < i < len(levels) - 2:  # UniP-2: a_1 = 1/2; the first and the last step are UniP-1
            r = (lam[i - 1] - lam[i]) / h
            mean = x0[i] + (x0[i - 1] - x0[i]) / r / 2
        x = sigma[i + 1] / sigma[i] * x + alpha[i + 1] * (1 - np.exp(-h)) * mean
    return x


def mixture_x0(x, alpha, sigma):
    """E[x0 | x_t] of two Gaussians, in float64: not linear in x_t."""
    means, variances, shares = np.array([-1.0, 0.8]), np.array([0.04, 0.09]), np.array([0.4, 0.6])
    x = np.asarray(x, np.float64)[..., None]
    total = alpha**2 * variances + sigma**2
    log_p = np.log(shares) - np.log(total) / 2 - (x - alpha * means) ** 2 / (2 * total)
    p = np.exp(log_p - log_p.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return (p * (means + variances * alpha / total * (x - alpha * means))).sum(-1)


def mixture_denoiser(sampler):
    """The optimal prediction of x0 for the mixture, at the sampler's levels."""
    levels = {np.float32(t): level for t, level in zip(sampler.step_timesteps, sampler.levels)}

    def denoise(x_t, t):
        level = levels[np.float32(t[0])]
        return jnp.asarray(mixture_x0(x_t, np.sqrt(level), np.sqrt(1 - level)), jnp.float32)

    return denoise


@pytest.mark.parametrize("spacing", ["quadratic", "linspace", "karras"])
def test_heun_is_the_papers_algorithm(spacing):
    sampler = make("heun", 7, "sample", spacing)

    def D(x, sigma):
        return mixture_x0(x / np.sqrt(sigma**2 + 1), 1 / np.sqrt(sigma**2 + 1), sigma / np.sqrt(sigma**2 + 1))

    expected = heun_float64(sampler, D, normal(0, (500, 1)))
    assert distance(sample(sampler, mixture_denoiser(sampler), normal(0, (500, 1))), expected) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("spacing", ["quadratic", "trailing", "linspace"])
def test_unipc_is_the_papers_algorithm(spacing, steps):
    if (spacing, steps) == ("linspace", 1):
        return
    sampler = make("unipc", steps, "sample", spacing)
    expected = unipc_float64(sampler.levels, mixture_x0, normal(0, (500, 1)))
    assert distance(sample(sampler, mixture_denoiser(sampler), normal(0, (500, 1))), expected) < 1e-5


@pytest.mark.parametrize("name", ["heun", "dpm++2m", "unipc"])
def test_second_order_samplers_beat_ddim_at_equal_evaluations_on_a_mixture(name):
    noise = normal(0, (500, 1))

    def end(name, steps, spacing=None):
        sampler = make(name, steps, "sample", spacing)
        return np.asarray(sample(sampler, mixture_denoiser(sampler), noise))

    exact = end("dpm++2m", 200)
    second_order = end(name, 10 if name == "heun" else 19)  # 19 evaluations each
    assert distance(second_order, exact) < distance(end("ddim", 19), exact) / 1.5


# ---- refusals and warnings ----


def test_unknown_samplers_are_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"'dpm\+\+'.*mean 'dpm\+\+2m'.*euler"):
        make("dpm++", 10)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(UserError, match="from 1 to 1000"):
        make("ddim", steps)


def test_one_step_is_refused_where_it_would_return_noise():
    for name in ("ddpm", "ddim", "respaced_ddim"):
        with pytest.raises(
            UserError,
            match=rf"^{name} cannot sample in 1 step: .* at least 2 steps.* that can: euler, heun, dpm\+\+2m, unipc$",
        ):
            make(name, 1)
        assert make(name, 2).step_timesteps[0] >= 500
    assert make("ddim", 1, spacing="trailing").timesteps == [999]


def test_a_chain_that_starts_far_below_the_last_timestep_is_described_and_only_on_request(monkeypatch):
    logged = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: logged.append(message % args))
    for steps in (3, 10, 50, 100, 500, 1000):
        assert chain_warning(make("ddim", steps)) is None
    warning = chain_warning(make("ddim", 501))
    assert "ddim with 501 steps and 'leading' spacing starts at timestep 501 of 1000" in warning
    assert "7.7% of the variance" in warning and "500 steps" in warning
    assert chain_warning(make("ddim", 501, spacing="trailing")) is None
    assert chain_warning(make("respaced_ddpm", 250)) is None
    assert "noise of standard deviation 0.18 in the result. Use at least" in chain_warning(make("respaced_ddpm", 20))
    assert not logged


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_number_of_arrays_in_a_state_is_as_declared(name):
    sampler = make(name, 5)
    state = sampler.init(np.zeros((1, 2), np.float32))
    assert len(state) == sampler.state_arrays == state_arrays(name)


def test_spacings():
    def timesteps(spacing, name="ddim", steps=10):
        return list(make(name, steps, spacing=spacing).timesteps)

    # table 2 of arXiv 2305.08891 counts from 1
    assert timesteps("leading", "ddpm") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert timesteps("linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert timesteps("trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert timesteps("quadratic", steps=3) == [999, 444, 111]
    sigmas = make("euler", 10, spacing="karras").sigmas
    np.testing.assert_allclose(sigmas[[0, -2]], Schedule().sigmas[[-1, 0]])
    roots = sigmas[:-1] ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0])
    np.testing.assert_allclose(make("euler", 10, spacing="ays").sigmas[1:-1], AYS_SIGMAS)
    # whole timesteps of the same levels, moved apart where they are dense
    assert timesteps("ays", "unipc") == list(np.rint(make("euler", 10, spacing="ays").timesteps))
    assert timesteps("karras", steps=1000) == list(range(999, -1, -1))


def test_spacings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="unknown timestep spacing 'trail'.*mean 'trailing'"):
        make("ddim", 10, spacing="trail")


# ---- guidance ----


def test_guidance_extrapolates_from_uncond_through_cond():
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
