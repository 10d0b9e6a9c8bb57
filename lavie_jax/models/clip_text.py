"""The text encoder of CLIP (arXiv 2103.00020, section 2.4): OpenAI's ViT-L/14 and OpenCLIP's ViT-H.

A causal pre-norm transformer. The UNet attends to its last hidden states, after the final layer norm. Tokenizers are
elsewhere: `data/tokens.py` loads them from the weights folder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from lavie_jax.errors import UserError, suggest
from lavie_jax.models.attention import attention
from lavie_jax.models.config import check_positive, config_from_dict
from lavie_jax.models.layers import dense


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes the exact GELU, with erf; Flax's default is the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable] = {"quick_gelu": quick_gelu, "gelu": gelu}


def check_transformer(config: Any) -> None:
    """Raises UserError for a config with an invalid number, an unknown activation, or heads of unequal widths."""
    name = type(config).__name__
    check_positive(name, **{n: v for n, v in config.to_dict().items() if type(v) is int})
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{name}.hidden_act = {config.hidden_act!r} is unknown{suggest(config.hidden_act, ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{name}: hidden_size = {config.hidden_size} is not a multiple of "
            f"num_attention_heads = {config.num_attention_heads}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Fields of transformers' CLIPTextConfig, with its defaults. Raises UserError for invalid values."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_transformer(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPTextConfig":
        """Inverse of `to_dict`. Raises UserError for unknown names and wrong types."""
        return config_from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent."""
        return dataclasses.asdict(self)

    @property
    def width(self) -> int:
        """Width of the hidden states that the UNet attends to."""
        return self.hidden_size

    @property
    def length(self) -> int:
        """Number of tokens of a text, with padding."""
        return self.max_position_embeddings


class CLIPText(nn.Module):
    """Encodes tokens (B, L) as their last hidden states (B, L, D), float32; L is at most `max_position_embeddings`.

    Every token attends to itself and those before it, padding included, as in Stable Diffusion.

    Text encoders share this interface: their configs have `width`, `length` and `vocab_size`, and `takes_mask` is
    whether padding is masked. Where it is, the encoder and the UNet are called with the mask of the real tokens;
    elsewhere with None.
    """

    takes_mask: ClassVar[bool] = False

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b l d"]:
        if mask is not None:
            raise ValueError("CLIP has no padding mask: it attends to padding; see takes_mask.")
        config = self.config
        if tokens.shape[1] > config.max_position_embeddings:
            raise UserError(
                f"the text has {tokens.shape[1]} tokens, but this text encoder only "
                f"{config.max_position_embeddings} positions; shorten the text"
            )
        x = Embeddings(config, self.dtype, name="embeddings")(tokens)
        x = TransformerLayers(config, self.dtype, name="encoder")(x)
        return layer_norm(config, jnp.float32, "final_layer_norm")(x)


class Embeddings(nn.Module):
    """Sum of token and position embeddings: tokens (B, L) to (B, L, D)."""

    config: CLIPTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        config = self.config
        words = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            name="token_embedding",
            embedding_init=nn.initializers.normal(0.02),
        )(tokens)
        positions = nn.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            dtype=self.dtype,
            name="position_embedding",
            embedding_init=nn.initializers.normal(0.01),
        )
        return words + positions(jnp.arange(tokens.shape[1]))


class TransformerLayers(nn.Module):
    """The stack of layers: (B, L, D) to (B, L, D). The image encoder, whose config has the same fields, shares it."""

    config: Any
    dtype: DTypeLike
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        for i in range(self.config.num_hidden_layers):
            x = EncoderLayer(self.config, self.dtype, self.causal, name=f"layers_{i}")(x)
        return x


class EncoderLayer(nn.Module):
    """x + self_attn(norm(x)), then x + mlp(norm(x))."""

    config: Any
    dtype: DTypeLike
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        config, dtype = self.config, self.dtype
        x = x + SelfAttention(config, dtype, self.causal, name="self_attn")(layer_norm(config, dtype, "layer_norm1")(x))
        return x + MLP(config, dtype, name="mlp")(layer_norm(config, dtype, "layer_norm2")(x))


class SelfAttention(nn.Module):
    """Multi-head attention; q, k and v have biases."""

    config: Any
    dtype: DTypeLike
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        def project(name: str) -> Float[Array, "b l n k"]:
            y = dense(self.config.hidden_size, dtype=self.dtype, name=name)(x)
            return einops.rearrange(y, "b l (n k) -> b l n k", n=self.config.num_attention_heads)

        out = attention(project("q_proj"), project("k_proj"), project("v_proj"), causal=self.causal)
        out = einops.rearrange(out, "b l n k -> b l (n k)")
        return dense(self.config.hidden_size, dtype=self.dtype, name="out_proj")(out)


class MLP(nn.Module):
    """Two dense layers with the config's activation between them."""

    config: Any
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        x = ACTIVATIONS[self.config.hidden_act](x)
        return dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(x)


def layer_norm(config: Any, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Returns a layer norm with statistics in two passes: the fast variance is inaccurate where the mean is large."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)
