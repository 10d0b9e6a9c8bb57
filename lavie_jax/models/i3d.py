"""The inflated Inception network (I3D, arXiv 1705.07750) trained on Kinetics-400, whose logits FVD compares.

Module paths mirror TF Hub's deepmind/i3d-kinetics-400/1. Convolutions and max pools use TensorFlow's SAME padding,
which is asymmetric at stride 2 and for odd sizes. Batch norm has fixed statistics and no scale.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

MIN_FRAMES = 10  # with 8 frames or fewer, the average over time is empty: NaN. Other implementations refuse 9, too
SIDE = 224  # pixels per side that the network was trained with
CLASSES = 400
POOLED = 1024
NORM_EPS = 1e-3
# Channels of each Inception block: 1x1; 1x1 and 3x3x3; 1x1 and 3x3x3; 1x1 after the max pool.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# The max pool before a module, (window, stride).
POOLS = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class I3D(nn.Module):
    """Computes the logits of clips in [-1, 1], usually of 224x224 pixels; float32 with full-precision products.

    The result is NaN for clips of 8 frames or fewer. Callers refuse clips of fewer than `MIN_FRAMES`.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w 3"]) -> tuple[Float[Array, "b 400"], Float[Array, "b 1024"]]:
        """Returns (logits, averages of the last features before the classifier)."""
        x = ConvNorm(64, 7, stride=2, name="Conv3d_1a_7x7")(x)
        x = ConvNorm(64, 1, name="Conv3d_2b_1x1")(_pooled("Conv3d_2b_1x1", x))
        x = ConvNorm(192, 3, name="Conv3d_2c_3x3")(x)
        for name, channels in BLOCKS.items():
            x = Inception(channels, name=name)(_pooled(name, x))
        x = nn.avg_pool(x, (2, 7, 7), strides=(1, 1, 1), padding="VALID")
        logits = Conv(CLASSES, 1, bias=True, name="Logits")(x)
        return reduce(logits, "b t h w c -> b c", "mean"), reduce(x, "b t h w c -> b c", "mean")


def _pooled(name: str, x: Float[Array, "b t h w c"]) -> Float[Array, "b _t _h _w c"]:
    """Applies the max pool before the module `name`, if there is one."""
    if name not in POOLS:
        return x
    window, stride = POOLS[name]
    return nn.max_pool(x, window, strides=stride, padding="SAME")


class Inception(nn.Module):
    """Four branches, concatenated: 1x1; 1x1, 3x3x3; 1x1, 3x3x3; max pool, 1x1."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w k"]:
        one, before_a, a, before_b, b, pooled = self.channels
        branches = [
            ConvNorm(one, 1, name="Branch_0_0a")(x),
            ConvNorm(a, 3, name="Branch_1_0b")(ConvNorm(before_a, 1, name="Branch_1_0a")(x)),
            ConvNorm(b, 3, name="Branch_2_0b")(ConvNorm(before_b, 1, name="Branch_2_0a")(x)),
            ConvNorm(pooled, 1, name="Branch_3_0b")(nn.max_pool(x, (3, 3, 3), strides=(1, 1, 1), padding="SAME")),
        ]
        return jnp.concatenate(branches, axis=-1)


class Conv(nn.Module):
    """A convolution with a cubic kernel."""

    features: int
    side: int
    stride: int = 1
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b _t _h _w k"]:
        shape = (self.side,) * 3 + (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride,) * 3,
            padding="SAME",
            dimension_numbers=("NTHWC", "THWIO", "NTHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return y + self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else y


class ConvNorm(nn.Module):
    """A convolution, batch norm with fixed statistics, ReLU."""

    features: int
    side: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b _t _h _w k"]:
        y = Conv(self.features, self.side, self.stride, name="conv")(x)
        mean = self.param("mean", nn.initializers.zeros, (self.features,))
        variance = self.param("var", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        gain = jax.lax.rsqrt(variance + NORM_EPS)
        return nn.relu(y * gain + (bias - mean * gain))
