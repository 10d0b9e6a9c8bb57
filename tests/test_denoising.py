"""Denoising of clips window by window, with one-line networks whose predictions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax import parallel
from lavie_jax.cascade import denoising
from lavie_jax.cascade.denoising import Clip, DenoisingPlan, denoise
from lavie_jax.cascade.model import StageModel
from lavie_jax.diffusion import SAMPLERS, Schedule, make_sampler, sample
from lavie_jax.diffusion.guidance import COMPUTED, NONE, REUSED, Guidance
from lavie_jax.errors import UserError
from lavie_jax.stages.conditioning import Prompts
from lavie_jax.stages.windows import cut, grid, overlapping, whole

SHAPE = (11, 6, 10, 4)


class Pointwise:
    """A stand-in for the UNet: its output at a pixel depends on the input at that pixel, on t and on the text."""

    def apply(self, variables, x, t, text, image_text=None, noise_level=None):
        level = 0 if noise_level is None else noise_level[:, None, None, None, None] / 1000
        given = x[..., :4] * 0.3 + x[..., 4:].sum(-1, keepdims=True) * 0.1
        t, text = t[:, None, None, None, None], text.mean((1, 2))[:, None, None, None, None]
        return jnp.tanh(given + t / 1000 + level) * text


class Neighbours(Pointwise):
    """A stand-in whose output depends on the previous frame, too."""

    def apply(self, variables, x, t, text, image_text=None, noise_level=None):
        x = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1) * 0.5 + x
        return super().apply(variables, x, t, text, image_text, noise_level)


UNET = Pointwise()


class Model(StageModel):
    def __init__(self, devices=1, unet=UNET):
        self.mesh, self.unet, self.unet_params = parallel.make_mesh(devices=jax.devices()[:devices]), unet, {}


def clip(seed=0, **fields) -> Clip:
    rng = np.random.default_rng(seed)
    noises = rng.normal(size=(9, *SHAPE)).astype(np.float32)
    text = Prompts(rng.normal(size=(3, 5)).astype(np.float32))
    return Clip(
        text=lambda window: text,
        null_text=Prompts(rng.normal(size=(3, 5)).astype(np.float32)),
        shape=SHAPE, noise=lambda stream, frames: jnp.asarray(noises[stream, frames.start : frames.stop]),
        concat=rng.normal(size=(*SHAPE[:3], 3)).astype(np.float32), noise_level=20, **fields,
    )  # fmt: skip


WHOLE = grid(*map(whole, SHAPE[:3]))
OVERLAPPING = grid(overlapping(11, 4, 2), overlapping(6, 4, 1), overlapping(10, 4, 2))


def plan(windows, sampler="ddim", rows=1, steps=3, **guidance) -> DenoisingPlan:
    schedule = Schedule(prediction="v_prediction")
    return DenoisingPlan(
        sampler=make_sampler(sampler, steps, schedule),
        guidance=Guidance(**{"scale": 3.0} | guidance),
        windows=windows,
        rows=rows,
    )


def denoised(*clips, model=None, **how):
    denoise(model or MODEL, clips, plan(**how))
    return [c.state["x"] for c in clips]


MODEL = Model()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_clip_is_denoised_as_by_the_plain_loop(sampler):
    sample_clip, chain = clip(), plan(WHOLE, sampler, steps=4).sampler

    def network(x_t, t):
        def half(text):
            x = jnp.concatenate([x_t, jnp.asarray(sample_clip.concat)[None]], axis=-1)
            return UNET.apply({}, x, jnp.broadcast_to(t, (1,)), jnp.asarray(text)[None], noise_level=jnp.array([20]))

        with_prompt, without = half(sample_clip.text(WHOLE[0]).hidden), half(sample_clip.null_text.hidden)
        return without + 3.0 * (with_prompt - without)

    x0 = sample(
        chain, network, sample_clip.noise(0, range(11))[None], lambda i: sample_clip.noise(i + 1, range(11))[None]
    )
    (result,) = denoised(sample_clip, windows=WHOLE, sampler=sampler, steps=4)
    np.testing.assert_allclose(result, x0[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("windows", [OVERLAPPING, grid(cut(11, 4), whole(6), whole(10))], ids=["blended", "official"])
def test_windows_change_nothing_for_a_network_without_context(windows):
    (one,), (many,) = denoised(clip(), windows=WHOLE), denoised(clip(), windows=windows, rows=4)
    np.testing.assert_allclose(many, one, atol=1e-5)


def test_blended_windows_have_no_jumps_where_chunks_do():
    """Equal frames, through a network that looks at the previous frame: chunks have none at their first frames."""
    rng = np.random.default_rng(0)
    frame = rng.normal(size=(1, *SHAPE[1:])).astype(np.float32)
    base = clip()

    def alike():
        moving = clip(seed=0)
        moving.noise = lambda stream, frames: jnp.asarray(frame).repeat(len(frames), axis=0)
        moving.concat = base.concat * np.arange(11, dtype=np.float32)[:, None, None, None] / 11
        return moving

    neighbours = Model(unet=Neighbours())
    jumps = {}
    for name, frames in (("blended", overlapping(11, 5, 3)), ("official", cut(11, 5))):
        (x,) = denoised(alike(), model=neighbours, windows=grid(frames, whole(6), whole(10)))
        (reference,) = denoised(alike(), model=neighbours, windows=WHOLE)
        error = x - reference
        jumps[name] = np.abs(np.diff(error, axis=0)).max()
    assert jumps["blended"] < 0.5 * jumps["official"]


def test_one_device_and_eight_agree():
    (one,) = denoised(clip(), windows=OVERLAPPING)
    (eight,) = denoised(clip(), model=Model(8), windows=OVERLAPPING, rows=8)
    assert np.linalg.norm(eight - one) <= 1e-4 * np.linalg.norm(one)


@pytest.mark.shared
@pytest.mark.parametrize("devices", [3, 8])
def test_devices_share_the_windows_of_few_clips_and_of_the_last_round(devices):
    """In evaluations with both halves of guidance, with one, and with a change that is used again."""
    how = {"windows": WHOLE, "steps": 6, "rescale": 0.7, "low": 200, "every": 2}
    (one,) = denoised(clip(), **how)
    (shared,) = denoised(clip(), model=Model(devices), rows=devices, **how)
    assert np.linalg.norm(shared - one) <= 1e-4 * np.linalg.norm(one)
    windows = grid(overlapping(11, 4, 1), whole(6), overlapping(10, 4, 1))
    assert len(windows) % devices == (4 if devices == 8 else 0)
    (one,) = denoised(clip(), windows=windows)
    (shared,) = denoised(clip(), model=Model(devices), windows=windows, rows=devices)
    assert np.linalg.norm(shared - one) <= 1e-4 * np.linalg.norm(one)


def test_clips_share_calls_and_do_not_mix(monkeypatch):
    calls = []
    predict = denoising.predict_rows

    def counted(*args, **kwargs):
        calls.append(args[1].shape[0])
        return predict(*args, **kwargs)

    monkeypatch.setattr(denoising, "predict_rows", counted)
    together = denoised(clip(0), clip(1), clip(2), windows=WHOLE, rows=4)
    assert calls == [4] * 3
    for seed, result in enumerate(together):
        np.testing.assert_allclose(result, denoised(clip(seed), windows=WHOLE)[0], atol=1e-5)


def test_guided_halves_of_large_windows_are_sequential(monkeypatch):
    (together,) = denoised(clip(), windows=OVERLAPPING)
    turns = []
    real = denoising.denoiser
    monkeypatch.setattr(denoising, "denoiser", lambda *a, **k: turns.append(k["sequential_guidance"]) or real(*a, **k))
    monkeypatch.setattr(denoising, "MAX_BATCHED_PIXELS", 4 * 4 * 4 - 1)
    (sequential,) = denoised(clip(), windows=OVERLAPPING)
    assert turns == [True]
    np.testing.assert_allclose(sequential, together, atol=1e-5)


def test_updates_of_a_few_frames_at_a_time_change_nothing(monkeypatch):
    (whole_clip,) = denoised(clip(), windows=WHOLE, sampler="ddpm")
    monkeypatch.setattr(denoising, "MAX_UPDATE_PIXELS", 3 * 6 * 10)
    (pieces,) = denoised(clip(), windows=WHOLE, sampler="ddpm")
    np.testing.assert_allclose(pieces, whole_clip, atol=1e-6)


@pytest.mark.parametrize("sampler", [pytest.param("ddpm", marks=pytest.mark.heavy), "dpm++2m"])
def test_a_saved_state_resumes_to_the_same_end(sampler, monkeypatch):
    monkeypatch.setattr(denoising, "SAVE_EVERY", 2)
    saved = []
    first = clip(save=lambda step, state: saved.append((step, state)))
    (expected,) = denoised(first, windows=OVERLAPPING, sampler=sampler, steps=5)
    assert [step for step, _ in saved] == [2, 4, 5]
    other = clip(1)
    denoised(clip(state=saved[1][1], step=4), windows=OVERLAPPING, sampler=sampler, steps=5)
    # a clip that is behind and one that is ahead
    ahead = clip(state=saved[1][1], step=4)
    behind, ahead = denoised(other, ahead, windows=OVERLAPPING, sampler=sampler, steps=5)
    np.testing.assert_array_equal(ahead, expected)
    np.testing.assert_array_equal(behind, denoised(clip(1), windows=OVERLAPPING, sampler=sampler, steps=5)[0])


def test_heun_resumes_within_a_step(monkeypatch):
    monkeypatch.setattr(denoising, "SAVE_EVERY", 2)
    saved = []
    (expected,) = denoised(clip(save=lambda step, state: saved.append((step, state))), windows=WHOLE, sampler="heun")
    assert [step for step, _ in saved] == [2, 4, 5]
    for step, state in saved[:2]:
        (resumed,) = denoised(clip(state=state, step=step), windows=WHOLE, sampler="heun")
        np.testing.assert_array_equal(resumed, expected)


# ---- guidance in a part of the evaluations ----


def test_guidance_is_computed_used_again_or_left_out():
    timesteps = np.array([999, 800, 600, 400, 200, 1])
    assert Guidance(scale=2.0).plan(timesteps) == (COMPUTED,) * 6
    assert Guidance(scale=1.0, every=2).plan(timesteps) == (NONE,) * 6
    inside = Guidance(scale=2.0, low=200, high=800).plan(timesteps)
    assert inside == (NONE, COMPUTED, COMPUTED, COMPUTED, COMPUTED, NONE)
    every_third = Guidance(scale=2.0, low=200, high=800, every=3).plan(timesteps)
    assert every_third == (NONE, COMPUTED, REUSED, REUSED, COMPUTED, NONE)
    with pytest.raises(UserError, match="contain none of the sampler's timesteps"):
        Guidance(scale=2.0, low=401, high=599).plan(timesteps)


def test_saved_guidance_follows_its_definition():
    """Written out again, step by step, with the timesteps of ddim: guidance at two of four, the second one reused."""
    sample_clip = clip()
    chain = plan(WHOLE, steps=4).sampler
    _, high, low, _ = chain.timesteps
    state, change = chain.init(sample_clip.noise(0, range(11))), None
    for i in range(4):
        x_t, t = chain.model_input(state, i)
        x = jnp.concatenate([x_t, jnp.asarray(sample_clip.concat)], axis=-1)[None]
        with_prompt, without = (
            UNET.apply({}, x, t[:1], jnp.asarray(text.hidden)[None], noise_level=jnp.array([20]))[0]
            for text in (sample_clip.text(WHOLE[0]), sample_clip.null_text)
        )
        if i == 1:
            change = with_prompt - without
        prediction = with_prompt + (2.0 * change if i in (1, 2) else 0)
        state = chain.update(state, i, prediction)
    saving = {"low": float(low), "high": float(high), "every": 2}
    denoise(MODEL, [sample_clip], plan(WHOLE, steps=4, **saving))
    np.testing.assert_allclose(sample_clip.state["x"], state["x"], rtol=1e-4, atol=1e-5)
    other = clip()
    denoise(MODEL, [other], plan(OVERLAPPING, steps=4, rows=4, **saving))  # a network without context
    np.testing.assert_allclose(other.state["x"], state["x"], rtol=1e-4, atol=1e-5)


def test_a_state_is_never_saved_before_guidance_is_used_again(monkeypatch):
    monkeypatch.setattr(denoising, "SAVE_EVERY", 2)
    how, saved = plan(WHOLE, steps=7, every=3), []
    first = clip(save=lambda step, state: saved.append((step, state)))
    denoise(MODEL, [first], how)
    assert [step for step, _ in saved] == [3, 6, 7]
    for step, state in saved:
        resumed = clip(state=state, step=step)
        denoise(MODEL, [resumed], how)
        np.testing.assert_array_equal(resumed.state["x"], first.state["x"])
