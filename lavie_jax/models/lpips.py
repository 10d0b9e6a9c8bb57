"""Learned perceptual distance of image pairs (LPIPS v0.1, arXiv 1801.03924) on AlexNet's features.

Symmetric in its two images. Sides of 30 pixels or fewer leave nothing for the last layers, which gives NaN, so callers
refuse sides below `MIN_SIDE`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

MIN_SIDE = 31
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own normalization of images in [-1, 1]
EPS = 1e-10
# (features, side of the kernel, stride, padding) of AlexNet's convolutions; a max pool is before the second and third
LAYERS = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
POOL_BEFORE = (1, 2)


class LPIPS(nn.Module):
    """Computes the distance of images in [-1, 1], as the sum of five layers' terms; float32, full precision.

    A layer's term is the mean of a map of its own size. With `spatial`, the maps are enlarged to the images' size
    before the mean, which is a slightly different number.
    """

    spatial: bool = False

    @nn.compact
    def __call__(
        self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, " b"], Float[Array, "5 b"]]:
        """Returns (distances, the term of each layer)."""
        both = AlexNet(name="net")(jnp.concatenate([a, b]))
        terms = []
        for i, features in enumerate(both):
            # At least EPS: the root of 0, where all features are 0, has no gradient.
            norm = jnp.sqrt(jnp.maximum(jnp.square(features).sum(-1, keepdims=True), EPS**2))
            unit = features / (norm + EPS)
            x, y = jnp.split(unit, 2)
            weight = self.param(f"lin_{i}", nn.initializers.ones, (features.shape[-1],))
            distances = reduce(jnp.square(x - y) * weight, "b h w c -> b h w", "sum")
            if self.spatial:
                distances = jax.image.resize(distances, a.shape[:3], "linear", antialias=False)
            terms.append(distances.mean((1, 2)))
        return sum(terms), jnp.stack(terms)


class AlexNet(nn.Module):
    """Returns the activations after each of AlexNet's five convolutions."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b _h _w _c"]]:
        x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
        outputs = []
        for i, (features, side, stride, padding) in enumerate(LAYERS):
            if i in POOL_BEFORE:
                x = nn.max_pool(x, (3, 3), strides=(2, 2))
            x = nn.Conv(
                features,
                (side, side),
                strides=(stride, stride),
                padding=[(padding, padding)] * 2,
                precision=jax.lax.Precision.HIGHEST,
                name=f"conv_{i}",
            )(x)
            x = nn.relu(x)
            outputs.append(x)
        return outputs
