"""The keys of LoRA files: how kohya, LyCORIS, diffusers and PEFT name modules, and which files are refused.

    kohya, LyCORIS     lora_unet_mid_block_attentions_0_proj_in.lora_down.weight
    diffusers          unet.mid_block.attentions.0.proj_in.lora.down.weight
    diffusers, old     mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
    PEFT               base_model.model.mid_block.attentions.0.proj_in.lora_A.weight

A key is split into the module and the tensor's role in it (`down`, `up`, `alpha`, ...). Kohya's modules have
underscores instead of dots and are not parsed: a model's own names give the table from one to the other.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lavie_jax.weights.names import TO_TORCH, to_torch

KOHYA_PREFIXES = {"lora_unet_": "unet", "lora_te_": "text_encoder"}
DOTTED_PREFIXES = {"unet.": "unet", "text_encoder.": "text_encoder"}
PEFT_PREFIX = "base_model.model."
TEXT_PREFIX = "text_model."  # of transformers before version 5

_ADAPTER = r"(?:\.[\w-]+?)?"  # PEFT's name of the adapter, usually "default"
ROLES = (  # (end of a key, role); the first match counts
    (rf"\.lora_linear_layer\.(down|up){_ADAPTER}\.weight", None),
    (rf"[._]lora\.(down|up){_ADAPTER}\.weight", None),
    (r"\.lora_(down|up|mid)\.weight", None),
    (rf"\.lora_A{_ADAPTER}\.weight", "down"),
    (rf"\.lora_B{_ADAPTER}\.weight", "up"),
    (r"(?:[._]lora|\.lora_linear_layer)?\.(alpha)", None),
    (r"\.(dora_scale)", None),
    (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
    (r"\.hada_(w1_a|w1_b|w2_a|w2_b|t1|t2)", None),
    (r"\.lokr_(w1|w1_a|w1_b|w2|w2_a|w2_b)", None),
)
_ROLES = tuple((re.compile(f"(?P<module>.+?){end}"), role) for end, role in ROLES)
PREFIXED = {"hada": "hada_", "lokr": "lokr_"}  # roles that two algorithms share carry the algorithm's name

# Files of other algorithms and models, by their keys. The first match counts.
REFUSED = (
    (r"^lora_te[12]_|^text_encoder_2\.|^lora_unet_(input_blocks|output_blocks|middle_block)_|^clip_[lg]$",
     "made for Stable Diffusion XL"),
    (r"^lora_unet_(double|single)_blocks_|^(lora_)?transformer[._](single_)?transformer_blocks|\.(double|single)_blocks\.",
     "made for Flux"),
    (r"joint_blocks|^lora_transformer_|^transformer\.", "made for Stable Diffusion 3 or another diffusion transformer"),
    (r"^lora_prior_|^prior\.", "made for Stable Cascade"),
    (r"motion_modules\.|temporal_transformer\.", "a motion LoRA (AnimateDiff)"),
    (r"\.on_input$", "an IA3 file"),
    (r"\.(b?oft_\w+)(\.|$)|\.oft_blocks$", "an OFT file"),
    (r"\.[ab][12]\.weight$", "a GLoRA file"),
    (r"\.lokr_t2$", "a LoKr file with a Tucker factor (lokr_t2)"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "a file of full weights (LyCORIS full or norm)"),
    (r"\.scalar$|\.scale$", "a LyCORIS file with a trained scalar"),
    (r"^bundle_emb\.", "a LoRA with a textual inversion inside (bundle_emb)"),
    (r"lora_embedding_[AB]", "a PEFT file with embedding layers"),
    (r"\.lora_E|\.ranknum$", "an AdaLoRA file"),
    (r"\.vera_lambda_|vera_[AB]$", "a VeRA file"),
    (r"^emb_params$|^string_to_param|^<[^>]+>$", "a textual inversion: give it with --embedding"),
)  # fmt: skip
_REFUSED = tuple((re.compile(pattern), what) for pattern, what in REFUSED)


class Key(NamedTuple):
    """A parsed key.

    Attributes:
        part: "unet" or "text_encoder" if the key names it, else None.
        module: path of the module, with dots, or with underscores in kohya's names.
        role: what the tensor is in the module: down, up, mid, alpha, magnitude, dora_scale, hada_*, lokr_*.
    """

    part: str | None
    module: str
    role: str


def refused_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Returns (what a file is, one of its keys) for a file of an algorithm or a model that is not supported."""
    keys = list(keys)
    for pattern, what in _REFUSED:
        if key := next((key for key in keys if pattern.search(key)), None):
            return what, key
    return None


def parse_key(key: str) -> Key | None:
    """Splits a key of a LoRA file; None for a key of no known form."""
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(key):
            name = role or match[2]
            algorithm = next((a for a in PREFIXED if f".{a}_" in key[match.end("module") :]), None)
            part, module = _split_module(match["module"])
            return Key(part, module, PREFIXED[algorithm] + name if algorithm else name)
    return None


def _split_module(name: str) -> tuple[str | None, str]:
    """Returns the part that a module's name begins with, and the rest in today's names of diffusers."""
    for prefix, part in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    name = name.removeprefix(PEFT_PREFIX)
    part = next((part for prefix, part in DOTTED_PREFIXES.items() if name.startswith(prefix)), None)
    name = name.removeprefix(f"{part}.") if part else name
    name = name.removeprefix(PEFT_PREFIX).replace(".processor.", ".")
    if re.search(r"\.self_attn\.to_(q|k|v|out)$", name):  # the text encoder in diffusers' old names
        return part, re.sub(r"\.to_(\w+)$", r".\1_proj", name)
    return part, re.sub(r"(\.attn\d)\.to_out$", r"\1.to_out.0", name)


def module_table(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Returns {name of a module in a LoRA file: path of its kernel}, for every name that a file may use.

    Args:
        part: "unet" or "text_encoder".
        shapes: {path: shape} of the part's parameters.
    """
    table = {}
    for path, shape in shapes.items():
        if not path.endswith("/kernel") or len(shape) not in (2, 4):
            continue
        name = to_torch(part, path, np.broadcast_to(np.float32(0), shape))[0].removesuffix(".weight")
        names = (name, TEXT_PREFIX + name) if part == "text_encoder" else (name,)
        for one in names:
            table[one] = table[one.replace(".", "_")] = path
    return table


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a kernel in PyTorch's order of axes: outputs, inputs, height, width."""
    return tuple(shape[axis] for axis in TO_TORCH[len(shape)])
