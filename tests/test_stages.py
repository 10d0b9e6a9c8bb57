"""The inputs of each stage's UNet, in sampling and in training."""

import jax
import jax.numpy as jnp
import numpy as np

from lavie_jax.diffusion import Schedule
from lavie_jax.stages import STAGES
from lavie_jax.stages.conditioning import Condition, Prompts, Text, denoiser, predict


class Recorder:
    """A fake UNet that records its inputs and returns the text's mean."""

    def apply(
        self,
        variables,
        x,
        t,
        text,
        image_text=None,
        image_t=None,
        noise_level=None,
        text_mask=None,
        image_text_mask=None,
    ):
        self.calls = {
            "x": x,
            "t": t,
            "text": text,
            "image_text": image_text,
            "image_t": image_t,
            "noise_level": noise_level,
            "text_mask": text_mask,
            "image_text_mask": image_text_mask,
        }
        context = text if text is not None else image_text[:, 0]
        return jnp.zeros_like(x[..., :4]) + context.mean((1, 2))[:, None, None, None, None]


def test_key_frames_are_duplicated_to_the_target_rate():
    key_latents = jnp.arange(16.0)[None, :, None, None, None]
    source = STAGES["interpolation"].condition({"key_latents": key_latents}).concat.ravel()
    assert source.shape == (61,)
    copies = np.bincount(np.asarray(source, int))
    assert copies.tolist() == [3] + [4] * 14 + [2]


def test_low_res_frames_are_noised_at_their_level():
    rng = np.random.default_rng(0)
    low_res, noise = (jnp.asarray(rng.normal(size=(2, 3, 4, 4, 3)), jnp.float32) for _ in range(2))
    level = jnp.array([0, 350])
    condition = STAGES["vsr"].condition({"low_res": low_res, "low_res_noise": noise, "noise_level": level})
    signal = np.sqrt(STAGES["vsr"].low_res_schedule.alphas_cumprod[[0, 350]])[:, None, None, None, None]
    np.testing.assert_allclose(condition.concat, signal * low_res + np.sqrt(1 - signal**2) * noise, atol=1e-6)
    np.testing.assert_array_equal(condition.noise_level, level)
    linear = Schedule()
    given = {"low_res": low_res, "low_res_noise": noise, "noise_level": level, "low_res_schedule": linear}
    other = STAGES["vsr"].condition(given)
    np.testing.assert_allclose(other.concat, linear.add_noise(low_res, noise, level), atol=1e-6)


def test_guidance_moves_away_from_the_null_text():
    unet = Recorder()
    text, null = Prompts(jnp.full((3, 5, 8), 2.0)), Prompts(jnp.full((3, 5, 8), 1.0))
    x = jnp.zeros((3, 2, 4, 4, 4))
    concat = jnp.ones((3, 2, 4, 4, 3))
    out = denoiser(unet, {}, text, null, Condition(concat, jnp.array([1, 2, 3])), guidance=7.5)(x, 10).prediction
    np.testing.assert_allclose(out, 1 + 7.5 * (2 - 1))
    assert unet.calls["x"].shape == (6, 2, 4, 4, 7) and unet.calls["t"].tolist() == [10] * 6
    assert unet.calls["noise_level"].tolist() == [1, 2, 3, 1, 2, 3]
    denoiser(unet, {}, text, null, Condition(), guidance=1.0)(x, 10)
    assert unet.calls["x"].shape[0] == 3  # the unconditional half is left out


def test_sequential_guidance_gives_the_same_result():
    unet, rng = Recorder(), np.random.default_rng(0)
    text, null = (Prompts(jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)) for _ in range(2))
    x, condition = jnp.ones((3, 2, 4, 4, 4)), Condition(jnp.ones((3, 2, 4, 4, 3)), jnp.array([1, 2, 3]))
    together, sequential = (
        denoiser(unet, {}, text, null, condition, guidance=7.5, sequential_guidance=one_by_one)(x, 10).prediction
        for one_by_one in (False, True)
    )
    np.testing.assert_allclose(sequential, together, rtol=1e-5)
    assert unet.calls["x"].shape == (3, 2, 4, 4, 7)


def test_a_padding_mask_reaches_the_unet_in_both_halves_of_guidance():
    unet, x = Recorder(), jnp.zeros((2, 3, 4, 4, 4))
    masks = [jnp.arange(5) < length for length in (4, 2)]
    text, null = (Prompts(jnp.ones((2, 5, 8)), jnp.stack([mask, mask])) for mask in masks)
    denoiser(unet, {}, text, null, Condition(), guidance=2.0)(x, 10)
    assert unet.calls["text_mask"].sum(1).tolist() == [4, 4, 2, 2] and unet.calls["image_text_mask"] is None
    denoiser(unet, {}, text, null, Condition(), guidance=1.0, image=True)(x[:, :1], 10)
    assert unet.calls["image_text_mask"].shape == (2, 1, 5) and unet.calls["text_mask"] is None


def test_an_image_takes_the_image_path():
    unet = Recorder()
    text = Prompts(jnp.ones((2, 5, 8)))
    denoiser(unet, {}, text, text, Condition(), guidance=2.0, image=True)(jnp.zeros((2, 1, 4, 4, 4)), 10)
    assert unet.calls["text"] is None and unet.calls["image_text"].shape == (4, 1, 5, 8)


def test_training_pair_is_the_forward_process():
    """x_t and the target follow from one x0 and one eps, with a timestep for each video and each image."""
    stage = STAGES["base"]
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4 + 2, 2, 2, 4)), jnp.float32)
    pair = stage.training_pair(latents, {}, jax.random.key(0), images=2)
    assert pair.frame_t.shape == (3, 6) and (pair.frame_t[:, :4] == pair.t[:, None]).all()
    assert len(set(np.asarray(pair.image_t).ravel().tolist())) > 3  # every image has its own
    signal = np.sqrt(stage.schedule.alphas_cumprod[np.asarray(pair.frame_t)])[..., None, None, None]
    np.testing.assert_allclose(pair.x_t, signal * latents + np.sqrt(1 - signal**2) * pair.target, atol=1e-5)
    again = stage.training_pair(latents, {}, jax.random.key(0), images=2)
    np.testing.assert_array_equal(pair.x_t, again.x_t)


def test_predict_passes_everything_to_the_unet():
    unet = Recorder()
    latents = jnp.zeros((2, 5, 4, 4, 4))
    inputs = {
        "low_res": jnp.zeros((2, 5, 4, 4, 3)),
        "low_res_noise": jnp.ones((2, 5, 4, 4, 3)),
        "noise_level": jnp.array([5, 6]),
    }
    pair = STAGES["vsr"].training_pair(latents, inputs, jax.random.key(0))
    predict(unet, {}, pair, Text(jnp.zeros((2, 5, 8))))
    assert unet.calls["x"].shape[-1] == 7 and unet.calls["image_text"] is None
    np.testing.assert_array_equal(unet.calls["noise_level"], [5, 6])
