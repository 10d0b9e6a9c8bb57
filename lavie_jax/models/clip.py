"""CLIP (arXiv 2103.00020): the image encoder, a vision transformer, beside the text encoder, with both projections.

Module paths mirror transformers' CLIPModel. It measures how well frames fit a caption; no stage uses it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lavie_jax.errors import UserError
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig, TransformerLayers, check_transformer, layer_norm
from lavie_jax.models.config import check_positive, config_from_dict

ARGMAX_EOS = 2  # an old eos_token_id with which transformers, as OpenAI, takes the token with the highest id


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Fields of transformers' CLIPVisionConfig, with its defaults, ViT-B/32. Raises UserError for invalid values."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_transformer(self)
        if self.image_size % self.patch_size:
            raise UserError(
                f"CLIPVisionConfig: image_size = {self.image_size} is not a multiple of patch_size = {self.patch_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both encoders and the width of the space that they share.

    `eos_token_id` is the token whose hidden state represents a text: its first occurrence, or with `ARGMAX_EOS` the
    token with the highest id.
    """

    text: CLIPTextConfig = dataclasses.field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = dataclasses.field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    eos_token_id: int = ARGMAX_EOS

    def __post_init__(self):
        check_positive("CLIPConfig", projection_dim=self.projection_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """Inverse of `to_dict`. Raises UserError for unknown names and wrong types."""
        values = dict(values)
        text = config_from_dict(CLIPTextConfig, values.pop("text", {}))
        vision = config_from_dict(CLIPVisionConfig, values.pop("vision", {}))
        numbers = config_from_dict(_Numbers, values)
        return cls(text=text, vision=vision, **dataclasses.asdict(numbers))

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbers:
    """The fields of CLIPConfig that are not configs."""

    projection_dim: int = CLIPConfig.projection_dim
    eos_token_id: int = CLIPConfig.eos_token_id


class CLIP(nn.Module):
    """Maps images and texts to the space that they share; the vectors are not normalized."""

    config: CLIPConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        """Makes the encoders and projections."""
        self.text_model = CLIPText(self.config.text, self.dtype)
        self.vision_model = CLIPImage(self.config.vision, self.dtype)
        self.text_projection = nn.Dense(self.config.projection_dim, use_bias=False)
        self.visual_projection = nn.Dense(self.config.projection_dim, use_bias=False)

    def __call__(
        self, images: Float[Array, "b h w 3"], tokens: Int[Array, "n l"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "n d"]]:
        """Returns the vectors of images and of texts."""
        return self.embed_images(images), self.embed_texts(tokens)

    def embed_images(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Returns the vectors of normalized images of `image_size` pixels a side."""
        return self.visual_projection(self.vision_model(images))

    def embed_texts(self, tokens: Int[Array, "n l"]) -> Float[Array, "n d"]:
        """Returns the vectors of texts, from the hidden states of their end tokens."""
        eos = self.config.eos_token_id
        end = jnp.argmax(tokens if eos == ARGMAX_EOS else tokens == eos, axis=1)  # the first of equal ones
        states = self.text_model(tokens)
        return self.text_projection(states[jnp.arange(len(tokens)), end])


class CLIPImage(nn.Module):
    """Encodes images (B, H, W, 3) as the last hidden state of the class token, after a layer norm; float32."""

    config: CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        x = PatchEmbeddings(self.config, self.dtype, name="embeddings")(images)
        x = layer_norm(self.config, self.dtype, "pre_layrnorm")(x)  # sic
        x = TransformerLayers(self.config, self.dtype, causal=False, name="encoder")(x)
        return layer_norm(self.config, jnp.float32, "post_layernorm")(x[:, 0])


class PatchEmbeddings(nn.Module):
    """The class token and one token for each patch, with learned positions."""

    config: CLIPVisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b l d"]:
        width, patch = self.config.hidden_size, self.config.patch_size
        patches = nn.Conv(
            width, (patch, patch), strides=(patch, patch), padding="VALID", use_bias=False, dtype=self.dtype,
            name="patch_embedding",
        )(images)  # fmt: skip
        token = self.param("class_embedding", nn.initializers.normal(0.02), (width,))
        x = rearrange(patches, "b h w d -> b (h w) d")
        x = jnp.concatenate([repeat(token.astype(x.dtype), "d -> b 1 d", b=len(x)), x], axis=1)
        positions = nn.Embed(
            1 + (self.config.image_size // patch) ** 2,
            width,
            dtype=self.dtype,
            name="position_embedding",
            embedding_init=nn.initializers.normal(0.02),
        )
        return x + positions(jnp.arange(x.shape[1]))
