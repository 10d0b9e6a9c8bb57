"""Our configs from diffusers' and transformers' config.json files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lavie_jax.errors import UserError, suggest
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.config import config_from_dict, only_supported
from lavie_jax.models.registry import TextConfig
from lavie_jax.models.t5_text import T5TextConfig
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAEConfig
from lavie_jax.stages.stage import Stage

SUPPORTED_UNET_FIELDS = {  # name -> the only value that our UNet implements
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}


def unet_config(json: Mapping[str, Any], stage: Stage | None = None) -> UNetConfig:
    """Returns the config of the UNet that a diffusers `unet/config.json` describes.

    Args:
        json: the content of the file; absent fields take diffusers' defaults.
        stage: the stage of LaVie whose UNet it is; None for an image model.

    Raises:
        UserError: a field has a value that this UNet does not support.
    """
    only_supported("the UNet's config.json", json, SUPPORTED_UNET_FIELDS)
    if json.get("encoder_hid_dim_type") is not None:
        only_supported("the UNet's config.json", json, {"encoder_hid_dim_type": "text_proj"})
    widths = tuple(json.get("block_out_channels", UNetConfig.block_out_channels))
    levels = len(widths)

    def per_level(value):
        return tuple(value) if isinstance(value, list | tuple) else (value,) * levels

    fields = {  # of JSON, so that their types are checked
        "in_channels": json.get("in_channels", 4),
        "out_channels": json.get("out_channels", 4),
        "block_out_channels": widths,
        "layers_per_block": json.get("layers_per_block", 2),
        "attention_levels": _attention_levels(json, levels),
        "cross_attention_dim": json.get("cross_attention_dim", 1280),
        "attention_heads": per_level(json.get("attention_head_dim", 8)),
        "only_cross_attention": per_level(json.get("only_cross_attention", False)),
        "use_linear_projection": json.get("use_linear_projection", False),
        "encoder_hid_dim": json.get("encoder_hid_dim"),
        "num_class_embeds": json.get("num_class_embeds"),
        "norm_num_groups": json.get("norm_num_groups", 32),
        "norm_eps": json.get("norm_eps", 1e-5),
    }
    image = UNetConfig.from_dict(fields)
    config = inflated_config(image, {} if stage is None else stage.unet_fields)
    if not config.temporal_resblocks:
        return config
    only_supported("the UNet's config.json", json, {"use_first_frame": False, "video_condition": False})
    return dataclasses.replace(
        config,
        down_temporal_idx=tuple(json.get("down_temporal_idx", config.down_temporal_idx)),
        mid_temporal=json.get("mid_temporal", config.mid_temporal),
        up_temporal_idx=tuple(json.get("up_temporal_idx", config.up_temporal_idx)),
    )


def inflated_config(image: UNetConfig, fields: Mapping[str, Any]) -> UNetConfig:
    """Returns an image UNet's config with a stage's `unet_fields`; temporal modules, if any, are at every level."""
    config = dataclasses.replace(image, **fields)
    if not config.temporal_resblocks:
        return config
    every = tuple(range(len(config.block_out_channels)))
    return dataclasses.replace(config, down_temporal_idx=every, mid_temporal=True, up_temporal_idx=every)


def vae_config(json: Mapping[str, Any]) -> VAEConfig:
    """Returns the config of the VAE that a diffusers `vae/config.json` describes.

    Raises:
        UserError: a field is unknown, or has a value that our VAE does not support.
    """
    levels = len(json.get("block_out_channels", VAEConfig.block_out_channels))
    supported = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    }
    only_supported("the VAE's config.json", json, supported)
    no_effect = {"sample_size", "force_upcast"}
    ours = {n: v for n, v in json.items() if n not in no_effect and n not in supported and not n.startswith("_")}
    return config_from_dict(VAEConfig, ours)


def text_config(json: Mapping[str, Any]) -> TextConfig:
    """Returns the config of the text encoder that transformers' config.json describes, CLIP's or T5's.

    Raises:
        UserError: the model is of another type, or has a value that our encoder does not support.
    """
    kind = json.get("model_type", "clip_text_model")  # old files do not have it
    if kind in ("t5", "mt5"):
        # not `max_length`, which is about generating text
        names = {field.name for field in dataclasses.fields(T5TextConfig)} - {"length"}
        return config_from_dict(T5TextConfig, {n: v for n, v in json.items() if n in names})
    if "clip" not in str(kind):
        raise UserError(f"a text encoder of type {kind!r} is not supported; supported are clip_text_model, mt5, t5")
    return clip_text_config(json)


def clip_text_config(json: Mapping[str, Any]) -> CLIPTextConfig:
    """Returns the config of the text encoder in a `text_encoder/config.json`, or in a whole CLIP model's.

    Fields that do not change the forward pass (dropout, token ids, dtype, ...) are ignored.
    """
    json = json.get("text_config") or json
    names = {field.name for field in dataclasses.fields(CLIPTextConfig)}
    return config_from_dict(CLIPTextConfig, {n: v for n, v in json.items() if n in names})


def _attention_levels(json: Mapping[str, Any], levels: int) -> tuple[bool, ...]:
    """Whether each level has attention, from the types of the down blocks, which the up blocks must mirror."""
    down = json.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
    up = json.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1))
    attends = tuple(_has_attention(name, "Down") for name in down)
    if attends[::-1] != tuple(_has_attention(name, "Up") for name in up) or len(down) != levels:
        raise UserError(
            f"UNet config: down_block_types {down} and up_block_types {up} must mirror each other, one per level."
        )
    return attends


def _has_attention(block_type: str, way: str) -> bool:
    name = block_type.removesuffix("2D").removesuffix("3D")
    if name not in (f"{way}Block", f"CrossAttn{way}Block"):
        allowed = [f"{way}Block2D", f"CrossAttn{way}Block2D"]
        raise UserError(f"UNet config: unknown block type {block_type!r}{suggest(block_type, allowed)}")
    return name.startswith("CrossAttn")
