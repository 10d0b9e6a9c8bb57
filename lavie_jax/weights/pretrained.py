"""Reads published image models: diffusers folders, hub cache entries, and CompVis checkpoints."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError
from lavie_jax.models.registry import PARTS
from lavie_jax.text_files import read_json
from lavie_jax.weights import compvis
from lavie_jax.weights.model_kinds import other_part, refuse_other_kind
from lavie_jax.weights.reading import MODEL_FILES, WEIGHTS, find_weights, read_weights
from lavie_jax.weights.safetensors_io import Tensor
from lavie_jax.weights.tokenizer_files import tokenizer_folder
from lavie_jax.weights.unwrap import AVERAGES, unwrap


@dataclass(frozen=True)
class PretrainedPart:
    """One published network: its file, its diffusers config, and its tensors under the file's names."""

    file: Path
    config: dict
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pretrained:
    """A published image model, read lazily. Missing scheduler configs are empty."""

    unet: PretrainedPart | None
    unet_config: dict
    vae: PretrainedPart
    text_encoder: PretrainedPart
    tokenizer: Path
    scheduler: dict
    low_res_scheduler: dict
    unknown: tuple[str, ...] = ()  # names in a single file that belong to no part


def read_pretrained(
    path: Path,
    *,
    tokenizer: Path | None,
    with_unet: bool,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    ema: bool = True,
) -> Pretrained:
    """Reads a diffusers folder, or a CompVis checkpoint together with a tokenizer's folder.

    Args:
        path: the folder, the root of its entry in the hub's cache, or the checkpoint.
        tokenizer: folder of the tokenizer; by default that of the diffusers folder.
        with_unet: whether to read the UNet's weights.
        vae: file or folder of another VAE than the model's own.
        text_encoder: folder of another text encoder than the model's own, as transformers saves it; it also has the
            tokenizer, unless `tokenizer` is given.
        ema: whether to use moving averages of the weights, where the file has both.

    Raises:
        UserError: something is missing or cannot be read.
    """
    path = resolve_hub_cache(path)
    text, tokenizer = (None, tokenizer) if text_encoder is None else _other_text_encoder(text_encoder, tokenizer, ema)
    if path.is_file():
        model = _read_compvis(path, tokenizer, with_unet, vae, ema)
        return model if text is None else dataclasses.replace(model, text_encoder=text)
    if not path.is_dir():
        raise UserError(f"pretrained model {path} does not exist.")
    _check_pipeline(path)
    if vae is None and not (path / "vae").is_dir() and (path / "unet").is_dir():
        raise UserError(f"{path} has no VAE (no folder vae): give one with --vae FILE.")
    tokenizer = tokenizer_folder(resolve_hub_cache(tokenizer) if tokenizer else path / "tokenizer")
    own_vae = read_json(path / "vae" / "config.json") if (path / "vae" / "config.json").is_file() else {}
    return Pretrained(
        unet=_read_part(path, "unet", ema) if with_unet else None,
        unet_config=_read_config(path, "unet"),
        vae=read_vae(vae, own_vae, ema) if vae else _read_part(path, "vae", ema),
        text_encoder=text or _read_part(path, "text_encoder", ema),
        tokenizer=tokenizer,
        scheduler=_read_scheduler(path, "scheduler"),
        low_res_scheduler=_read_scheduler(path, "low_res_scheduler"),
    )


def resolve_hub_cache(path: Path) -> Path:
    """Returns the snapshot in the root of an entry of the hub's cache (`models--OWNER--NAME`), or `path` itself."""
    root = path.parent if path.name == "snapshots" else path
    snapshots = root / "snapshots"
    if not snapshots.is_dir() or not (root.name.startswith("models--") or (root / "refs").is_dir()):
        return path
    available = sorted(folder for folder in snapshots.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    main = root / "refs" / "main"
    if main.is_file() and (current := snapshots / main.read_text().strip()) in available:
        return current
    if len(available) == 1:
        return available[0]
    names = ", ".join(folder.name for folder in available) or "none"
    raise UserError(f"{path} has no snapshot of the branch main: give the path of one in {snapshots} ({names}).")


def _check_pipeline(path: Path) -> None:
    """Raises UserError for a folder of weights that is not a Stable Diffusion pipeline of diffusers."""
    if (path / "config.json").is_file() and "format_version" in read_json(path / "config.json"):
        raise UserError(f"{path} is a weights folder already, not a published image model; it needs no conversion.")
    index = path / "model_index.json"
    kind = read_json(index).get("_class_name") if index.is_file() else None
    if (path / "text_encoder_2").is_dir() or (path / "transformer").is_dir() or (path / "prior").is_dir():
        raise UserError(
            f"{path} is a {kind or 'pipeline'} with other networks than LaVie's: give Stable Diffusion 1.x, or for vsr "
            "the x4-upscaler."
        )
    if (path / "adapter_config.json").is_file() or list(path.glob("pytorch_lora_weights.*")):
        raise UserError(f"{path} is a LoRA adapter: sample.py --lora and convert_torch.py merge-lora take it.")
    if (path / "unet").is_dir() or (path / "vae").is_dir():
        return
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file())
    if files:
        raise UserError(
            f"{path} is not a diffusers folder (no folder unet), but it contains {files[0].name}: give the path of the "
            "checkpoint, with --tokenizer."
        )


def _read_part(path: Path, part: str, ema: bool) -> PretrainedPart:
    config = _read_config(path, part)
    file = find_weights(path / part, part, ema=ema)
    if file is None:
        others = sorted(
            f.name for f in (path / part).iterdir() if f.suffix in (*WEIGHTS, ".msgpack", ".onnx", ".h5", ".gguf")
        )
        more = f" (it has {', '.join(others[:3])})" if others else ""
        raise UserError(
            f"{path} has no weights of the {part}: {part}/ has none of {', '.join(MODEL_FILES[part])}{more}."
        )
    return PretrainedPart(file, config, *read_part_file(part, file, ema=ema))


def read_part_file(part: str, file: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Reads the tensors of a part's file under plain names, and notes for the user.

    Raises:
        UserError: it cannot be read, or is another kind of model.
    """
    tensors, notes = read_weights(file, ema=ema)
    return plain(part, file, tensors, notes, ema)


def plain(
    part: str, file: Path, tensors: Mapping[str, Tensor], notes: list[str], ema: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns a file's tensors under plain names, and all notes on it."""
    refuse_other_kind(file, tensors)
    unwrapped, more = unwrap(part, tensors, ema=ema)
    return unwrapped, tuple(f"{file}: {note}" for note in (*notes, *more))


def read_unet_file(path: Path, *, ema: bool) -> PretrainedPart:
    """Reads a UNet from a file, an index or a folder.

    Raises:
        UserError: it cannot be read, or is not a UNet.
    """
    path = resolve_hub_cache(path)
    path = path / "unet" if (path / "unet").is_dir() else path
    part = PretrainedPart(path, {}, *read_part_file("unet", path, ema=ema))
    own = {"conv_in.weight", "time_embedding.linear_1.weight"}  # a damaged UNet may lack one of them
    if not own & part.tensors.keys() and (what := other_part(part.tensors)) is not None:
        raise UserError(f"{path} is {what}, not a LaVie checkpoint of a UNet.")
    return part


def _other_text_encoder(path: Path, tokenizer: Path | None, ema: bool) -> tuple[PretrainedPart, Path]:
    """Reads a text encoder from transformers' folder, alone or with its decoder, and finds its tokenizer."""
    folder = resolve_hub_cache(path)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"text encoder {path} {what}: give a folder that transformers saved.")
    file = find_weights(folder, "text_encoder", ema=ema)
    if file is None:
        raise UserError(f"{folder} has no weights: it has none of {', '.join(MODEL_FILES['text_encoder'])}.")
    tensors, notes = read_part_file("text_encoder", file, ema=ema)
    if not any(name.startswith(("encoder.", "text_model.encoder.")) for name in tensors):
        what = other_part(tensors)
        raise UserError(f"{file} has no text encoder (no encoder.*){f': it is {what}' if what else ''}.")
    part = PretrainedPart(file, read_json(folder / "config.json"), tensors, notes)
    return part, tokenizer or tokenizer_folder(folder)


def read_vae(path: Path, own: Mapping[str, Any], ema: bool) -> PretrainedPart:
    """Reads a VAE from a diffusers folder, or from a single file in either layout of names.

    Args:
        path: the folder or file.
        own: config of the VAE that it replaces, whose scaling factor it takes unless it has its own.
        ema: see `read_pretrained`.

    Raises:
        UserError: there is no VAE.
    """
    path = resolve_hub_cache(path)
    folder = next((f for f in (path, path / "vae") if (f / "config.json").is_file()), None)
    if path.is_dir() and folder is not None:
        file = find_weights(folder, "vae", ema=ema)
        if file is None:
            raise UserError(f"{folder} has no weights of a VAE: it has none of {', '.join(MODEL_FILES['vae'])}.")
        return PretrainedPart(file, read_json(folder / "config.json"), *read_part_file("vae", file, ema=ema))
    tensors, notes = read_weights(path, ema=ema)
    compvis_layout = any(re.search(r"(^|\.)encoder\.down\.\d+\.block\.", name) for name in tensors)
    tensors, all_notes = plain("compvis vae" if compvis_layout else "vae", path, tensors, notes, ema)
    if compvis_layout:
        tensors = compvis.rename_part("vae", tensors)
    scale = {"scaling_factor": own["scaling_factor"]} if "scaling_factor" in own else {}
    beside = path.with_name("config.json")
    described = read_json(beside) if path.is_file() and beside.is_file() else {}
    try:
        config = described if "latent_channels" in described else compvis.config_from_shapes("vae", tensors)
    except (KeyError, IndexError) as error:
        what = other_part(tensors)
        reason = f"it is {what}" if what and what != "a VAE" else f"{error.args[0]} is missing"
        raise UserError(f"{path} is not a VAE of Stable Diffusion: {reason}.") from error
    return PretrainedPart(path, scale | config, tensors, all_notes)


def _read_config(path: Path, part: str) -> dict:
    file = path / part / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is not a complete diffusers folder: {part}/config.json is missing.")
    return read_json(file)


def _read_scheduler(path: Path, name: str) -> dict:
    file = path / name / "scheduler_config.json"
    return read_json(file) if file.is_file() else {}


def _read_compvis(path: Path, tokenizer: Path | None, with_unet: bool, vae: Path | None, ema: bool) -> Pretrained:
    tensors, notes = read_weights(path, ema=ema)
    scale = compvis.scale_factor(tensors)
    if not with_unet:  # its averages are of no use either
        tensors = {n: t for n, t in tensors.items() if not AVERAGES.match(n)} or tensors
    tensors, all_notes = plain("compvis", path, tensors, notes, ema)
    if not compvis.is_compvis(tensors):
        what = other_part(tensors)
        raise UserError(
            f"{path} is neither a diffusers folder nor a CompVis checkpoint (no model.diffusion_model.*)"
            + (f": it is {what}." if what else ".")
        )
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer; give the folder of one with --tokenizer.")
    tokenizer = tokenizer_folder(resolve_hub_cache(tokenizer))
    parts, unknown = compvis.split(tensors)
    if vae is None and not parts["vae"]:
        raise UserError(f"{path} has no VAE (no first_stage_model.*): give one with --vae FILE.")
    if not parts["text_encoder"]:
        raise UserError(f"{path} has no text encoder (no cond_stage_model.*): give the diffusers folder of its model.")
    try:
        sources = {
            part: PretrainedPart(path, compvis.config_from_shapes(part, parts[part]), parts[part])
            for part in PARTS
            if part != "vae" or vae is None
        }
    except KeyError as error:
        raise UserError(f"{path} is incomplete: {error.args[0]} (as diffusers names it) is missing.") from error
    if vae is not None:
        sources["vae"] = read_vae(vae, scale, ema)
    else:
        sources["vae"] = dataclasses.replace(sources["vae"], config=scale | sources["vae"].config)
    sources["text_encoder"] = dataclasses.replace(sources["text_encoder"], notes=all_notes)
    return Pretrained(
        unet=sources["unet"] if with_unet else None,
        unet_config=sources["unet"].config,
        vae=sources["vae"],
        text_encoder=sources["text_encoder"],
        tokenizer=tokenizer,
        scheduler={},
        low_res_scheduler={},
        unknown=tuple(f"{path}: unexpected {name} {list(tensors[name].shape)}" for name in unknown),
    )
