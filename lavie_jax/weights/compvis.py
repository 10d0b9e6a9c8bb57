"""The original Stable Diffusion layout (`sd-v1-4.ckpt`): maps its names to diffusers', and shapes to configs.

Blocks are numbered consecutively instead of by level and layer, so replacements are functions of the numbers. There is
no config next to such a file; everything but the number of attention heads follows from the shapes.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lavie_jax.weights.safetensors_io import Tensor

PREFIXES = {  # part -> prefix of its names
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}

IGNORED = re.compile(
    r"^(first_stage_model\.loss\..*"  # the discriminator that trained the autoencoder
    r"|cond_stage_model\.logit_scale)$"
)

HEADS = 8  # of Stable Diffusion 1.x, at every level
TEXT_HEAD_WIDTH = 64


class Sizes(NamedTuple):
    """Sizes that the numbers in the names depend on."""

    unet_layers: int
    vae_levels: int


Replacement = str | Callable[[re.Match, Sizes], str]


def _input_block(match: re.Match, sizes: Sizes) -> str:
    number, inner, rest = int(match[1]), match[2], match[3]
    level, layer = divmod(number - 1, sizes.unet_layers + 1)
    if rest.startswith("op."):
        return f"down_blocks.{level}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    kind = "resnets" if inner == "0" else "attentions"
    return f"down_blocks.{level}.{kind}.{layer}.{rest}"


def _output_block(match: re.Match, sizes: Sizes) -> str:
    number, inner, rest = int(match[1]), match[2], match[3]
    level, layer = divmod(number, sizes.unet_layers + 1)
    if rest.startswith("conv."):
        return f"up_blocks.{level}.upsamplers.0.{rest}"
    kind = "resnets" if inner == "0" else "attentions"
    return f"up_blocks.{level}.{kind}.{layer}.{rest}"


def _middle_block(match: re.Match, sizes: Sizes) -> str:
    return "mid_block." + {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[match[1]] + "."


def _decoder_level(match: re.Match, sizes: Sizes) -> str:
    return f"decoder.up_blocks.{sizes.vae_levels - 1 - int(match[1])}."  # counted from the innermost


TABLES: dict[str, tuple[tuple[str, Replacement], ...]] = {
    "unet": (
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"^label_emb\.", "class_embedding."),
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"^input_blocks\.(\d+)\.(\d+)\.(.*)$", _input_block),
        (r"^output_blocks\.(\d+)\.(\d+)\.(.*)$", _output_block),
        (r"^middle_block\.([012])\.", _middle_block),
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time_emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".conv_shortcut."),
    ),
    "vae": (
        (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"^decoder\.up\.(\d+)\.", _decoder_level),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
        (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ),
    "text_encoder": (),
}


def is_compvis(names) -> bool:
    """Whether the names of a file are in the original Stable Diffusion layout."""
    return any(name.startswith(PREFIXES["unet"]) for name in names)


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Returns {part: tensors under diffusers' names}, and the names that neither belong to a part nor are `IGNORED`."""
    parts = {part: {} for part in PREFIXES}
    unknown = []
    for name, tensor in tensors.items():
        if IGNORED.match(name):
            continue
        part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if part is None:
            unknown.append(name)
        else:
            parts[part][name.removeprefix(PREFIXES[part])] = tensor
    return {part: rename_part(part, of_part) for part, of_part in parts.items()}, unknown


def rename_part(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps the names of a part, without its prefix, to diffusers' names."""
    sizes = Sizes(
        unet_layers=_unet_layers(tensors) if part == "unet" else 0,
        vae_levels=_count(tensors, r"^encoder\.down\.(\d+)\."),
    )
    return {rename(part, name, sizes): tensor for name, tensor in tensors.items()}


SCALING_FACTORS = (0.18215, 0.13025, 0.08333)  # of Stable Diffusion 1 and 2, of SDXL, of the x4 upscaler


def scale_factor(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the VAE's scaling factor as a field of its config, for checkpoints that store one."""
    stored = next((t for name, t in tensors.items() if name.rpartition(".")[2] == "scale_factor"), None)
    if stored is None or stored.shape not in ((), (1,)):
        return {}
    value = np.asarray(stored.read()).reshape(())
    for factor in SCALING_FACTORS:
        if value == np.asarray(factor, value.dtype):  # in half precision, its own digits are too few
            return {"scaling_factor": factor}
    return {"scaling_factor": float(str(np.float32(value)))}  # the shortest decimal


def rename(part: str, name: str, sizes: Sizes) -> str:
    """Maps a name of a part, without its prefix, to diffusers' name."""
    for pattern, replacement in TABLES[part]:
        if callable(replacement):
            name = re.sub(pattern, lambda match, f=replacement: f(match, sizes), name)
        else:
            name = re.sub(pattern, replacement, name)
    return name


def _count(names, pattern: str) -> int:
    """Returns one more than the largest number that `pattern` captures in the names, or 0."""
    return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)


def _unet_layers(names) -> int:
    downsamplers = [int(m[1]) for name in names if (m := re.match(r"^input_blocks\.(\d+)\.0\.op\.", name))]
    return min(downsamplers, default=_count(names, r"^input_blocks\.(\d+)\.")) - 1


def config_from_shapes(part: str, tensors: Mapping[str, Tensor]) -> dict:
    """Infers a part's diffusers config from its shapes, given diffusers' names.

    Raises:
        KeyError: a tensor that determines a size is missing.
    """
    if part == "text_encoder":
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
        return {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _count(tensors, r"^encoder\.layers\.(\d+)\."),
            "num_attention_heads": max(1, width // TEXT_HEAD_WIDTH),
            "max_position_embeddings": tensors["embeddings.position_embedding.weight"].shape[0],
            "hidden_act": "quick_gelu",
        }
    prefix = "encoder." if part == "vae" else ""
    levels = range(_count(tensors, rf"^{re.escape(prefix)}down_blocks\.(\d+)\."))
    config = {
        "in_channels": tensors[f"{prefix}conv_in.weight"].shape[1],
        "block_out_channels": [tensors[f"{prefix}down_blocks.{i}.resnets.0.conv2.weight"].shape[0] for i in levels],
        "layers_per_block": _count(tensors, rf"^{re.escape(prefix)}down_blocks\.0\.resnets\.(\d+)\."),
    }
    if part == "vae":
        return config | {
            "out_channels": tensors["decoder.conv_out.weight"].shape[0],
            "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        }
    attends = [f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels]
    middle = "mid_block.attentions.0."
    class_embedding = tensors.get("class_embedding.weight")
    return config | {
        "out_channels": tensors["conv_out.weight"].shape[0],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": tensors[f"{middle}transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": HEADS,
        "use_linear_projection": tensors[f"{middle}proj_in.weight"].ndim == 2,
        "num_class_embeds": None if class_embedding is None else class_embedding.shape[0],
    }
