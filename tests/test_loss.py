"""Min-SNR weights and the joint image-video loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavie_jax.diffusion import Schedule, joint_loss, min_snr_weight
from lavie_jax.diffusion.schedule import PREDICTIONS
from lavie_jax.errors import UserError

B, T, M, H, W, C = 2, 3, 2, 4, 4, 2


@pytest.fixture
def pair():
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (B, T + M, H, W, C)), jax.random.normal(keys[1], (B, T + M, H, W, C))


def test_min_snr_weights_make_the_losses_of_all_prediction_types_equal():
    """The same error in x0, as an error in eps and v: the weighted losses are equal (sec. 3.4, arXiv 2303.09556)."""
    t = np.array([10, 200, 500, 800])
    keys = jax.random.split(jax.random.key(1), 3)
    x0, eps, wrong = (jax.random.normal(key, (4, 50)) for key in keys)
    losses = {}
    for prediction in PREDICTIONS:
        schedule = Schedule(prediction=prediction)
        x_t = schedule.add_noise(x0, eps, t)
        abar = schedule.alphas_cumprod[t][:, None]
        wrong_eps = (x_t - abar**0.5 * wrong) / (1 - abar) ** 0.5
        error = schedule.target(wrong, wrong_eps, t) - schedule.target(x0, eps, t)
        losses[prediction] = min_snr_weight(schedule, t, 5.0) * jnp.square(error).mean(1)
    np.testing.assert_allclose(losses["epsilon"], losses["sample"], rtol=1e-3)
    np.testing.assert_allclose(losses["v_prediction"], losses["sample"], rtol=1e-3)


def test_min_snr_is_one_for_noisy_epsilon_and_clamps_the_rest():
    schedule = Schedule()
    t = np.arange(1000)
    weight, snr = np.asarray(min_snr_weight(schedule, t, 5.0)), np.asarray(schedule.snr(t))
    np.testing.assert_array_equal(weight[snr <= 5], 1.0)
    np.testing.assert_allclose((weight * snr)[snr > 5], 5.0, rtol=1e-6)
    assert 0 < (snr <= 5).sum() < 1000


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_gamma_out_of_range(gamma):
    with pytest.raises(UserError, match="gamma"):
        min_snr_weight(Schedule(), np.array([1]), gamma)


def test_parts_are_means_over_their_own_frames(pair):
    loss, parts = joint_loss(*pair, None, T, 0.3)
    error = np.square(np.subtract(*pair))
    np.testing.assert_allclose(parts["video"], error[:, :T].mean(), rtol=1e-6)
    np.testing.assert_allclose(parts["image"], error[:, T:].mean(), rtol=1e-6)
    np.testing.assert_allclose(loss, error[:, :T].mean() + 0.3 * error[:, T:].mean(), rtol=1e-6)


def test_videos_alone_and_images_alone(pair):
    _, parts = joint_loss(*pair, None, T, 0.3)
    loss, video = joint_loss(pair[0][:, :T], pair[1][:, :T], None, T, 0.3)
    assert loss == video["video"] == parts["video"] and video["image"] == 0
    loss, image = joint_loss(pair[0][:, T:], pair[1][:, T:], None, 0, 0.3)
    assert image["image"] == parts["image"] and image["video"] == 0
    np.testing.assert_allclose(loss, 0.3 * parts["image"], rtol=1e-6)


@pytest.mark.parametrize("frames", [0, T, T + M])
def test_gradients_are_finite_and_alpha_scales_those_of_images(pair, frames):
    def gradient(alpha):
        return np.asarray(jax.grad(lambda x: joint_loss(x, pair[1], None, frames, alpha)[0])(pair[0]))

    one, half = gradient(1.0), gradient(0.5)
    assert np.isfinite(one).all() and (one != 0).all()
    np.testing.assert_array_equal(half[:, :frames], one[:, :frames])
    np.testing.assert_allclose(half[:, frames:], one[:, frames:] / 2, rtol=1e-6)


def test_weights_of_samples_and_of_frames(pair):
    _, each = joint_loss(pair[0][:1], pair[1][:1], None, T, 1.0)
    _, parts = joint_loss(*pair, jnp.array([1.0, 0.0]), T, 1.0)
    np.testing.assert_allclose(parts["video"], each["video"] / B, rtol=1e-6)

    only_frame_1 = jnp.zeros((B, T + M)).at[:, 1].set(1.0)
    _, parts = joint_loss(*pair, only_frame_1, T, 1.0)
    np.testing.assert_allclose(parts["video"], np.square(np.subtract(*pair))[:, 1].mean() / T, rtol=1e-5)
    assert parts["image"] == 0


def test_half_precision_predictions_are_compared_in_float32(pair):
    loss, _ = joint_loss(pair[0].astype(jnp.bfloat16), pair[1], None, T, 1.0)
    assert loss.dtype == jnp.float32


def test_more_video_frames_than_frames_are_refused(pair):
    with pytest.raises(ValueError, match=r"T = 6 .* 5 frames"):
        joint_loss(*pair, None, T + M + 1, 1.0)
