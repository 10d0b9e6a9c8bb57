"""Training losses: min-SNR weights, and LaVie's joint image-video loss."""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError


def min_snr_weight(schedule: Schedule, t: Int[ArrayLike, "*times"], gamma: float) -> Float[Array, "*times"]:
    """Returns the loss weight of each timestep (min-SNR-gamma, sec. 3.4, arXiv 2303.09556).

    The weight min(SNR, gamma) is that of a loss on x0. On the squared error of the network's prediction it becomes

        sample         min(SNR, gamma)
        epsilon        min(SNR, gamma) / SNR
        v_prediction   min(SNR, gamma) / (SNR + 1)

    Args:
        schedule: the noise schedule; its `prediction` selects the formula.
        t: integer timesteps.
        gamma: clamp, > 0; the paper recommends 5.

    Returns:
        float32, in the shape of `t`.
    """
    if not (math.isfinite(gamma) and gamma > 0):
        raise UserError(f"min-SNR gamma must be a finite number above 0, not {gamma}")
    snr = schedule.snr(t)
    clamped = jnp.minimum(snr, gamma)
    if schedule.prediction == "sample":
        return clamped
    return clamped / (snr if schedule.prediction == "epsilon" else snr + 1)


def joint_loss(
    prediction: Float[Array, "b f ..."],
    target: Float[Array, "b f ..."],
    weight: Float[Array, " b *frames"] | None,
    T: int,
    alpha: float,
    *,
    absolute: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the joint image-video loss L = L_video + alpha * L_image (eq. 3, arXiv 2309.15103).

    Each part is the mean weighted error over its own frames, so alpha does not depend on the numbers of
    frames and images. A part without frames is 0: with T = 0 the loss is alpha * L_image.

    Args:
        prediction: `(B, T + M, H, W, C)`, the T video frames first, then the M images.
        target: same shape.
        weight: weight of each sample `(B,)` or of each frame `(B, T + M)`, as from min-SNR, or None. It multiplies the
            error; the mean is not divided by the sum of weights.
        T: number of video frames, 0 to T + M.
        alpha: weight of the images.
        absolute: whether errors are absolute instead of squared.

    Returns:
        The loss, and its parts {"video": ..., "image": ...} before alpha; float32 scalars.
    """
    frames = prediction.shape[1]
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} must have the same shape")
    if not 0 <= T <= frames:
        raise ValueError(f"T = {T} video frames do not fit the {frames} frames of the prediction")
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    error = jnp.abs(error) if absolute else jnp.square(error)
    if weight is not None:
        error *= weight.reshape(weight.shape + (1,) * (error.ndim - weight.ndim))
    video = error[:, :T].mean() if T > 0 else jnp.zeros(())
    image = error[:, T:].mean() if T < frames else jnp.zeros(())
    return video + alpha * image, {"video": video, "image": image}
