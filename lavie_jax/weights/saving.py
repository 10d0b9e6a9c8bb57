"""Writes weights folders (`folder.py`) under a temporary name, so that no folder is ever half written."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.disk import new_folder
from lavie_jax.errors import UserError, check_folder, suggest, user_path
from lavie_jax.models.registry import Config, default_network, network_name
from lavie_jax.text_files import read_json
from lavie_jax.weights.expected import compare, fingerprint, refuse
from lavie_jax.weights.folder import (
    CONTENTS,
    FINGERPRINT,
    FORMAT_VERSION,
    MODEL_FILE,
    NETWORK,
    hash_dir,
    part_dir,
    read_config,
)
from lavie_jax.weights.safetensors_io import write_safetensors
from lavie_jax.weights.tokenizer_files import copy_tokenizer, limit_length


def save_folder(
    path: str | Path,
    *,
    stage: str,
    vae: tuple[Any, Mapping],
    sampling: Mapping | None = None,
    presets: Mapping[str, Mapping] | None = None,
    unet: tuple[Any, Mapping] | None = None,
    text_encoder: tuple[Any, Mapping] | None = None,
    tokenizer: Any = None,
    schedule: Schedule | None = None,
    low_res_schedule: Schedule | None = None,
    share: str | Path | None = None,
    dialects: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a weights folder. Nothing is left at `path` unless all of it could be written.

    Args:
        path: where to write it.
        stage: a key of `CONTENTS`, which has the parts that must be given.
        vae, unet, text_encoder: (config, parameters), parameters being nested dicts of arrays or `Tensor`s in the dtype
            to write.
        sampling: the stage's sampling defaults.
        presets: sampling settings by the name of a preset.
        tokenizer: a folder whose tokenizer files are copied, or a transformers tokenizer.
        schedule, low_res_schedule: noise schedules.
        share: a weights folder; parts that are the same there are referred to instead of repeated.
        dialects: the naming dialect of each part's PyTorch file, for the export.
        overwrite: whether to replace a weights folder at `path`.

    Raises:
        UserError: `path` exists, or a parameter does not fit its config, or has NaN or Inf.
    """
    given = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer,
             "scheduler": schedule, "low_res_scheduler": low_res_schedule}  # fmt: skip
    if stage not in CONTENTS:
        raise UserError(f"unknown stage {stage!r}{suggest(stage, CONTENTS)}")
    if (present := {name for name, value in given.items() if value is not None}) != set(CONTENTS[stage]):
        raise ValueError(f"a folder of stage {stage!r} has {CONTENTS[stage]}, but {sorted(present)} were given")
    check_new_folder(path, overwrite=overwrite)
    if share is not None:
        share = user_path(share)
        read_config(share)
    path = user_path(path)
    with new_folder(path) as folder:
        for name, value in given.items():
            if value is not None:
                _write_part(folder / name, value, (dialects or {}).get(name, "diffusers"))
        if text_encoder is not None:
            limit_length(folder / "tokenizer", text_encoder[0].length)
        config = {"format_version": FORMAT_VERSION, "stage": stage, "sampling": dict(sampling or {})}
        config |= {"presets": dict(presets)} if presets else {}
        if share is not None and (parts := _same_parts(folder, share, path)):
            config["parts"] = parts
        write_json(folder / "config.json", config)


def save_clip(path: Path, clip: tuple[Any, Mapping], tokenizer: Path, *, overwrite: bool = False) -> None:
    """Writes a folder of stage "clip": (config, parameters) of a CLIP model, and its tokenizer; see `save_folder`."""
    check_new_folder(path, overwrite=overwrite)
    with new_folder(user_path(path)) as folder:
        _write_part(folder / "clip", clip, "diffusers")
        _write_part(folder / "tokenizer", tokenizer, "diffusers")
        write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "stage": "clip"})


def _write_part(folder: Path, value, dialect: str) -> None:
    """Writes the subfolder of a schedule, of a tokenizer, or of (config, parameters)."""
    if isinstance(value, Schedule):
        folder.mkdir()
        write_json(folder / "scheduler_config.json", value.to_json())
    elif isinstance(value, str | Path):
        copy_tokenizer(value, folder)
    elif hasattr(value, "save_pretrained"):
        value.save_pretrained(folder)
    else:
        config, params = value
        flat = flatten_dict(params, sep="/")
        shapes = {p: tuple(t.shape) for p, t in flat.items()}
        refuse(compare(folder.name, config, shapes))
        folder.mkdir()
        write_json(
            folder / "config.json", _network_fields(config, folder.name) | {FINGERPRINT: fingerprint(config, shapes)}
        )
        tensors = {p.replace("/", "."): t for p, t in flat.items()}
        write_safetensors(folder / MODEL_FILE, tensors, {"dialect": dialect})


def _network_fields(config: Config, part: str) -> dict[str, Any]:
    """The content of a part's config.json, but for its fingerprint."""
    name = network_name(config)
    return config.to_dict() | ({} if name == default_network(part) else {NETWORK: name})


def write_json(path: Path, value: Mapping) -> None:
    """Writes an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def _same_parts(folder: Path, share: Path, final: Path) -> dict[str, str]:
    """Removes the parts of `folder` that `share` has too, and returns their paths relative to `final`.

    Parts within `final` do not count, since `folder` is about to take its place.
    """
    shared = {}
    for name in ("vae", "text_encoder", "tokenizer"):
        other = part_dir(share, name)
        if final.resolve() in other.resolve().parents:
            continue
        if other.is_dir() and (folder / name).is_dir() and hash_dir(other) == hash_dir(folder / name):
            shutil.rmtree(folder / name)
            shared[name] = os.path.relpath(other.resolve(), final.resolve())
    return shared


def check_new_folder(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises UserError when a weights folder cannot or must not be written at `path`.

    With `overwrite`, it may replace a weights folder or an empty folder, and nothing else.
    """
    path = user_path(path)
    check_new_file(path, overwrite=overwrite)
    if os.path.lexists(path) and not (
        path.is_dir() and (not any(path.iterdir()) or "format_version" in _read_if_json(path / "config.json"))
    ):
        raise UserError(f"{path} exists and is not a weights folder; remove it, or choose another name.")


def _read_if_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def check_new_file(path: str | Path, *, overwrite: bool = False) -> None:
    """Raises UserError when an output cannot or must not be written at `path`."""
    path = user_path(path)
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} already exists; remove it, choose another name, or pass --overwrite.")
    check_folder(path.parent, f"{path}")
