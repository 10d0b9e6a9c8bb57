"""The encoder of T5 (arXiv 1910.10683), also of T5 v1.1, FLAN-T5 and mT5: a text encoder without a limit of positions.

LaVie proposes it for prompts with several subjects (arXiv 2309.15103, appendix E). Unlike CLIP's, it attends in both
directions, and its padding is masked. Parameter paths mirror transformers' T5EncoderModel.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lavie_jax.errors import UserError, suggest
from lavie_jax.models.attention import attention, relative_position_buckets
from lavie_jax.models.config import check_positive, config_from_dict
from lavie_jax.models.layers import dense


class Activation(NamedTuple):
    """The activation between the feed-forward layers; gated, it multiplies a second projection (arXiv 2002.05202)."""

    function: Callable[[Array], Array]
    gated: bool


FEED_FORWARDS = {  # by transformers' names
    "relu": Activation(jax.nn.relu, gated=False),  # T5
    "gated-gelu": Activation(lambda x: jax.nn.gelu(x, approximate=True), gated=True),  # T5 v1.1
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5TextConfig:
    """Fields of transformers' T5Config, with its defaults, and the length of texts. Raises UserError for bad values.

    Attributes:
        length: tokens of a text, to which shorter ones are padded. T5 itself has no limit; the default is Imagen's
            (arXiv 2205.11487).
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64  # width of a head; heads together may be wider or narrower than d_model
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    length: int = 128

    def __post_init__(self):
        check_positive("T5TextConfig", **{n: v for n, v in self.to_dict().items() if type(v) is int})
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise UserError(
                f"T5TextConfig.feed_forward_proj = {self.feed_forward_proj!r} is unknown"
                f"{suggest(self.feed_forward_proj, FEED_FORWARDS)}"
            )
        if self.relative_attention_num_buckets % 4:
            raise UserError(
                "T5TextConfig.relative_attention_num_buckets must be a multiple of 4, not "
                f"{self.relative_attention_num_buckets}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "T5TextConfig":
        """Inverse of `to_dict`. Raises UserError for unknown names and wrong types."""
        return config_from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent."""
        return dataclasses.asdict(self)

    @property
    def width(self) -> int:
        """Width of the hidden states that the UNet attends to."""
        return self.d_model


class T5Text(nn.Module):
    """Encodes tokens (B, L) as their last hidden states (B, L, D), float32, for any L.

    Real tokens attend to real tokens only. The interface of text encoders is that of `CLIPText`.

    Attributes:
        config: the architecture.
        dtype: dtype of the products. The residual stream, which grows to thousands, and the norms are float32.
    """

    takes_mask: ClassVar[bool] = True

    config: T5TextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b l d"]:
        config = self.config
        shared = nn.Embed(config.vocab_size, config.d_model, name="shared", embedding_init=nn.initializers.normal(1.0))
        return Stack(config, self.dtype, name="encoder")(shared(tokens).astype(jnp.float32), mask)


class Stack(nn.Module):
    """The blocks and the final norm: (B, L, D) to (B, L, D). All blocks use the position bias of the first one."""

    config: T5TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None) -> Float[Array, "b l d"]:
        bias = None
        for i in range(self.config.num_layers):
            x, bias = Block(self.config, self.dtype, name=f"block_{i}")(x, mask, bias)
        return RMSNorm(self.config.layer_norm_epsilon, name="final_layer_norm")(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)). Returns the position bias too."""

    config: T5TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None,
        bias: Float[Array, "1 n l l"] | None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "1 n l l"]]:
        x, bias = AttentionLayer(self.config, self.dtype, name="layer_0")(x, mask, bias)
        return FeedForwardLayer(self.config, self.dtype, name="layer_1")(x), bias


class AttentionLayer(nn.Module):
    """x + attention(norm(x)), and the position bias."""

    config: T5TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None,
        bias: Float[Array, "1 n l l"] | None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "1 n l l"]]:
        y = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        y, bias = SelfAttention(self.config, self.dtype, name="SelfAttention")(y, mask, bias)
        return x + y, bias


class FeedForwardLayer(nn.Module):
    """x + feed_forward(norm(x))."""

    config: T5TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        y = RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        return x + FeedForward(self.config, self.dtype, name="DenseReluDense")(y)


class SelfAttention(nn.Module):
    """Multi-head attention in both directions, without biases in the projections and without scaling of the scores.

    Without a position bias it makes one from its own table, as the first layer does.
    """

    config: T5TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None,
        bias: Float[Array, "1 n l l"] | None,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "1 n l l"]]:
        config = self.config
        heads, inner = config.num_heads, config.num_heads * config.d_kv

        def project(name: str, deviation: float) -> Float[Array, "b l n k"]:
            init = nn.initializers.normal(deviation)
            y = dense(inner, bias=False, dtype=self.dtype, kernel_init=init, name=name)(x)
            return einops.rearrange(y, "b l (n k) -> b l n k", n=heads)

        # Random queries are small instead of the scores being scaled. `attention` scales, which is undone here: exactly
        # for the usual head width of 64.
        q = project("q", (config.d_model * config.d_kv) ** -0.5) * config.d_kv**0.5
        k, v = (project(name, config.d_model**-0.5) for name in ("k", "v"))
        if bias is None:
            buckets = relative_position_buckets(
                x.shape[1],
                buckets=config.relative_attention_num_buckets,
                max_distance=config.relative_attention_max_distance,
            )
            init = nn.initializers.normal(config.d_model**-0.5)
            table = nn.Embed(
                config.relative_attention_num_buckets, heads, embedding_init=init, name="relative_attention_bias"
            )
            bias = einops.rearrange(table(buckets), "q k n -> 1 n q k")
        out = einops.rearrange(attention(q, k, v, bias=bias, mask=mask), "b l n k -> b l (n k)")
        init = nn.initializers.normal(inner**-0.5)
        return dense(config.d_model, bias=False, dtype=self.dtype, kernel_init=init, name="o")(out), bias


class FeedForward(nn.Module):
    """Two linear layers with the config's activation between them, gated or not."""

    config: T5TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        config, activation = self.config, FEED_FORWARDS[self.config.feed_forward_proj]

        def project(name: str) -> Float[Array, "b l f"]:
            init = nn.initializers.normal(config.d_model**-0.5)
            return dense(config.d_ff, bias=False, dtype=self.dtype, kernel_init=init, name=name)(x)

        if activation.gated:
            y = activation.function(project("wi_0")) * project("wi_1")
        else:
            y = activation.function(project("wi"))
        init = nn.initializers.normal(config.d_ff**-0.5)
        return dense(config.d_model, bias=False, dtype=self.dtype, kernel_init=init, name="wo")(y)


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + epsilon) in float32 (arXiv 1910.07467): neither a mean nor a bias."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x.astype(jnp.float32)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return scale.astype(jnp.float32) * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
