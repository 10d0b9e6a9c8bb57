"""What LaVie's UNet has not, and a small one learns little without: for models trained from scratch.

Each is a field of `UNetConfig`, off for every released model, and starts as nothing.
"""

import itertools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from einops import einsum, rearrange
from jaxtyping import Array, Float

from lavie_jax.models.layers import conv, dense, timestep_features


class MotionEmbedding(nn.Module):
    """What the caption says, times when in the clip, times where in the picture: (B, L, D) -> (B, T, H, W, C).

    Attention whose positions are relative cannot tell frames apart that look alike, and under much noise, where the
    motion of a clip is decided, all do. And "left" says something of a place in the picture only together with the
    time: no two of the three do, so that a network of sums has no gradient to begin with. Hence the product. Zero at
    first. AnimateDiff (arXiv 2307.04725) and Stable Video Diffusion (arXiv 2311.15127) number the frames, video
    transformers their places too (Latte, arXiv 2401.03048); LaVie does neither. Every axis runs from 0 to `SPAN`,
    however many frames or places lie between, so that what few of them taught holds for many.
    """

    SPAN: ClassVar[float] = 16.0
    GAIN: ClassVar[float] = 30.0  # a product of three small numbers, brought to the size of what it is added to

    dtype: Any

    @nn.compact
    def __call__(
        self, text: Float[Array, "b l d"], size: tuple[int, int, int], channels: int
    ) -> Float[Array, "b t h w c"]:
        def dense(name, init=nn.linear.default_kernel_init):
            return nn.Dense(channels, dtype=self.dtype, kernel_init=init, name=name)

        def positions(length):
            return timestep_features(jnp.linspace(0.0, self.SPAN, length), channels).astype(self.dtype)

        # the strongest of the words in each channel: one word of many is not averaged away
        said = rearrange(dense("text")(text).max(axis=1), "b c -> b 1 1 1 c")
        when = rearrange(dense("time")(positions(size[0])), "t c -> t 1 1 c")
        rows, columns = dense("row")(positions(size[1])), dense("column")(positions(size[2]))
        where = rearrange(rows, "h c -> h 1 c") + columns
        return dense("out", nn.initializers.zeros)(self.GAIN * said * when * where)


class CaptionEmbedding(nn.Module):
    """What a whole caption says at this noise level: (B, items, L, D) and (B, items, E) -> (B, items, E).

    Every residual block scales and shifts its features by it, as class-conditional diffusion models do with their
    class (arXiv 2105.05233, sec. 3): an outline is a product of what the caption says and where in the shape a place
    lies, and cross-attention alone is long in finding it.
    """

    dtype: Any

    @nn.compact
    def __call__(self, text, temb):
        width = temb.shape[-1]
        # the strongest of the words in each channel: one word of many is not averaged away
        said = dense(width, dtype=self.dtype, name="linear_1")(text).max(axis=2)
        return temb + dense(width, dtype=self.dtype, name="linear_2")(nn.silu(said))


BETWEEN_KEYS = (-1, 0, 1, 2)  # offsets of frames; the mean of their key frames is the cross-fade between two of them
CUBIC = 2  # places on each side that bicubic enlargement weighs


def conditions_around(
    x: Float[Array, "b f h w c_in"], width: int, *, frames: tuple[int, ...] = (0,), reach: int = 0
) -> Float[Array, "b f h w c"]:
    """The channels of x behind the first `width`, of the places around each: everything outside repeats the border.

    `frames` are offsets in time, `reach` is the number of places on each side in height and width.
    """
    condition, size = x[..., width:], x.shape[1:4]
    far = max(abs(offset) for offset in frames)
    padded = jnp.pad(condition, ((0, 0), (far, far), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = itertools.product([far + offset for offset in frames], *[range(2 * reach + 1)] * 2)
    seen = [padded[:, i : i + size[0], j : j + size[1], k : k + size[2]] for i, j, k in corners]
    return jnp.concatenate(seen, axis=-1)


class KeyFrameEmbedding(nn.Module):
    """The key frames on both sides of each frame, for the first features: (B, T, H, W, C_in) -> (B, T, H, W, features).

    The stage gives a frame the key frame nearest to it; of the other one it hears through temporal attention alone,
    which sees a picture coarsely and is long in learning where to look. With both, and by how many of `BETWEEN_KEYS`
    are which, moving what lies between them is a matter of convolutions. Zero at first.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c_in"], width: int, features: int):
        keys = conditions_around(x, width, frames=BETWEEN_KEYS).astype(self.dtype)
        return conv(features, (3, 3), name="conv", dtype=self.dtype, zero=True)(keys)


class ConditionSkip(nn.Module):
    """What a linear map of x_t and the condition beside it predicts: (B, F, H, W, C_in) -> (B, F, H, W, C_out).

    Key frames, or low-resolution frames, say nearly all of what is to be made, but norms and gates carry a picture
    through only roughly, and of a plain background nothing may be lost. So the network starts from this map and adds
    what it cannot say. Each noise level has a map of its own: the share of x0 in what v-prediction predicts grows with
    the noise. EDM (arXiv 2206.00364, sec. 5) has such a path for x_t alone. Zero at first; in float32 whatever the
    network computes in. It sees x_t of each place and the condition of those that `conditions_around` gives.
    """

    frames: tuple[int, ...] = (0,)
    reach: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c_in"], temb: Float[Array, "b f e"], features: int):
        x = x.astype(jnp.float32)
        around = conditions_around(x, features, frames=self.frames, reach=self.reach)
        around = around / (2 * self.reach + 1)  # neighbours are alike, and Adam moves all their weights together
        inputs = jnp.concatenate([x[..., :features], around], axis=-1)
        dense = nn.Dense(inputs.shape[-1] * features, kernel_init=nn.initializers.zeros, name="matrix")
        matrix = rearrange(dense(nn.silu(temb.astype(jnp.float32))), "b f (c d) -> b f c d", d=features)
        return einsum(inputs, matrix, "b f h w c, b f c d -> b f h w d")
