"""Writes LoRA files under the names of kohya or diffusers, and merges adapters into a new weights folder."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lavie_jax.disk import new_file
from lavie_jax.errors import UserError
from lavie_jax.weights.folder import load_folder, read_part
from lavie_jax.weights.lora import FOLDER_FILES, HEADER_CONFIG, Lora, merge_tensors, shapes_of
from lavie_jax.weights.lora_keys import KOHYA_PREFIXES, TEXT_PREFIX
from lavie_jax.weights.names import to_torch
from lavie_jax.weights.safetensors_io import write_safetensors
from lavie_jax.weights.saving import check_new_file, check_new_folder, save_folder

NAMES = ("kohya", "diffusers")
FOLDER_FILE = FOLDER_FILES[2]  # diffusers' name of an adapter's file in its folder
PARTS = ("unet", "text_encoder")  # that a LoRA may change
TEXT_MODULE = re.compile(r"(text_model\.)?encoder\.layers\.")  # in a PEFT file, whose keys name no part


class Factors(NamedTuple):
    """The change of a UNet's layer: kernels (..., inputs, r) and (r, outputs), whose product has the kernel's shape."""

    down: np.ndarray
    up: np.ndarray


def write_lora(path: Path, factors: Mapping[str, Factors], *, alpha: float, names: str) -> None:
    """Writes an adapter of a UNet as .safetensors.

    Args:
        path: the file.
        factors: {path of a layer: its factors}, all of one rank.
        alpha: the change is alpha / r times the product.
        names: of `NAMES`.
    """
    modules = {}
    for layer, (down, up) in factors.items():
        name, down = to_torch("unet", f"{layer}/kernel", down)
        up = up.T.reshape(up.shape[::-1] + (1,) * (down.ndim - 2))
        modules[name.removesuffix(".weight")] = down, up
    rank = next(iter(factors.values())).up.shape[0]
    write_modules(path, {("unet", name): pair for name, pair in modules.items()}, rank, alpha, names)


def write_modules(
    path: Path,
    modules: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]],
    rank: int,
    alpha: float,
    names: str,
) -> None:
    """Writes {(part, module with dots): (down, up)}, in PyTorch's order of axes, as .safetensors."""
    tensors, header = {}, {}
    prefixes = {part: prefix for prefix, part in KOHYA_PREFIXES.items()}
    for (part, module), (down, up) in modules.items():
        if names == "kohya":
            key = prefixes[part] + module.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = np.asarray(alpha, np.float32)
            header = {
                "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha),
            }  # fmt: skip
        else:
            tensors |= {f"{part}.{module}.lora_A.weight": down, f"{part}.{module}.lora_B.weight": up}
    if names == "diffusers":
        config = {}
        for part in dict.fromkeys(part for part, _ in modules):
            targets = [module for owner, module in modules if owner == part]
            config |= {f"{part}.r": rank, f"{part}.lora_alpha": alpha, f"{part}.target_modules": targets}
        header = {"format": "pt", HEADER_CONFIG: json.dumps(config)}
    write_safetensors(path, tensors, header)


def export_lora(lora: Lora, out: Path, *, names: str, overwrite: bool = False) -> int:
    """Writes a LoRA under other names, and returns its number of modules. Raises UserError if that is impossible."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors.")
    check_new_file(out, overwrite=overwrite)
    modules, scales = {}, set()
    for (part, module), delta in lora.modules.items():
        if set(delta.tensors) - {"down", "up", "alpha"}:
            raise UserError(
                f"{lora.path} is more than a LoRA ({next(iter(delta.keys.values()))}): merge-lora merges it."
            )
        if next(iter(delta.keys.values())).startswith(tuple(KOHYA_PREFIXES)):
            raise UserError(
                f"{lora.path} has kohya's names already; export-lora is for files with dots in their names."
            )
        down, up = delta.read("down"), delta.read("up")
        if part == "text_encoder" or (part is None and TEXT_MODULE.match(module)):
            part, module = "text_encoder", TEXT_PREFIX + module.removeprefix(TEXT_PREFIX)
        modules[part or "unet", module] = down, up
        scales.add((down.shape[0], float(delta.scale(down.shape[0]) * down.shape[0])))
    if len(scales) > 1:
        raise UserError(f"{lora.path} mixes ranks or alphas ({sorted(scales)[:3]}); export-lora is for files with one.")
    ((rank, alpha),) = scales
    with new_file(out) as temporary:
        write_modules(temporary, modules, rank, alpha, names)
    return len(modules)


def merge_folder(
    weights: Path, loras: Sequence[tuple[Lora, float]], out: Path, *, overwrite: bool = False
) -> tuple[int, list[str]]:
    """Writes a weights folder with adapters merged, one tensor at a time; all other tensors keep their bytes.

    Returns:
        The number of changed tensors, and notes for the user.
    """
    check_new_folder(out, overwrite=overwrite)
    folder = load_folder(weights, params=False)
    if folder.unet is None or folder.text_encoder is None:
        raise UserError(f"{weights} has no UNet.")
    read = {part: read_part(weights, part) for part in (*PARTS, "vae")}
    tensors = {part: read[part][1] for part in read}
    shapes = {part: shapes_of(tensors[part]) for part in PARTS}
    changes, notes = [], []
    for lora, strength in loras:
        own, lines = lora.changes(shapes)
        changes.append((own, strength))
        notes += lines
    count = len({(part, path) for own, _ in changes for part in PARTS for path in own[part]})
    for part in PARTS:
        tensors[part] = merge_tensors(tensors[part], [(own[part], strength) for own, strength in changes])
    save_folder(
        out,
        stage=folder.stage,
        sampling=folder.sampling,
        presets=folder.presets,
        **{part: (config, tensors[part]) for part, (config, _, _) in read.items()},
        tokenizer=folder.tokenizer_dir,
        schedule=folder.schedule,
        low_res_schedule=folder.low_res_schedule,
        dialects={part: metadata.get("dialect", "diffusers") for part, (_, _, metadata) in read.items()},
        overwrite=overwrite,
    )
    return count, notes
