"""Imports CLIP for CLIPSIM: transformers' folders, and OpenAI's files, TorchScript or state dict."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError
from lavie_jax.models.clip import ARGMAX_EOS, CLIPConfig, CLIPVisionConfig
from lavie_jax.models.clip_text import CLIPTextConfig
from lavie_jax.models.config import config_from_dict, only_supported
from lavie_jax.text_files import read_json
from lavie_jax.weights.convert import import_part
from lavie_jax.weights.diffusers_configs import clip_text_config
from lavie_jax.weights.expected import refuse
from lavie_jax.weights.pretrained import PretrainedPart, resolve_hub_cache
from lavie_jax.weights.reading import MODEL_FILES, find_weights, read_weights
from lavie_jax.weights.safetensors_io import Tensor
from lavie_jax.weights.saving import check_new_folder, save_clip
from lavie_jax.weights.tokenizer_files import check_tokenizer, tokenizer_folder

HEAD_WIDTH = 64  # of OpenAI's models, whose files do not contain the number of heads
NOT_WEIGHTS = re.compile(r"(^|\.)(logit_scale|logit_bias|position_ids|input_resolution|context_length|vocab_size)$")
# OpenAI's names of a tower, and transformers'.
OPENAI = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TRANSPOSED = ("visual.proj", "text_projection")


def import_clip(source: Path, out: Path, *, tokenizer: Path | None = None, overwrite: bool = False) -> list[str]:
    """Writes a weights folder of stage "clip" from a published CLIP model.

    Args:
        source: transformers' folder, or OpenAI's file.
        out: the folder to write.
        tokenizer: folder of CLIP's tokenizer, which OpenAI's file does not contain.
        overwrite: whether to replace a weights folder.

    Returns:
        Notes for the user.

    Raises:
        UserError: the source is not a CLIP model with both encoders, or is incomplete; nothing is written.
    """
    check_new_folder(out, overwrite=overwrite)
    source = resolve_hub_cache(source)
    part, config, own_tokenizer = _read_folder(source) if source.is_dir() else (*_read_openai(source), None)
    if tokenizer is None and own_tokenizer is None:
        raise UserError(f"{source} has no tokenizer: give the folder of CLIP's with --tokenizer.")
    words = tokenizer_folder(resolve_hub_cache(tokenizer or own_tokenizer))
    check_tokenizer(words, config.text, owner=source)
    imported = import_part("clip", part, config)
    refuse(imported.problems)
    save_clip(out, imported.part, words, overwrite=overwrite)
    return list(part.notes)


def _read_folder(folder: Path) -> tuple[PretrainedPart, CLIPConfig, Path]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a folder of transformers: config.json is missing.")
    json = read_json(folder / "config.json")
    if not isinstance(json.get("vision_config"), dict) or json.get("model_type") not in (None, "clip"):
        raise UserError(
            f"{folder} is not a CLIP model with both encoders: its model_type is {json.get('model_type')!r}."
        )
    file = find_weights(folder, "clip")
    if file is None:
        raise UserError(f"{folder} has no weights: it has none of {', '.join(MODEL_FILES['clip'])}.")
    tensors, notes = read_weights(file)
    return PretrainedPart(file, json, _weights(tensors), tuple(notes)), clip_config(json), folder


def clip_config(json: Mapping[str, Any]) -> CLIPConfig:
    """Returns the config of a transformers CLIP model.

    Raises:
        UserError: a field has a value that our model does not support.
    """
    vision = json.get("vision_config") or {}
    only_supported("the vision_config of config.json", vision, {"num_channels": 3})
    names = {field.name for field in dataclasses.fields(CLIPVisionConfig)}
    return CLIPConfig(
        text=clip_text_config(json.get("text_config") or {}),
        vision=config_from_dict(CLIPVisionConfig, {n: v for n, v in vision.items() if n in names}),
        projection_dim=json.get("projection_dim", CLIPConfig.projection_dim),
        eos_token_id=(json.get("text_config") or {}).get("eos_token_id", ARGMAX_EOS),
    )


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not NOT_WEIGHTS.search(name)}


def _read_openai(file: Path) -> tuple[PretrainedPart, CLIPConfig]:
    tensors, notes = read_weights(file)
    if "visual.proj" not in tensors or "token_embedding.weight" not in tensors:
        other = "; its image encoder is a ResNet" if "visual.attnpool.positional_embedding" in tensors else ""
        raise UserError(f"{file} is not OpenAI's file of a CLIP model with a vision transformer{other}.")
    try:
        config = _openai_config(tensors)
    except (KeyError, IndexError) as error:
        raise UserError(f"{file} is incomplete: {error.args[0]} is missing.") from error
    renamed = dict(_renamed(_weights(tensors)))
    return PretrainedPart(file, {}, renamed, tuple(f"{file}: {note}" for note in notes)), config


def _openai_config(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    """Returns the config that the shapes of OpenAI's tensors imply."""

    def layers(prefix: str) -> int:
        return len({name.split(".")[prefix.count(".")] for name in tensors if name.startswith(prefix)})

    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    side = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    text = tensors["ln_final.weight"].shape[0]
    return CLIPConfig(
        text=CLIPTextConfig(
            vocab_size=tensors["token_embedding.weight"].shape[0],
            hidden_size=text,
            intermediate_size=tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=layers("transformer.resblocks."),
            num_attention_heads=max(1, text // HEAD_WIDTH),
            max_position_embeddings=tensors["positional_embedding"].shape[0],
        ),
        vision=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=layers("visual.transformer.resblocks."),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            image_size=side * patch,
            patch_size=patch,
        ),
        projection_dim=tensors["text_projection"].shape[1],
    )


def _renamed(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields OpenAI's tensors under transformers' names, with queries, keys and values apart."""
    for name, tensor in tensors.items():
        new = name
        for theirs, ours in OPENAI:
            new = re.sub(theirs, ours, new)
        if name in TRANSPOSED:
            yield new, tensor.transpose((1, 0))
        elif match := re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", new):
            rows = tensor.shape[0] // 3
            for i, letter in enumerate("qkv"):
                yield f"{match[1]}.self_attn.{letter}_proj.{match[2]}", _rows(tensor, i * rows, rows)
        else:
            yield new, tensor


def _rows(tensor: Tensor, start: int, count: int) -> Tensor:
    return Tensor((count, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[start : start + count])
