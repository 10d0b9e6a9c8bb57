"""A model to start training from: an image UNet, or the base UNet, inflated to a stage (LaVie sec. 3.1, 3.3, 3.4).

All spatial parameters are taken over. Temporal ones are new, and those that write into the residual stream start at
zero, so that at first the video model does to each frame what the image model does. The original zeroes only the
weights of some of them; here the biases and `resblock_temporal.conv2` too.
"""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.models.registry import PARTS
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.weights.convert import (
    Imported,
    Target,
    image_config,
    import_image_parts,
    import_part,
    save,
    video_config,
)
from lavie_jax.weights.expected import expected_shapes, refuse
from lavie_jax.weights.folder import check_new_folder, load_folder, part_dir, read_part, save_folder
from lavie_jax.weights.names import ZERO_AT_FIRST, is_buffer
from lavie_jax.weights.pretrained import read_pretrained
from lavie_jax.weights.safetensors_io import Tensor

TEMPORAL = re.compile(r"temporal")  # in the path of every parameter that an image model does not have


def inflate_pretrained(
    target: Target,
    out: Path,
    *,
    pretrained: Path,
    tokenizer: Path | None = None,
    seed: int = 0,
    share: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a weights folder of stage "base" (from Stable Diffusion) or "vsr" (from the x4-upscaler) to train from.

    Raises UserError as `import_stage` does.
    """
    check_new_folder(out, overwrite=overwrite)
    source = read_pretrained(pretrained, tokenizer=tokenizer, with_unet=True)
    parts = import_image_parts(source, target.stage)
    image = import_part("unet", source.unet, image_config(source))
    refuse([line for part in (image, *parts.values()) for line in part.problems] + list(source.unknown))
    _check_kind(pretrained, target.stage, image.config, parts["vae"].config.latent_channels)
    config = video_config(image.config, target.stage, parts["vae"].config.latent_channels)
    parts["unet"] = Imported(config, inflate(image.tensors, config, seed=seed), image.dialect, [])
    save(target, out, parts, source, share=share, overwrite=overwrite)


def _check_kind(pretrained: Path, stage: str, unet: UNetConfig, latent_channels: int) -> None:
    """Refuses an upscaler for the base stage, a model that is none for super-resolution, and others (inpainting)."""
    wanted = {"base": (latent_channels, False, "Stable Diffusion 1.x"), "vsr": (latent_channels + 3, True,
              "stable-diffusion-x4-upscaler")}  # fmt: skip
    channels, levels, name = wanted[stage]
    if (unet.in_channels, unet.num_class_embeds is not None) != (channels, levels):
        has = "with" if unet.num_class_embeds is not None else "without"
        raise UserError(
            f"{pretrained} has a UNet of {unet.in_channels} input channels, {has} noise levels; the stage {stage} "
            f"starts from {name}: {channels} channels, {'with' if levels else 'without'} them."
        )


def inflate_base(
    target: Target, out: Path, *, base: Path, seed: int = 0, share: Path | None = None, overwrite: bool = False
) -> None:
    """Writes a weights folder of stage "interpolation" to train from, made of one of stage "base".

    The base's temporal attention is not taken over: it stands at another place in the block. Raises UserError when
    `base` is not a whole folder of that stage.
    """
    check_new_folder(out, overwrite=overwrite)
    weights = load_folder(base, stage="base")
    parts, dialects = {}, {}
    for name in PARTS:
        config, tensors, metadata = read_part(base, name)
        parts[name], dialects[name] = (config, tensors), metadata.get("dialect", "diffusers")
    base_config, tensors = parts["unet"]
    config = video_config(base_config.image_config(), target.stage, weights.vae.config.latent_channels)
    spatial = {path: t for path, t in tensors.items() if not TEMPORAL.search(path)}
    parts["unet"] = config, inflate(spatial, config, seed=seed)
    save_folder(
        out,
        stage=target.stage,
        sampling=target.sampling,
        **parts,
        tokenizer=part_dir(base, "tokenizer"),
        schedule=weights.schedule,
        share=share,
        dialects=dialects,
        overwrite=overwrite,
    )


def inflate(source: Mapping[str, Tensor], config: UNetConfig, *, seed: int) -> dict[str, Tensor]:
    """Every parameter of the UNet that `config` describes, {path: Tensor}, from those of one without temporal parts.

    Taken-over tensors keep their dtype, new ones are float32, keyed by `seed` and their path. `conv_in` may have more
    input channels than the source's: the new ones are zero. Raises UserError when the source lacks a spatial
    parameter, or has one that the UNet does not.
    """
    expected = expected_shapes(config)
    problems = [f"unexpected {p} {list(t.shape)}" for p, t in source.items() if p not in expected and not is_buffer(p)]
    inflated = {}
    for path, shape in expected.items():
        if path in source and source[path].shape == shape:
            inflated[path] = source[path]
        elif path == "conv_in/kernel" and path in source:
            inflated[path] = _with_zero_channels(source[path], shape)
        elif TEMPORAL.search(path) and path not in source:
            inflated[path] = Tensor(shape, np.dtype(np.float32), _drawer(path, expected, seed))
        else:
            found = list(source[path].shape) if path in source else "missing"
            problems.append(f"{path} {found}, needed {list(shape)}")
    refuse(problems)
    return inflated


def _with_zero_channels(kernel: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A kernel (h, w, I, O) with input channels added behind the ones that it has."""
    more = shape[2] - kernel.shape[2]
    if more < 0 or tuple(np.subtract(shape, kernel.shape)) != (0, 0, more, 0):
        raise UserError(f"conv_in/kernel {list(kernel.shape)} does not inflate to {list(shape)}.")
    return Tensor(shape, kernel.dtype, lambda: np.pad(kernel.read(), ((0, 0), (0, 0), (0, more), (0, 0))))


def _drawer(path: str, expected: Mapping[str, tuple[int, ...]], seed: int):
    return lambda: initial_value(path, expected, seed)


def initial_value(path: str, expected: Mapping[str, tuple[int, ...]], seed: int) -> np.ndarray:
    """A new temporal parameter, float32: zero where it must change nothing at first, else as PyTorch initialises it.

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
