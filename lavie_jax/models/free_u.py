"""FreeU (arXiv 2309.11497): other weights for the two inputs of the decoder's blocks, without training.

The features from below carry the content of a frame, the skip connections its detail. FreeU amplifies half of the
channels of the former, and weakens the low frequencies of the latter.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex64, Float


@dataclasses.dataclass(frozen=True)
class FreeU:
    """Factors of the deepest up blocks, in FreeU of two; others are unchanged.

    Attributes:
        backbone: b1 and b2, of the features from below, in proportion to their mean at each pixel.
        skip: s1 and s2, of the low frequencies of the skip connections.
    """

    backbone: tuple[float, ...]
    skip: tuple[float, ...]

    def __call__(
        self, block: int, x: Float[Array, "b frames h w c"], skip: Float[Array, "b frames h w k"]
    ) -> tuple[Float[Array, "b frames h w c"], Float[Array, "b frames h w k"]]:
        """Returns the two inputs of a residual block of up block `block`, counted from the deepest."""
        if block >= len(self.backbone):
            return x, skip
        return amplified(x, self.backbone[block]), weakened(skip, self.skip[block])


def amplified(x: Float[Array, "b frames h w c"], factor: float) -> Float[Array, "b frames h w c"]:
    """Multiplies half of the channels by 1 to `factor`, in proportion to the mean of all channels at each pixel."""
    mean = x.mean(axis=-1, keepdims=True, dtype=jnp.float32)
    low, high = mean.min(axis=(-3, -2), keepdims=True), mean.max(axis=(-3, -2), keepdims=True)
    share = (mean - low) / jnp.maximum(high - low, 1e-12)
    half = x.shape[-1] // 2
    return x.at[..., :half].multiply((1 + (factor - 1) * share).astype(x.dtype))


def weakened(x: Float[Array, "b frames h w c"], factor: float) -> Float[Array, "b frames h w c"]:
    """Multiplies the lowest frequencies of each frame, 0 and -1 of both axes as in the published code, by `factor`.

    The result is the real part. The frequencies are so few that two products replace the Fourier transform.
    """
    rows, columns = low_frequencies(x.shape[-3]), low_frequencies(x.shape[-2])

    def project(rows: np.ndarray, columns: np.ndarray) -> Array:
        return jnp.einsum("hi,wj,bfijc->bfhwc", rows, columns, x.astype(jnp.float32), optimize="optimal")

    low = project(rows.real, columns.real) - project(rows.imag, columns.imag)
    return (x + (factor - 1) * low).astype(x.dtype)


def low_frequencies(length: int) -> Complex64[np.ndarray, "n n"]:
    """Returns the projection of a sequence on its frequencies 0 and -1."""
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    waves = [np.exp(2j * np.pi * frequency * distance / length) for frequency in {0, -1 % length}]
    return (sum(waves) / length).astype(np.complex64)
