"""The text encoder of CLIP (arXiv 2103.00020, section 2.4): OpenAI's ViT-L/14 and OpenCLIP's ViT-H.

A causal pre-norm transformer. What the UNet attends to is the last hidden state after the final layer
norm. Tokenizers are not here: they load with transformers from the weights folder.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lavie_jax.errors import UserError, suggest
from lavie_jax.models.attention import attention
from lavie_jax.models.config import check_positive, config_from_dict
from lavie_jax.models.layers import dense


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU (with erf); Flax's default is the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable] = {"quick_gelu": quick_gelu, "gelu": gelu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Names and defaults of transformers' CLIPTextConfig. UserError for values that no model has."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_positive("CLIPTextConfig", **{n: v for n, v in self.to_dict().items() if type(v) is int})
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"CLIPTextConfig.hidden_act = {self.hidden_act!r} is unknown{suggest(self.hidden_act, ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"CLIPTextConfig: hidden_size = {self.hidden_size} is not a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPTextConfig":
        """From what `to_dict` gave; UserError for unknown names and wrong types."""
        return config_from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """A dict that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_diffusers(cls, json: Mapping[str, Any]) -> "CLIPTextConfig":
        """From `text_encoder/config.json`, or a whole CLIP model's (its `text_config`).

        Fields that do not change the forward pass (dropout, token ids, dtype, ...) are ignored.
        """
        json = json.get("text_config") or json
        names = {field.name for field in dataclasses.fields(cls)}
        return config_from_dict(cls, {n: v for n, v in json.items() if n in names})


class CLIPText(nn.Module):
    """Tokens (B, L) to their last hidden states (B, L, D), float32; L at most `max_position_embeddings`.

    Every token attends to itself and those before it, padding included, as in Stable Diffusion.
    """

    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        cfg = self.config
        if tokens.shape[1] > cfg.max_position_embeddings:
            raise UserError(
                f"{tokens.shape[1]} tokens, but this text encoder has "
                f"{cfg.max_position_embeddings} positions; cut the text"
            )
        x = Embeddings(cfg, self.dtype, name="embeddings")(tokens)
        x = Encoder(cfg, self.dtype, name="encoder")(x)
        return layer_norm(cfg, jnp.float32, "final_layer_norm")(x)


class Embeddings(nn.Module):
    """Tokens (B, L) to what they mean plus where they stand, (B, L, D)."""

    config: CLIPTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        cfg = self.config
        words = nn.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            dtype=self.dtype,
            name="token_embedding",
            embedding_init=nn.initializers.normal(0.02),
        )(tokens)
        places = nn.Embed(
            cfg.max_position_embeddings,
            cfg.hidden_size,
            dtype=self.dtype,
            name="position_embedding",
            embedding_init=nn.initializers.normal(0.01),
        )
        return words + places(jnp.arange(tokens.shape[1]))


class Encoder(nn.Module):
    """The layers, one after the other: (B, L, D) to (B, L, D)."""

    config: CLIPTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        for i in range(self.config.num_hidden_layers):
            x = EncoderLayer(self.config, self.dtype, name=f"layers_{i}")(x)
        return x


class EncoderLayer(nn.Module):
    """x + self_attn(norm(x)), then x + mlp(norm(x))."""

    config: CLIPTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        cfg, dtype = self.config, self.dtype
        x = x + SelfAttention(cfg, dtype, name="self_attn")(layer_norm(cfg, dtype, "layer_norm1")(x))
        return x + MLP(cfg, dtype, name="mlp")(layer_norm(cfg, dtype, "layer_norm2")(x))


class SelfAttention(nn.Module):
    """Causal multi-head attention, q, k and v with biases."""

    config: CLIPTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        def project(name: str) -> Float[Array, "b l n k"]:
            y = dense(self.config.hidden_size, dtype=self.dtype, name=name)(x)
            return einops.rearrange(y, "b l (n k) -> b l n k", n=self.config.num_attention_heads)

        out = attention(project("q_proj"), project("k_proj"), project("v_proj"), causal=True)
        out = einops.rearrange(out, "b l n k -> b l (n k)")
        return dense(self.config.hidden_size, dtype=self.dtype, name="out_proj")(out)


class MLP(nn.Module):
    """Two dense layers with the activation of the config between them."""

    config: CLIPTextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        x = ACTIVATIONS[self.config.hidden_act](x)
        return dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(x)


def layer_norm(config: CLIPTextConfig, dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Statistics in float32 and in two passes: the fast variance loses digits where the mean is large."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)
