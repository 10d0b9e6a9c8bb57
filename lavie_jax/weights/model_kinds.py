"""Recognizes, by the names and dtypes of its tensors, a model of a known kind that cannot be converted."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lavie_jax.errors import UserError
from lavie_jax.weights.safetensors_io import Tensor

MERGE = "sample with it (sample.py --lora), or merge it into a weights folder (convert_torch.py merge-lora)"
FULL = "give the float16, bfloat16 or float32 file"
FOLDER = "give the diffusers folder of the model"
OTHER = "LaVie starts from Stable Diffusion 1.x or the x4-upscaler"


class Kind(NamedTuple):
    """A kind of model: what it is, what to do, and patterns one of which is in the name of a tensor of its own."""

    what: str
    advice: str
    patterns: tuple[str, ...]


KINDS = (  # the first match counts
    Kind("a LoRA adapter", MERGE, (
        r"(^|[._])lora[._](up|down|mid|A|B|E|magnitude_vector)([._]|$)",
        r"(^|\.)lora_(unet|te\d?|transformer|prior)_", r"_lora\.(up|down)\.", r"lora_linear_layer",
        r"lora_embedding_[AB]", r"(^|[._])dora_scale$", r"[._](hada_w[12]|lokr_w[12]|oft_(blocks|diag)|glora_)",
        r"^base_model\.model\.")),
    Kind("quantized", FULL, (
        r"\.SCB$", r"\.quant_state\.", r"\.(nested_)?(absmax|quant_map)$", r"\.(qweight|qzeros|wscales)$",
        r"(^|\.)scaled_fp8$", r"\.(weight_scale|scale_weight|scale_input|input_scale)(_inv|_2)?$",
        r"\.weight\._(data|scale)$")),
    Kind("a textual inversion (a new word)", OTHER, (r"^emb_params$", r"^string_to_param", r"^<[^>]+>$")),
    Kind("an IP-Adapter", OTHER, (r"(^|\.)ip_adapter\.", r"^image_proj\.")),
    Kind("a ControlNet", OTHER, (
        r"^control_model\.", r"controlnet_cond_embedding", r"^input_hint_block\.",
        r"^(zero_convs|controlnet_down_blocks)\.")),
    Kind("a Stable Diffusion 2.x checkpoint (its text encoder is OpenCLIP)", FOLDER, (
        r"cond_stage_model\.model\.(transformer|ln_final|positional_embedding|token_embedding)",)),
    Kind("a Stable Diffusion XL checkpoint", OTHER, (
        r"(^|\.)conditioner\.embedders\.", r"(^|\.)add_embedding\.linear_1\.", r"diffusion_model\.label_emb\.0\.0\.")),
    Kind("an OpenCLIP model", "give the text encoder of the model as transformers writes it", (
        r"^(model\.|module\.|transformer\.)*resblocks\.\d", r"^visual\.transformer\.")),
    Kind("a Stable Diffusion 3 checkpoint", OTHER, (
        r"(^|\.)joint_blocks\.", r"transformer_blocks\.\d+\.attn\.add_[qkv]_proj")),
    Kind("a Flux checkpoint", OTHER, (r"(^|\.)(double_blocks|single_blocks|single_transformer_blocks)\.\d",)),
    Kind("a diffusion transformer", OTHER, (
        r"(^|\.)adaLN_modulation\.", r"(^|\.)adaln_single\.", r"(^|\.)scale_shift_table$",
        r"(^|\.)blocks\.\d+\.((self_)?attn\.|modulation$)",
        r"^(model\.|module\.)?(pos_embed\.proj|x_embedder|patch_embed(ding)?)\.")),
    Kind("a Stable Video Diffusion checkpoint", OTHER, (r"\.time_stack\.", r"\.temporal_res_block\.")),
    Kind("a ModelScope or ZeroScope video model", OTHER, (r"\.temopral_conv\.", r"\.temp_(convs|attentions)\.")),
    Kind("a motion module (AnimateDiff)", OTHER, (r"motion_modules\.\d", r"\.temporal_transformer\.")),
    Kind("a file of Flax or of a weights folder", "give the PyTorch file (convert_torch.py export makes one)", (
        r"(^|\.)conv_in\.kernel$", r"(^|\.)token_embedding\.embedding$")),
    Kind("an optimizer's state", "give the weights", (r"(^|\.)exp_avg(_sq)?(\.|$)",)),
)  # fmt: skip
# What a file may be instead of the part asked for, tried when it lacks what that part cannot be without.
PARTS = (
    (r"(^|\.)(model\.)?diffusion_model\.(input_blocks|middle_block)\.", "a whole Stable Diffusion checkpoint"),
    (r"(^|\.)(input_blocks|middle_block)\.\d+\.", "a UNet in the original Stable Diffusion layout"),
    (r"(^|\.)decoder\.(up|up_blocks|mid|mid_block)\.", "a VAE"),
    (r"(^|\.)(encoder|decoder)\.block\.\d+\.layer\.", "a T5 text encoder"),
    (r"(^|\.)embeddings\.token_embedding\.weight$", "a CLIP text encoder"),
    (r"(^|\.)(visual_projection|vision_model)\.", "a CLIP image encoder"),
    (r"(^|\.)time_embedding\.linear_1\.", "a UNet in diffusers' layout"),
)


def refuse_other_kind(file: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError when a file is a known kind of model that cannot be converted."""
    for kind in KINDS:
        pattern = re.compile("|".join(kind.patterns))
        if name := next((name for name in tensors if pattern.search(name)), None):
            raise UserError(f"{file} is {kind.what} ({len(tensors)} tensors, such as {name}): {kind.advice}.")
    whole_numbers = (n for n, t in tensors.items() if n.endswith(".weight") and t.dtype.kind in "iu" and t.ndim > 1)
    if name := next(whole_numbers, None):
        raise UserError(f"{file} is quantized ({name} is {tensors[name].dtype.name}): {FULL}.")


def other_part(names: Iterable[str]) -> str | None:
    """Returns which part of a model these names are of, for a file that is not the part asked for."""
    names = list(names)
    return next((what for pattern, what in PARTS if any(re.search(pattern, name) for name in names)), None)
