"""Reading the models that others published: single files, diffusers folders, and CompVis checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from lavie_jax.errors import UserError
from lavie_jax.models.registry import PARTS
from lavie_jax.weights import compvis
from lavie_jax.weights.folder import read_json
from lavie_jax.weights.safetensors_io import Tensor, read_safetensors
from lavie_jax.weights.torch_files import read_torch

# Per part, best first: full precision before half, and what needs no unpickling before what does.
MODEL_FILES = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
             "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin",
                     "model.fp16.safetensors", "pytorch_model.fp16.bin"),
}  # fmt: skip
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either is a whole tokenizer
LFS_POINTER = b"version https://git-lfs"  # how the small file begins that Git leaves in place of a large one


@dataclass(frozen=True)
class Source:
    """One model as found: its file, diffusers configuration, and tensors under the file's names."""

    file: Path
    config: dict
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Pretrained:
    """An image model as published, read lazily. Scheduler configurations are empty where there are none."""

    unet: Source | None
    unet_config: dict
    vae: Source
    text_encoder: Source
    tokenizer: Path
    scheduler: dict
    low_res_scheduler: dict
    unknown: tuple[str, ...] = ()  # names in a single file that belong to no part


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, by name."""
    if not path.is_file():
        raise UserError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} only points to the weights, which were not cloned: run git lfs pull there.")
    tensors = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_torch(path)
    if not tensors:
        raise UserError(f"{path} holds no tensors.")
    return tensors


def read_pretrained(path: Path, *, tokenizer: Path | None, with_unet: bool) -> Pretrained:
    """A diffusers folder, or a CompVis checkpoint with the folder of its tokenizer; the UNet's weights if asked for.

    Raises UserError for whatever is missing or cannot be read.
    """
    if path.is_file():
        return _read_compvis(path, tokenizer, with_unet)
    if not path.is_dir():
        raise UserError(f"pretrained model {path} does not exist.")
    tokenizer = tokenizer or path / "tokenizer"
    _check_tokenizer(tokenizer)
    return Pretrained(
        unet=_read_part(path, "unet") if with_unet else None,
        unet_config=_read_config(path, "unet"),
        vae=_read_part(path, "vae"),
        text_encoder=_read_part(path, "text_encoder"),
        tokenizer=tokenizer,
        scheduler=_read_scheduler(path, "scheduler"),
        low_res_scheduler=_read_scheduler(path, "low_res_scheduler"),
    )


def _read_part(path: Path, part: str) -> Source:
    files = [path / part / name for name in MODEL_FILES[part]]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{path} has no weights of the {part}: looked in {part}/ for {', '.join(MODEL_FILES[part])}.")
    return Source(file, _read_config(path, part), read_weights_file(file))


def _read_config(path: Path, part: str) -> dict:
    file = path / part / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is no complete diffusers folder: {part}/config.json is missing.")
    return read_json(file)


def _read_scheduler(path: Path, name: str) -> dict:
    file = path / name / "scheduler_config.json"
    return read_json(file) if file.is_file() else {}


def _check_tokenizer(path: Path) -> None:
    if not any(all((path / name).is_file() for name in names) for names in TOKENIZER_FILES):
        needed = ", or ".join(" and ".join(names) for names in TOKENIZER_FILES)
        raise UserError(f"{path} is no tokenizer folder: it needs {needed}.")


def _read_compvis(path: Path, tokenizer: Path | None, with_unet: bool) -> Pretrained:
    tensors = read_weights_file(path)
    if not compvis.is_compvis(tensors):
        raise UserError(f"{path} is neither a diffusers folder nor a CompVis checkpoint (no model.diffusion_model.*).")
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer; name the folder of one with --tokenizer.")
    _check_tokenizer(tokenizer)
    parts, unknown = compvis.split(tensors)
    try:
        sources = {part: Source(path, compvis.config_from_shapes(part, parts[part]), parts[part]) for part in PARTS}
    except KeyError as error:
        raise UserError(f"{path} is incomplete: {error.args[0]} (as diffusers names it) is missing.") from error
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
