"""LoRA files of Stable Diffusion 1.x: reads those of kohya, LyCORIS, diffusers and PEFT, and merges them.

Every SD 1.x module exists in LaVie's UNets under the same name and shape, and the text encoder is the same CLIP, so
these files fit the spatial layers of all stages but super-resolution. Every key of a file is accounted for: it changes
a weight, or the file is refused and the key named. `lora_keys.py` has the names, `lora_deltas.py` the arithmetic.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavie_jax.disk import file_hash
from lavie_jax.errors import UserError, user_path
from lavie_jax.fields import is_finite
from lavie_jax.weights.file_kinds import file_format
from lavie_jax.weights.folder import read_json
from lavie_jax.weights.lora_deltas import ModuleDelta
from lavie_jax.weights.lora_keys import module_table, parse_key, refused_kind, torch_shape
from lavie_jax.weights.names import TO_FLAX, TO_TORCH
from lavie_jax.weights.safetensors_io import Tensor, as_tensor, check_finite, read_safetensors
from lavie_jax.weights.torch_files import read_torch

PEFT_CONFIG = "adapter_config.json"
FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin",
                "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # fmt: skip
HEADER_CONFIG = "lora_adapter_metadata"  # diffusers: the PEFT configuration of each part, as JSON in the header
OTHER_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # of encoded text
TEXT_INPUTS = re.compile(r"attn2[._]to_[kv]$|self_attn[._][qkv]_proj$")  # layers whose inputs have this width
XL_ONLY = re.compile(r"transformer_blocks[._][1-9]")  # Stable Diffusion 1.x has one block in each transformer
OTHER_VERSIONS = ("sdxl", "sd3", "flux", "lumina", "hunyuan")  # in kohya's ss_base_model_version
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # of PEFT's initializations: they also change the base's weights
CONV_IN = "conv_in/kernel"  # of the UNet; later stages have more input channels than image models

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # {part: {path: shape}}
Changes = Mapping[str, Mapping[str, ModuleDelta]]  # {part: {path: change}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file, its factors unread.

    Attributes:
        path: the file.
        sha256: of the file, together with that of PEFT's adapter_config.json where there is one.
        modules: {(part or None, module): its change}.
    """

    path: Path
    sha256: str
    modules: Mapping[tuple[str | None, str], ModuleDelta]

    def changes(self, shapes: Shapes) -> tuple[Changes, list[str]]:
        """Returns the change of each parameter of a model with these shapes, and notes for the user.

        Raises:
            UserError: a key belongs to no weight of the model, or to one of another shape.
        """
        tables = {part: module_table(part, shapes[part]) for part in shapes}
        changes: dict[str, dict[str, ModuleDelta]] = {part: {} for part in shapes}
        unknown, misfits, notes = [], [], []
        for (given, module), delta in self.modules.items():
            parts = [given] if given else list(shapes)
            part = next((part for part in parts if module in tables.get(part, {})), None)
            if part is None:
                unknown.append(next(iter(delta.keys.values())))
                continue
            path = tables[part][module]
            needed = torch_shape(shapes[part][path])
            if path in changes[part]:
                raise UserError(f"{self.path} changes {module} twice: {next(iter(delta.keys.values()))}.")
            if delta.fits(needed):
                changes[part][path] = delta
            elif part == "unet" and path == CONV_IN and delta.matrix_shape()[1] < math.prod(needed[1:]):
                notes.append(f"{self.path}: conv_in is left out, since this stage has {needed[1]} input channels")
            else:
                misfits.append((module, delta, needed))
        self._refuse(unknown, misfits)
        if not any(changes.values()):
            raise UserError(f"{self.path} changes nothing in this model: {'; '.join(notes) or 'it has no modules'}.")
        return changes, notes

    def _refuse(self, unknown: Sequence[str], misfits: Sequence[tuple[str, ModuleDelta, tuple[int, ...]]]) -> None:
        """Raises UserError if there are keys without a weight, or with one of another shape."""
        text = [d.matrix_shape()[1] for m, d, _ in misfits if TEXT_INPUTS.search(m)]
        model = next((OTHER_WIDTHS[width] for width in text if width in OTHER_WIDTHS), None)
        if any(XL_ONLY.search(key) for key in unknown):
            model = OTHER_WIDTHS[2048]
        if unknown:
            count = "no key belongs" if len(unknown) == len(self.modules) else f"{len(unknown)} modules do not belong"
            model = model or "another model"
            raise UserError(f"{self.path} was made for {model}: {count} to this one, such as {unknown[0]}.")
        if not misfits:
            return
        _, delta, needed = misfits[0]
        rows, columns = delta.matrix_shape()
        raise UserError(
            f"{self.path} was made for {model or 'another model, or one of another size'}: "
            f"{next(iter(delta.keys.values()))} changes a weight of {rows} x {columns}, but here it is "
            f"{needed[0]} x {math.prod(needed[1:])}."
        )


def parse_lora(text: str) -> tuple[str, float]:
    """Parses FILE[:SCALE]; the scale is what parses as a number after the last colon."""
    file, colon, scale = text.rpartition(":")
    if not colon or not file or user_path(text).exists():
        return text, 1.0
    try:
        return file, check_scale(file, float(scale))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        return text, 1.0


def check_scale(file: object, scale: Any) -> float:
    """Returns a LoRA's scale. Raises UserError unless it is a finite number."""
    scale = scale.item() if isinstance(scale, np.generic) else scale
    if not is_finite(scale):
        raise UserError(f"the scale of the LoRA {file} must be a finite number, not {scale!r}")
    return float(scale)


def read_lora(path: str | Path) -> Lora:
    """Reads the keys of a LoRA file, or of the folder of a PEFT or diffusers adapter.

    Raises:
        UserError: the file is missing or damaged, or its kind is not supported; the message names the kind and a key.
    """
    path = user_path(path)
    if path.is_dir():
        found = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} is a folder without a LoRA: it has none of {', '.join(FOLDER_FILES)}.")
        path = found
    if not path.is_file():
        raise UserError(f"LoRA file {path} does not exist.")
    tensors, metadata = _read_file(path)
    if kind := refused_kind(tensors):
        raise UserError(f"{path} is {kind[0]} ({kind[1]}), which is not supported with Stable Diffusion 1.x weights.")
    _check_base_model(path, metadata)
    config_file = path.with_name(PEFT_CONFIG)
    has_config = path.stem == "adapter_model" and config_file.is_file()
    configs = {None: read_json(config_file)} if has_config else _header_configs(path, metadata)
    modules = _modules(path, tensors, configs)
    return Lora(path=path, sha256=_hash(path, *([config_file] if has_config else [])), modules=modules)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = read_safetensors(path) if file_format(path) == "safetensors" else (read_torch(path)[0], {})
    if not tensors:
        raise UserError(f"{path} has no tensors.")
    return tensors, metadata


def _check_base_model(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises UserError for a file whose header, as kohya writes it, names another base model."""
    version = metadata.get("ss_base_model_version", "")
    if metadata.get("ss_v2") == "True" or version.startswith("sd_v2"):
        raise UserError(f"{path} was made for Stable Diffusion 2 (ss_v2 in its header), not 1.x.")
    if version.startswith(OTHER_VERSIONS):
        raise UserError(
            f"{path} was made for {version} (ss_base_model_version in its header), not Stable Diffusion 1.x."
        )


def _header_configs(path: Path, metadata: Mapping[str, str]) -> dict[str | None, dict]:
    """Returns {part: PEFT configuration} from the header of a safetensors file."""
    if HEADER_CONFIG not in metadata:
        return {}
    try:
        flat = json.loads(metadata[HEADER_CONFIG])
        return {
            part: {key.removeprefix(f"{part}."): value for key, value in flat.items() if key.startswith(f"{part}.")}
            for part in ("unet", "text_encoder")
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {HEADER_CONFIG} in its header cannot be read as a JSON object: {error}") from error


def _modules(
    path: Path, tensors: Mapping[str, Tensor], configs: Mapping[str | None, Mapping[str, Any]]
) -> dict[tuple[str | None, str], ModuleDelta]:
    """Groups the tensors of a file by module, checked."""
    groups: dict[tuple[str | None, str], dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            raise UserError(f"{path} has the key {key}, which no known form of LoRA has.")
        roles = groups.setdefault((parsed.part, parsed.module), {})
        if parsed.role in roles:
            raise UserError(f"{path} has {roles[parsed.role][0]} and {key} for the same factor.")
        roles[parsed.role] = key, tensor
    settings = {part: _peft_settings(path, config) for part, config in configs.items()}
    modules = {}
    for (part, module), roles in groups.items():
        alpha, stabilized, dora = (settings.get(part) or settings.get(None) or _no_settings)(module)
        keys = {role: key for role, (key, _) in roles.items()}
        delta = ModuleDelta(
            file=path, keys=keys, tensors={role: _finite(path, key, tensor) for role, (key, tensor) in roles.items()},
            alpha=alpha, rank_stabilized=stabilized,
        )  # fmt: skip
        delta.check()
        if dora and "magnitude" not in roles:
            raise UserError(f"{path} is a DoRA (use_dora), but {next(iter(keys.values()))} has no magnitude vector.")
        modules[part, module] = delta
    return modules


def _finite(path: Path, key: str, tensor: Tensor) -> Tensor:
    """Returns the tensor, checked for NaN and Inf when it is read."""

    def read() -> np.ndarray:
        array = np.asarray(tensor.read())
        check_finite(f"{path}: {key}", np.ascontiguousarray(array))
        return array

    return Tensor(tensor.shape, tensor.dtype, read)


def _no_settings(module: str) -> tuple[float | None, bool, bool]:
    return None, False, False


def _peft_settings(path: Path, config: Mapping[str, Any]) -> Callable[[str], tuple[float | None, bool, bool]]:
    """Returns the function module -> (alpha, whether it is rank-stabilized, whether it is a DoRA) of a PEFT config."""
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if kind != "LORA":
        raise UserError(f"{path} is a PEFT adapter of type {kind}, which is not supported; LORA is.")
    if config.get("fan_in_fan_out"):
        raise UserError(f"{path} has fan_in_fan_out=True, for layers that Stable Diffusion does not have.")
    if (init := str(config.get("init_lora_weights")).lower()).startswith(CHANGES_BASE):
        raise UserError(
            f"{path} has init_lora_weights={init}, which also changes the base's own weights: convert it to a plain "
            "LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    numbers = [*patterns.values(), *([] if alpha is None else [alpha])] if isinstance(patterns, Mapping) else [None]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        raise UserError(f"{path}: lora_alpha and alpha_pattern must be finite numbers, not {alpha!r} and {patterns!r}.")
    stabilized, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))

    def settings(module: str) -> tuple[float | None, bool, bool]:
        own = next((a for pattern, a in patterns.items() if _matches(path, pattern, module)), alpha)
        return own, stabilized, dora

    return settings


def _matches(path: Path, pattern: str, module: str) -> bool:
    """Whether a key of PEFT's patterns, the end of a path or a regex for it, means the module."""
    try:
        return re.match(rf"(?:.*\.)?(?:{pattern.removeprefix('^')})$", module) is not None
    except re.error as error:
        raise UserError(f"{path}: alpha_pattern has the key {pattern!r}, which is not a pattern: {error}") from error


def _hash(*paths: Path) -> str:
    """Returns the SHA-256 of a file, or of the hashes of several."""
    digests = [file_hash(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def merge_tensors(tensors: Mapping[str, Tensor], changes: Sequence[tuple[Mapping[str, ModuleDelta], float]]) -> dict:
    """Returns the tensors of one part with all changes merged, each computed when it is read.

    Args:
        tensors: {path: tensor}.
        changes: ({path: change}, strength) of each adapter; they are merged in this order.
    """
    merged = dict(tensors)
    for path, tensor in tensors.items():
        own = [(deltas[path], strength) for deltas, strength in changes if path in deltas]
        if own:
            merged[path] = Tensor(tensor.shape, tensor.dtype, lambda t=tensor, own=own: merge_array(t.read(), own))
    return merged


def merge_array(array: np.ndarray, changes: Sequence[tuple[ModuleDelta, float]]) -> np.ndarray:
    """Returns a kernel with changes merged in float32, in its own dtype."""
    array = np.asarray(array)
    weight = array.transpose(TO_TORCH[array.ndim]).astype(np.float32)
    for delta, strength in changes:
        weight = delta.merged(weight, strength)
    merged = weight.transpose(TO_FLAX[array.ndim]).astype(array.dtype)
    if not np.isfinite(merged).all():
        raise UserError(f"{changes[-1][0].file} makes a weight infinite: use a smaller scale.")
    return merged


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns {path: shape} of arrays or tensors."""
    return {path: as_tensor(t).shape for path, t in tensors.items()}
