"""FreeInit (arXiv 2312.07537): denoises a clip again, from noise with the low frequencies of the result.

In training, even the last timestep shows a model a trace of the clip in the low frequencies of the noise; in sampling
it starts from noise without one. A further pass therefore starts from the first result, noised to the last timestep
with the noise that it came from, of which only the high frequencies are drawn anew.
"""

import numpy as np
from jaxtyping import Float

from lavie_jax.diffusion.schedule import Schedule

ORDER, CUTOFF = 4, 0.25  # of the Butterworth filter, the paper's; the cutoff is relative to the highest frequency


def low_pass(frames: int, height: int, width: int) -> Float[np.ndarray, "t h w"]:
    """Returns the weight of each frequency, in the order of `np.fft.fftn`: 1 for the mean, 1/2 at the cutoff."""
    axes = np.meshgrid(*(2 * np.fft.fftfreq(length) for length in (frames, height, width)), indexing="ij")
    distance = sum(axis**2 for axis in axes)
    return 1 / (1 + (distance / CUTOFF**2) ** ORDER)


def renoise(
    x0: Float[np.ndarray, "t h w c"],
    noise: Float[np.ndarray, "t h w c"],
    fresh: Float[np.ndarray, "t h w c"],
    schedule: Schedule,
) -> Float[np.ndarray, "t h w c"]:
    """Returns the noise from which the next pass starts.

    Args:
        x0: the result of the pass before.
        noise: the noise that the first pass started from.
        fresh: new noise.
        schedule: the schedule of the model.
    """
    abar = schedule.alphas_cumprod[-1]
    noised = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
    low, axes = low_pass(*x0.shape[:3])[..., None], (0, 1, 2)
    mixed = np.fft.fftn(noised, axes=axes) * low + np.fft.fftn(fresh, axes=axes) * (1 - low)
    return np.fft.ifftn(mixed, axes=axes).real.astype(np.float32)
