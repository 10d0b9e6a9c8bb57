"""PyTorch files to a weights folder and back. What `convert_torch.py import` and `export` do.

Everything is checked before anything is written, and one tensor at a time passes through memory.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.errors import UserError
from lavie_jax.models.transformer import ROTARY_WIDTH
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.weights.diffusers_configs import clip_text_config, inflated_config, unet_config, vae_config
from lavie_jax.weights.expected import compare, refuse
from lavie_jax.weights.folder import check_new_file, check_new_folder, read_part, save_folder
from lavie_jax.weights.names import dialect_of, from_torch, is_buffer, to_torch
from lavie_jax.weights.pretrained import Pretrained, Source, read_pretrained, read_weights_file
from lavie_jax.weights.safetensors_io import Tensor, as_tensor, read_safetensors, write_safetensors
from lavie_jax.weights.torch_files import import_torch, write_torch

KEPT_OF_SCHEDULER = ("num_train_timesteps", "prediction_type")  # the betas are the stage's own
X4_SCALING_FACTOR = 0.08333  # older x4-upscaler folders leave it out of vae/config.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a new weights folder holds besides its models: given by the stage, not by the files."""

    stage: str
    sampling: dict
    schedule: Schedule  # what the stage was trained with; overrides the betas of the pretrained model's JSON
    low_res_schedule: Schedule | None = None


@dataclasses.dataclass
class Imported:
    """One model under our paths, unread, and what does not fit."""

    config: Any
    tensors: dict[str, Tensor]
    dialect: str
    problems: list[str]

    @property
    def part(self) -> tuple[Any, dict[str, Tensor]]:
        """What `save_folder` takes."""
        return self.config, self.tensors


def import_stage(
    target: Target,
    out: Path,
    *,
    unet_file: Path,
    pretrained: Path,
    tokenizer: Path | None = None,
    share: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the weights folder `out` of a LaVie checkpoint and the image model that it was made from.

    `pretrained` is a diffusers folder, or a CompVis checkpoint with `tokenizer`. Raises UserError with every tensor
    that is missing, unexpected or wrongly shaped, or for NaN; then nothing is written.
    """
    check_new_folder(out, overwrite=overwrite)
    source = read_pretrained(pretrained, tokenizer=tokenizer, with_unet=False)
    parts = import_image_parts(source, target.stage)
    config = video_config(unet_config(source.unet_config, "image"), target.stage, parts["vae"].config.latent_channels)
    parts["unet"] = import_part("unet", Source(unet_file, {}, read_weights_file(unet_file)), config)
    refuse([line for part in parts.values() for line in part.problems] + list(source.unknown))
    save(target, out, parts, source, share=share, overwrite=overwrite)


def import_image_parts(source: Pretrained, stage: str) -> dict[str, Imported]:
    """The VAE and the text encoder of a published model."""
    vae_json = dict(source.vae.config)
    if stage == "vsr":
        vae_json.setdefault("scaling_factor", X4_SCALING_FACTOR)
    return {
        "vae": import_part("vae", source.vae, vae_config(vae_json)),
        "text_encoder": import_part("text_encoder", source.text_encoder, clip_text_config(source.text_encoder.config)),
    }


def video_config(image: UNetConfig, stage: str, latent_channels: int) -> UNetConfig:
    """A stage's UNet, made from the image UNet: what is temporal, and the interpolation's copied key frames."""
    more = latent_channels if stage == "interpolation" else 0
    return inflated_config(dataclasses.replace(image, in_channels=image.in_channels + more), stage)


def import_part(part: str, source: Source, config) -> Imported:
    """The tensors of a file under our paths, compared with what `config` needs."""
    dialect = dialect_of(part, source.tensors)
    tensors, names, problems = {}, {}, []
    for name, tensor in source.tensors.items():
        try:
            path, ours = from_torch(part, name, tensor)
        except UserError as error:
            problems.append(f"{source.file}: {error}")
            continue
        if path in names:
            problems.append(f"{source.file}: {names[path]} and {name} are the same parameter")
        tensors[path], names[path] = ours, name

    def shown(path: str, shape: tuple[int, ...]):
        name, torch_view = to_torch(part, path, np.broadcast_to(np.float32(0), shape), dialect)
        return names.get(path, name), torch_view.shape

    problems += compare(str(source.file), config, {path: t.shape for path, t in tensors.items()}, shown)
    return Imported(config, tensors, dialect, problems)


def save(
    target: Target,
    out: Path,
    parts: Mapping[str, Imported],
    source: Pretrained,
    *,
    share: Path | None,
    overwrite: bool,
) -> None:
    """Writes checked parts, with the schedules of the published model where it names one."""
    said = {key: source.scheduler[key] for key in KEPT_OF_SCHEDULER if key in source.scheduler}
    schedule = Schedule.from_json(target.schedule.to_json() | said)
    low_res = target.low_res_schedule
    if low_res is not None and source.low_res_scheduler:
        low_res = Schedule.from_json(source.low_res_scheduler)
    save_folder(
        out,
        stage=target.stage,
        sampling=target.sampling,
        **{name: part.part for name, part in parts.items()},
        tokenizer=source.tokenizer,
        schedule=schedule,
        low_res_schedule=low_res,
        share=share,
        dialects={name: part.dialect for name, part in parts.items()},
        overwrite=overwrite,
    )


def exported(weights: Path, part: str = "unet") -> dict[str, Tensor]:
    """A part of a weights folder under PyTorch's names: what the imported file held, with its dtypes.

    A model that was trained here has no `rotary_emb.freqs`; they are computed, as the official scripts load strictly.
    """
    config, tensors, metadata = read_part(weights, part)
    refuse(compare(f"{weights}: {part}", config, {path: t.shape for path, t in tensors.items()}))
    dialect = metadata.get("dialect", "diffusers")
    if part == "unet":
        dialect = "lavie" if config.temporal_attention != "none" and not config.temporal_resblocks else "diffusers"
        tensors = tensors | missing_frequencies(config, tensors)
    return dict(to_torch(part, path, tensor, dialect) for path, tensor in tensors.items())


def missing_frequencies(config: UNetConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rotary frequencies that PyTorch's modules store as buffers and `tensors` lack, {path: Tensor}."""
    if not config.temporal_position:
        return {}
    widths = {}
    for path, tensor in tensors.items():
        if path.endswith("attn_temporal/time_rel_pos_bias/relative_attention_bias/embedding"):
            block = path.removesuffix("/time_rel_pos_bias/relative_attention_bias/embedding")
            heads, channels = tensor.shape[1], tensors[f"{block}/to_q/kernel"].shape[1]
            widths[f"{block}/rotary_emb/freqs"] = min(ROTARY_WIDTH, channels // heads)
    if config.temporal_resblocks:  # the super-resolution UNet keeps one more at its top
        widths["temporal_rotary_emb/freqs"] = max(widths.values())
    return {path: as_tensor(_frequencies(width)) for path, width in widths.items() if path not in tensors}


def _frequencies(width: int) -> np.ndarray:
    """In float32 throughout, so that the released width, 32, gives the originals' values bit for bit."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / np.power(np.float32(10000), exponents)


def export_part(weights: Path, out: Path, *, part: str = "unet", overwrite: bool = False) -> int:
    """Writes a part as a PyTorch file with the key `ema`, or as .safetensors by its ending; the number of tensors."""
    if out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{out} must end in .pt or .safetensors.")
    check_new_file(out, overwrite=overwrite)
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file.")
    if out.suffix == ".pt":
        import_torch()
    tensors = exported(weights, part)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.writing-{os.getpid()}"
    flat = temporary.with_name(temporary.name + ".safetensors")
    try:
        write_safetensors(flat, tensors, {"format": "pt"})
        if out.suffix == ".pt":  # PyTorch writes what is mapped, so that its layout need not be held in memory
            write_torch(temporary, read_safetensors(flat)[0])
            temporary.replace(out)
        else:
            flat.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
        flat.unlink(missing_ok=True)
    return len(tensors)


def differences(ours: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> list[str]:
    """Every tensor in which two files differ, a line each: by name, shape, dtype, or any byte.

    Buffers that only our file has (computed frequencies) are no difference.
    """
    lines = [f"missing {name}" for name in original if name not in ours]
    lines += [f"added {name}" for name in ours if name not in original and not is_buffer(name)]
    total = sum(t.nbytes for t in original.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="comparing", disable=None) as bar:
        for name, theirs in original.items():
            bar.update(theirs.nbytes)
            mine = ours.get(name)
            if mine is None:
                continue
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                found, needed = (f"{t.dtype.name} {list(t.shape)}" for t in (mine, theirs))
                lines.append(f"{name} is {found}, the original's {needed}")
            elif _bytes(mine) != _bytes(theirs):
                lines.append(f"{name} has other values")
    return lines


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))
