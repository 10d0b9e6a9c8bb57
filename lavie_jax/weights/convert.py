"""Converts PyTorch files to a weights folder and back, for `convert_torch.py import` and `export`.

Everything is checked before anything is written, and only one tensor at a time is in memory.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.disk import new_file
from lavie_jax.errors import UserError
from lavie_jax.models.transformer import ROTARY_WIDTH
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.stages import STAGES
from lavie_jax.stages.stage import Stage
from lavie_jax.weights.diffusers_configs import inflated_config, text_config, unet_config, vae_config
from lavie_jax.weights.expected import compare, refuse
from lavie_jax.weights.folder import read_part
from lavie_jax.weights.names import dialect_of, from_torch, is_buffer, to_torch
from lavie_jax.weights.pretrained import Pretrained, PretrainedPart, read_pretrained, read_unet_file
from lavie_jax.weights.safetensors_io import Tensor, as_tensor, read_safetensors, write_safetensors
from lavie_jax.weights.saving import check_new_file, check_new_folder, save_folder
from lavie_jax.weights.tokenizer_files import check_tokenizer
from lavie_jax.weights.torch_files import import_torch, write_torch

PROJECTION = "encoder_hid_proj.weight"  # of a UNet with a text encoder of another width
SCHEDULER_FIELDS = ("num_train_timesteps", "prediction_type")  # taken from the pretrained model; betas are not


@dataclasses.dataclass
class Imported:
    """One model under our paths, unread, and the problems found in it."""

    config: Any
    tensors: dict[str, Tensor]
    dialect: str
    problems: list[str]
    notes: tuple[str, ...] = ()

    @property
    def part(self) -> tuple[Any, dict[str, Tensor]]:
        """The argument of `save_folder`."""
        return self.config, self.tensors


def import_stage(
    stage: Stage,
    out: Path,
    *,
    unet_file: Path,
    pretrained: Path,
    tokenizer: Path | None = None,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    ema: bool = True,
    share: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes a weights folder from a LaVie checkpoint and the image model that it was trained from.

    Args:
        stage: the stage of the checkpoint.
        out: the weights folder to write.
        unet_file: the LaVie checkpoint: a file, the index of a sharded one, or the folder with either.
        pretrained: a diffusers folder, or a CompVis checkpoint, which needs `tokenizer`.
        tokenizer: folder of the tokenizer; by default that of `pretrained`.
        vae: file or folder of another VAE than that of `pretrained`.
        text_encoder: folder of another text encoder than that of `pretrained`, with its tokenizer.
        ema: whether to use moving averages of the weights, where a file has both.
        share: see `save_folder`.
        overwrite: see `save_folder`.

    Returns:
        Notes on what was read of the files, for the user.

    Raises:
        UserError: tensors are missing, unexpected, of the wrong shape (they are counted and listed), or have NaN; or a
            file is of another kind. Then nothing is written.
    """
    check_new_folder(out, overwrite=overwrite)
    unet = read_unet_file(unet_file, ema=ema)
    source = read_pretrained(
        pretrained, tokenizer=tokenizer, with_unet=False, vae=vae, text_encoder=text_encoder, ema=ema
    )
    parts = import_image_parts(source, stage)
    latents = parts["vae"].config.latent_channels
    image = unet_config(source.unet_config)
    check_image_model(pretrained, stage, image, latents)
    _check_stage(unet, stage, latents)
    config = video_config(image, stage, latents)
    if (projection := unet.tensors.get(PROJECTION)) is not None and projection.ndim == 2:
        config = dataclasses.replace(config, encoder_hid_dim=projection.shape[1])
    parts["unet"] = import_part("unet", unet, config)
    refuse([line for part in parts.values() for line in part.problems] + list(source.unknown))
    save(stage, out, parts, source, share=share, overwrite=overwrite)
    return [note for part in parts.values() for note in part.notes]


# Published image models by the number of their UNet's input channels.
IMAGE_MODELS = {9: "inpainting", 8: "editing by instructions (InstructPix2Pix)", 7: "upscaling", 5: "depth maps"}


def check_image_model(path: Path, stage: Stage, unet: UNetConfig, latent_channels: int) -> None:
    """Raises UserError unless the stage starts from this kind of model: not, for instance, from one for inpainting."""
    channels, levels = latent_channels + stage.image_channels, stage.low_res_schedule is not None
    if (unet.in_channels, unet.num_class_embeds is not None) != (channels, levels):
        has = "with" if unet.num_class_embeds is not None else "without"
        use = f" (a model for {IMAGE_MODELS[unet.in_channels]})" if unet.in_channels in IMAGE_MODELS else ""
        raise UserError(
            f"{path} has a UNet with {unet.in_channels} input channels{use}, {has} noise levels; the stage "
            f"{stage.name} starts from {stage.image_model or STAGES[stage.inflates].image_model}: {channels} channels, "
            f"with{'' if levels else 'out'} them."
        )


def _check_stage(unet: PretrainedPart, stage: Stage, latent_channels: int) -> None:
    """Raises UserError for the UNet of an image model, and for the checkpoint of another stage."""
    first = unet.tensors.get("conv_in.weight")
    if first is None or first.ndim != 4:
        return
    if not any(re.search(r"temp", name) for name in unet.tensors):
        raise UserError(
            f"{unet.file} is the UNet of an image model, without temporal layers: convert_torch.py inflate makes a "
            "video model of one to train from."
        )
    by_channels = {
        s.name: latent_channels + s.image_channels + s.condition_channels(latent_channels) for s in STAGES.values()
    }
    others = [name for name, channels in by_channels.items() if channels == first.shape[1]]
    if first.shape[1] != by_channels[stage.name] and others:
        raise UserError(
            f"{unet.file} is a checkpoint of the stage {others[0]} ({first.shape[1]} input channels, not "
            f"{by_channels[stage.name]}): give --stage {others[0]}, and that stage's image model with --pretrained."
        )


def import_image_parts(source: Pretrained, stage: Stage) -> dict[str, Imported]:
    """Imports the VAE and the text encoder of a published model."""
    return {
        "vae": import_part("vae", source.vae, vae_config({**stage.vae_defaults, **source.vae.config})),
        "text_encoder": import_part("text_encoder", source.text_encoder, text_config(source.text_encoder.config)),
    }


def video_config(image: UNetConfig, stage: Stage, latent_channels: int) -> UNetConfig:
    """Returns the config of a stage's UNet around an image UNet: temporal parts, and channels for its condition."""
    channels = image.in_channels + stage.condition_channels(latent_channels)
    return inflated_config(dataclasses.replace(image, in_channels=channels), stage.unet_fields)


def import_part(part: str, source: PretrainedPart, config) -> Imported:
    """Maps the tensors of a file to our paths and compares them with what `config` needs."""
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
    return Imported(config, tensors, dialect, problems, source.notes)


def save(
    stage: Stage,
    out: Path,
    parts: Mapping[str, Imported],
    source: Pretrained,
    *,
    share: Path | None,
    overwrite: bool,
) -> None:
    """Writes checked parts, with the schedules of the published model where it has them."""
    text, unet = parts["text_encoder"].config, parts["unet"].config
    check_tokenizer(source.tokenizer, text, owner=source.text_encoder.file)
    if text.width != unet.text_width:
        raise UserError(
            f"the text encoder of {source.text_encoder.file} has the width {text.width}, but the UNet is called with "
            f"{unet.text_width}: give the text encoder that it was trained with."
        )
    scheduler = {key: source.scheduler[key] for key in SCHEDULER_FIELDS if key in source.scheduler}
    schedule = Schedule.from_json(stage.schedule.to_json() | scheduler)
    low_res = stage.low_res_schedule
    if low_res is not None and source.low_res_scheduler:
        low_res = Schedule.from_json(source.low_res_scheduler)
    save_folder(
        out,
        stage=stage.name,
        sampling=stage.sampling,
        **{name: part.part for name, part in parts.items()},
        tokenizer=source.tokenizer,
        schedule=schedule,
        low_res_schedule=low_res,
        share=share,
        dialects={name: part.dialect for name, part in parts.items()},
        overwrite=overwrite,
    )


def exported(weights: Path, part: str = "unet") -> dict[str, Tensor]:
    """Returns a part of a weights folder under PyTorch's names: the imported file's tensors, with their dtypes.

    Models trained with this library have no `rotary_emb.freqs`. They are computed, since the official scripts require
    them.
    """
    config, tensors, metadata = read_part(weights, part)
    refuse(compare(f"{weights}: {part}", config, {path: t.shape for path, t in tensors.items()}))
    dialect = metadata.get("dialect", "diffusers")
    if part == "unet":
        dialect = "lavie" if config.temporal_attention != "none" and not config.temporal_resblocks else "diffusers"
        tensors = tensors | missing_frequencies(config, tensors)
    return dict(to_torch(part, path, tensor, dialect) for path, tensor in tensors.items())


def missing_frequencies(config: UNetConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the rotary frequencies that PyTorch stores as buffers and `tensors` does not have, {path: Tensor}."""
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
    """Computes in float32, which reproduces the released values (width 32) bit for bit.

    The power is rounded from float64, because the last bit of numpy's power in float32 depends on the processor.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / np.power(10000.0, exponents.astype(np.float64)).astype(np.float32)


def export_part(weights: Path, out: Path, *, part: str = "unet", overwrite: bool = False) -> int:
    """Writes a part as a PyTorch file with the key `ema`, or as .safetensors, and returns the number of tensors."""
    if out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"{out} must end in .pt or .safetensors.")
    check_new_file(out, overwrite=overwrite)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the path of a file.")
    if out.suffix == ".pt":
        import_torch()
    tensors = exported(weights, part)
    with new_file(out) as temporary:
        if out.suffix == ".safetensors":
            write_safetensors(temporary, tensors, {"format": "pt"})
        else:
            flat = temporary.with_suffix(".safetensors")
            try:
                write_safetensors(flat, tensors, {"format": "pt"})
                write_torch(temporary, read_safetensors(flat)[0])  # from a mapped file: it is never all in memory
            finally:
                flat.unlink(missing_ok=True)
    return len(tensors)


def differences(ours: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> list[str]:
    """Returns one line for each tensor that differs between two files in name, shape, dtype or any byte.

    Buffers that only our file has (computed frequencies) are ignored.
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
                actual, expected = (f"{t.dtype.name} {list(t.shape)}" for t in (mine, theirs))
                lines.append(f"{name} is {actual}, but {expected} in the original")
            elif _bytes(mine) != _bytes(theirs):
                lines.append(f"{name} has different values")
    return lines


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))
