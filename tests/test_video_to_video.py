"""Video to video, FreeInit and FreeU: what they compute, and that without them nothing changes."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lavie_jax
from lavie_jax.cascade.denoising import SAVE_EVERY, DenoisingPlan
from lavie_jax.diffusion import Schedule, make_sampler, sample
from lavie_jax.diffusion.free_init import CUTOFF, ORDER, low_pass, renoise
from lavie_jax.diffusion.guidance import Guidance
from lavie_jax.diffusion.making import SAMPLERS
from lavie_jax.errors import UserError
from lavie_jax.models.free_u import FreeU, amplified, weakened
from lavie_jax.models.registry import abstract_params
from lavie_jax.models.unet import UNet
from lavie_jax.stages.base import STAGE as BASE
from lavie_jax.stages.clips import ClipInfo
from lavie_jax.stages.settings import BaseSettings

CLIP = ClipInfo(frames=16, height=30, width=40, fps=12, own=True)


# ---- the tail of a chain ----


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_tail_of_a_chain_starts_from_noised_data(name):
    rng = np.random.default_rng(0)
    x0, noise = (rng.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
    whole = make_sampler(name, 20, Schedule())
    tail = whole.tail(12)
    assert whole.tail(0) == whole and tail.evaluations == (15 if name == "heun" else 8)
    np.testing.assert_array_equal(tail.timesteps, whole.timesteps[-tail.evaluations :])
    np.testing.assert_array_equal(tail.levels, whole.levels[12:])
    state = {**tail.init(noise), "x": tail.add_noise(x0, noise)}
    x_t, _ = tail.model_input(state, 0)
    abar = tail.levels[0]
    np.testing.assert_allclose(x_t, np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise, rtol=1e-4, atol=1e-5)

    def to_target(x_t, t):  # the network of a model that knows one clip
        abar = np.interp(np.asarray(t)[0], np.arange(1000), Schedule().alphas_cumprod)
        return (np.asarray(x_t) - np.sqrt(abar) * x0) / np.sqrt(1 - abar)

    for i in range(tail.evaluations):
        prediction = to_target(*tail.model_input(state, i))
        state = tail.update(state, i, prediction, noise * 0 if tail.needs_noise else None)
    np.testing.assert_allclose(state["x"], x0, atol=0.06)
    assert sample(whole, to_target, noise, lambda i: noise * 0).shape == x0.shape


# ---- settings ----


def resolve(clip=None, **given) -> BaseSettings:
    weights = SimpleNamespace(
        sampling=BASE.sampling, unet=SimpleNamespace(config=tiny.UNET), 
        vae=SimpleNamespace(config=SimpleNamespace(factor=8)), low_res_schedule=None,
    )  # fmt: skip
    return BASE.resolve(weights, given, clip)


def test_a_clip_determines_rate_and_length_and_strength_the_steps():
    made = resolve(CLIP, strength=0.6)
    assert (made.frames, made.fps, made.height, made.first_step) == (16, 12, 320, 20)
    assert resolve(CLIP, strength=1).first_step == 0 and resolve(CLIP, strength=0.01).first_step == 49
    assert resolve(CLIP, strength=0.6, frames=4, fps=8.0).frames == 4
    long = dataclasses.replace(CLIP, frames=40)
    assert resolve(long, strength=0.6, long="free_noise").frames == 40
    assert resolve(dataclasses.replace(CLIP, frames=1), strength=0.6).frames == 1  # image to image
    assert resolve().first_step == 0


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"clip": CLIP}, "a clip for base needs strength, above 0 to 1"),
        ({"strength": 0.6}, "strength: .* give an input clip"),
        ({"clip": CLIP, "strength": 0}, "strength: 0 of 50 steps leaves none to run: use at least 0.02"),
        ({"clip": CLIP, "strength": 0.009}, "leaves none to run"),
        ({"clip": CLIP, "strength": 1.01}, "strength must be from 0 to 1, not 1.01"),
        ({"clip": CLIP, "strength": float("nan")}, "strength must be finite"),
        ({"clip": CLIP, "strength": 0.6, "frames": 17}, "frames: 17 are more than the 16 of the clip"),
        ({"clip": dataclasses.replace(CLIP, frames=40), "strength": 0.6}, "40 frames, but this model makes 16: give"),
        ({"clip": CLIP, "strength": 0.6, "free_init": 1}, "free_init .* cannot be used with strength"),
        ({"free_init": 1, "long": "free_noise"}, "free_init .* cannot be used with long"),
        ({"free_init": -1}, "free_init must be from 0 to 100"),
        ({"free_u": "1.3,1.4,0.9"}, "'1.3,1.4,0.9' is not four numbers"),
        ({"free_u": "1.3,1.4,0.9,nan"}, "is not four numbers"),
        ({"free_u": "1.3,1.4,0.9,much"}, "is not four numbers"),
    ],
)
def test_what_base_cannot_do_is_refused_in_one_line(given, reason):
    with pytest.raises(UserError, match=reason) as error:
        resolve(**given)
    assert "\n" not in str(error.value)


def test_factors_are_recorded_exactly():
    assert resolve(free_u="1.0, 1.23456789,.5,0").free_u == "1,1.23456789,0.5,0"


# ---- samples ----


def test_strength_is_how_much_is_made_anew_and_a_further_pass_another_video(tmp_path):
    pipe = lavie_jax.load(tiny.make_base(tmp_path / "base", steps=4), devices=jax.devices()[:1])
    clip = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    text = {"prompt": "a red circle", "frames": 2}
    plain = pipe(**text)
    np.testing.assert_array_equal(pipe(**text, clip=clip, strength=1), plain)
    with pytest.raises(UserError, match="contain none of the sampler's timesteps, which are"):
        pipe(**text, clip=clip, strength=0.25, guidance_low=500)
    restyled = [pipe(**text, clip=clip, strength=strength).astype(int) for strength in (0.25, 0.75)]
    other = pipe(**text, clip=255 - clip, strength=0.25).astype(int)
    assert (restyled[0] != restyled[1]).any() and (restyled[0] != other).any() and restyled[0].shape == plain.shape
    again = pipe(**text, free_init=1)
    assert (again != plain).any()
    np.testing.assert_array_equal(pipe(**text, free_init=1, batch_size=1), again)


def test_states_are_saved_in_every_pass():
    plan = DenoisingPlan(
        sampler=make_sampler("ddim", 8, Schedule()), guidance=Guidance(scale=4, every=2), windows=[], rows=1, passes=3
    )
    assert plan.evaluations == 24 and max(plan.saves) == 24
    assert all(plan.guidance_modes[step % 8] == "computed" for step in plan.saves - {24})
    assert max(np.diff(sorted(plan.saves))) <= SAVE_EVERY + 1


# ---- FreeInit ----


def test_a_pass_keeps_the_low_frequencies_and_draws_the_high_ones():
    rng, shape = np.random.default_rng(0), (4, 6, 8, 2)
    x0, noise, fresh = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    # the published filter, whose frequencies are ordered from the lowest to the highest, for even sides
    t, h, w = np.meshgrid(*(2 * np.arange(n) / n - 1 for n in shape[:3]), indexing="ij")
    mask = 1 / (1 + ((t**2 + h**2 + w**2) / CUTOFF**2) ** ORDER)
    np.testing.assert_allclose(low_pass(*shape[:3]), np.fft.ifftshift(mask), rtol=1e-12)
    assert low_pass(1, 3, 5)[0, 0, 0] == 1
    abar = Schedule().alphas_cumprod[-1]
    noised, axes = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise, (0, 1, 2)
    filtered = np.fft.fftshift(np.fft.fftn(noised, axes=axes), axes) * mask[..., None]
    filtered += np.fft.fftshift(np.fft.fftn(fresh, axes=axes), axes) * (1 - mask[..., None])
    expected = np.fft.ifftn(np.fft.ifftshift(filtered, axes), axes=axes).real
    np.testing.assert_allclose(renoise(x0, noise, fresh, Schedule()), expected, atol=1e-5)


# ---- FreeU ----


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 4), (2, 1)], ids=str)
def test_low_frequencies_are_weakened_as_by_a_fourier_transform(size):
    x = np.random.default_rng(0).normal(size=(2, 3, *size, 4)).astype(np.float32)
    axes, (rows, columns) = (2, 3), (side // 2 for side in size)
    spectrum = np.fft.fftshift(np.fft.fftn(x, axes=axes), axes)
    spectrum[:, :, max(rows - 1, 0) : rows + 1, max(columns - 1, 0) : columns + 1] *= 0.2
    expected = np.fft.ifftn(np.fft.ifftshift(spectrum, axes), axes=axes).real
    np.testing.assert_allclose(weakened(jnp.asarray(x), 0.2), expected, atol=1e-5)


def test_half_of_the_features_are_amplified_where_their_mean_is_large():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    out, mean = np.asarray(amplified(jnp.asarray(x), 1.4)), x.mean(-1)
    np.testing.assert_array_equal(out[..., 3:], x[..., 3:])
    factor = (out / x)[..., 0]
    for frame in np.ndindex(2, 3):
        low, high = mean[frame].argmin(), mean[frame].argmax()
        np.testing.assert_allclose(factor[frame].ravel()[[low, high]], [1, 1.4], rtol=1e-5)
    assert np.isfinite(amplified(jnp.ones((1, 1, 2, 2, 4)), 1.4)).all()


def test_factors_are_for_the_two_deepest_up_blocks_and_their_absence_changes_no_program():
    config = dataclasses.replace(
        tiny.UNET, block_out_channels=(16, 16, 16), attention_levels=(False,) * 3, attention_heads=(2,) * 3,
        only_cross_attention=(False,) * 3,
    )  # fmt: skip
    inputs = (
        {"params": abstract_params(config)},
        jnp.zeros((1, 2, 8, 8, 4)),
        jnp.zeros(1, jnp.int32),
        jnp.zeros((1, 5, 16)),
    )

    def equations(function, *arguments):
        return len(jax.make_jaxpr(function)(*arguments).eqns)

    plain, factors = UNet(config), FreeU((1.3, 1.4), (0.9, 0.2))
    x = jnp.zeros((1, 2, 2, 2, 16))
    each, unchanged = (equations(functools.partial(factors, block), x, x) for block in (1, 2))
    added = equations(plain.clone(free_u=factors).apply, *inputs) - equations(plain.apply, *inputs)
    assert each > unchanged == 0 and added == 4 * each  # two residual blocks in each of two up blocks
