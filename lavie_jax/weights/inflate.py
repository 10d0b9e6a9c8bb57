"""Inflates an image UNet, or the base UNet, to a stage's UNet to start training from (LaVie sec. 3.1, 3.3, 3.4).

Spatial parameters are copied. Temporal ones are new, and outputs into the residual stream start at zero, so
that the video model first does to each frame what the image model does. The original zeroes only the weights of some of
them; here their biases and `resblock_temporal.conv2` are zero too.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.models.registry import PARTS
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.stages import STAGES
from lavie_jax.stages.stage import Stage
from lavie_jax.weights.convert import (
    Imported,
    check_image_model,
    import_image_parts,
    import_part,
    save,
    video_config,
)
from lavie_jax.weights.diffusers_configs import unet_config
from lavie_jax.weights.expected import expected_shapes, refuse
from lavie_jax.weights.folder import load_folder, part_dir, read_part
from lavie_jax.weights.names import ZERO_AT_FIRST, is_buffer
from lavie_jax.weights.pretrained import read_pretrained
from lavie_jax.weights.safetensors_io import Tensor
from lavie_jax.weights.saving import check_new_folder, save_folder
from lavie_jax.weights.tokenizer_files import check_tokenizer

TEMPORAL = re.compile(r"temporal")  # in the path of every temporal parameter, which image models do not have
NEW = re.compile(r"temporal|^encoder_hid_proj/")  # what inflation may add


def inflate_pretrained(
    stage: Stage,
    out: Path,
    *,
    pretrained: Path,
    tokenizer: Path | None = None,
    seed: int = 0,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    ema: bool = True,
    share: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes a weights folder of stage "base" (from Stable Diffusion) or "vsr" (from the x4-upscaler) to train from.

    The arguments, notes and errors are those of `import_stage`; `seed` is that of the new parameters. Another
    `text_encoder` gets a new layer that maps its width to the UNet's, which training has to learn.
    """
    check_new_folder(out, overwrite=overwrite)
    source = read_pretrained(
        pretrained, tokenizer=tokenizer, with_unet=True, vae=vae, text_encoder=text_encoder, ema=ema
    )
    parts = import_image_parts(source, stage)
    config = unet_config(source.unet_config)
    check_image_model(pretrained, stage, config, parts["vae"].config.latent_channels)
    image = import_part("unet", source.unet, config)
    refuse([line for part in (image, *parts.values()) for line in part.problems] + list(source.unknown))
    config = video_config(image.config, stage, parts["vae"].config.latent_channels)
    if text_encoder is not None:
        config = dataclasses.replace(config, encoder_hid_dim=parts["text_encoder"].config.width)
    parts["unet"] = Imported(config, inflate(image.tensors, config, seed=seed), image.dialect, [], image.notes)
    save(stage, out, parts, source, share=share, overwrite=overwrite)
    return [note for part in parts.values() for note in part.notes]


def inflate_stage(
    stage: Stage, out: Path, *, source: Path, seed: int = 0, share: Path | None = None, overwrite: bool = False
) -> None:
    """Writes a weights folder to train from, starting from the folder `source` of the stage that `stage` inflates.

    Temporal layers are copied if the stage has the same ones, as prediction has the base's. Interpolation has them at
    another position in the block.

    Raises:
        UserError: `source` is not a complete folder of that stage.
    """
    check_new_folder(out, overwrite=overwrite)
    weights = load_folder(source, stage=stage.inflates)
    parts, dialects = {}, {}
    for name in PARTS:
        config, tensors, metadata = read_part(source, name)
        parts[name], dialects[name] = (config, tensors), metadata.get("dialect", "diffusers")
    text, tokenizer = weights.text_encoder.config, part_dir(source, "tokenizer")
    check_tokenizer(tokenizer, text, owner=source)
    source_config, tensors = parts["unet"]
    if not copies_temporal(stage):
        source_config = source_config.image_config()
    config = video_config(source_config, stage, weights.vae.config.latent_channels)
    parts["unet"] = config, inflate(copied(stage, tensors), config, seed=seed)
    save_folder(
        out,
        stage=stage.name,
        sampling=stage.sampling_from(weights.sampling),
        **parts,
        tokenizer=tokenizer,
        schedule=weights.schedule,
        share=share,
        dialects=dialects,
        overwrite=overwrite,
    )


def copies_temporal(stage: Stage) -> bool:
    """Whether the temporal layers of the stage's UNet are those of the stage that it is inflated from."""
    return stage.inflates is not None and STAGES[stage.inflates].unet_fields == stage.unet_fields


def copied(stage: Stage, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parameters of the inflated stage's UNet that the stage's UNet starts from."""
    return {path: t for path, t in tensors.items() if copies_temporal(stage) or not TEMPORAL.search(path)}


def inflate(source: Mapping[str, Tensor], config: UNetConfig, *, seed: int) -> dict[str, Tensor]:
    """Returns all parameters of a UNet, {path: Tensor}, given those of a UNet with fewer temporal parts, or none.

    Copied tensors keep their dtype. New ones are float32 and depend on `seed` and their path. `conv_in` may have more
    input channels than the source's; the new ones are zero.

    Raises:
        UserError: the source lacks a spatial parameter of the UNet that `config` describes, or has others.
    """
    expected = expected_shapes(config)
    problems = [f"unexpected {p} {list(t.shape)}" for p, t in source.items() if p not in expected and not is_buffer(p)]
    inflated = {}
    for path, shape in expected.items():
        if path in source and source[path].shape == shape:
            inflated[path] = source[path]
        elif path == "conv_in/kernel" and path in source:
            inflated[path] = _with_zero_channels(source[path], shape)
        elif NEW.search(path) and path not in source:
            inflated[path] = Tensor(shape, np.dtype(np.float32), _initializer(path, expected, seed))
        else:
            actual = f"has shape {list(source[path].shape)}" if path in source else "is missing"
            problems.append(f"{path} {actual}, but {list(shape)} is needed")
    refuse(problems)
    return inflated


def _with_zero_channels(kernel: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Appends input channels of zeros to a kernel (h, w, I, O)."""
    more = shape[2] - kernel.shape[2]
    if more < 0 or tuple(np.subtract(shape, kernel.shape)) != (0, 0, more, 0):
        raise UserError(f"conv_in/kernel {list(kernel.shape)} cannot be inflated to {list(shape)}.")
    return Tensor(shape, kernel.dtype, lambda: np.pad(kernel.read(), ((0, 0), (0, 0), (0, more), (0, 0))))


def _initializer(path: str, expected: Mapping[str, tuple[int, ...]], seed: int):
    return lambda: initial_value(path, expected, seed)


def initial_value(path: str, expected: Mapping[str, tuple[int, ...]], seed: int) -> np.ndarray:
    """Returns a new parameter, float32: zero where it must have no effect at first, else as in PyTorch.

    Linear layers and convolutions, weight and bias: uniform within 1 / sqrt(fan in). Embeddings: standard normal.
    Norms: 1, 0.
    """
    shape, (module, _, leaf) = expected[path], path.rpartition("/")
    kernel = expected.get(f"{module}/kernel")
    if ZERO_AT_FIRST.search(path) or (leaf == "bias" and kernel is None):
        return np.zeros(shape, np.float32)
    if leaf == "scale":
        return np.ones(shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    if leaf == "embedding":
        return rng.standard_normal(shape, np.float32)
    bound = 1 / np.sqrt(np.prod(kernel[:-1]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)
