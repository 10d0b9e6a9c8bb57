"""Reads weights files: a single one, or the shards of a model that is split over several."""

import re
from collections.abc import Iterable
from pathlib import Path

from lavie_jax.errors import UserError
from lavie_jax.text_files import read_json
from lavie_jax.weights.file_kinds import file_format
from lavie_jax.weights.safetensors_io import Tensor, read_safetensors
from lavie_jax.weights.torch_files import read_torch

# File names of each part, best first: full before half precision, safetensors before pickles.
MODEL_FILES = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
             "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16.bin"),
    "text_encoder": ("model.safetensors", "pytorch_model.bin",
                     "model.fp16.safetensors", "pytorch_model.fp16.bin"),
    "clip": ("model.safetensors", "pytorch_model.bin"),
}  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>\..+)")
INDEX = ".index.json"


def candidates(part: str) -> list[str]:
    """The names that a part's weights may have, best first: each file, or its index when it is split over shards."""
    return [name for file in MODEL_FILES[part] for name in (file, *index_names(file))]


def index_names(file: str) -> tuple[str, ...]:
    """Names of the index of a sharded file; the libraries differ in where they put the variant."""
    stem, *variant, suffix = file.split(".")
    old = [f"{stem}.{suffix}.index.{name}.json" for name in variant]
    return (file + INDEX, *old)


def find_weights(folder: Path, part: str, *, ema: bool = True) -> Path | None:
    """Returns the file or index with the weights of a part in its folder, or None.

    Without `ema`, the variant non_ema is the best; the other files have the averages, where they differ.
    """
    names = candidates(part)
    if not ema:
        stem = MODEL_FILES[part][0].partition(".")[0]
        names = [f"{stem}.non_ema.safetensors", f"{stem}.non_ema.bin", *names]
    files = [folder / name for name in names]
    found = next((file for file in files if file.is_file()), None)
    if found is None and (broken := next((file for file in files if file.is_symlink()), None)):
        raise UserError(f"{broken} is a broken link: its file is missing; download the model again.")
    return found


def read_weights_file(path: Path, *, ema: bool = True) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors or PyTorch file, by name; see `read_weights`."""
    return read_weights(path, ema=ema)[0]


def read_weights(path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Reads tensors by name, and returns them with notes for the user.

    Args:
        path: a .safetensors or PyTorch file, whatever its ending; the index of a sharded model, one of its shards, or
            the folder with either.
        ema: whether to prefer moving averages, where a PyTorch file has both them and the weights.

    Raises:
        UserError: the file is missing, damaged, of another kind, or without tensors.
    """
    if path.is_dir():
        path = _in_folder(path, ema)
    if not path.is_file():
        what = "is a broken link" if path.is_symlink() else "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}.")
    if path.suffix == ".json" and ".index" in path.name:
        return _read_index(path, ema)
    if shard := SHARD.fullmatch(path.name):
        if index := _index_of(path, shard):
            return _read_index(index, ema)
        if int(shard["count"]) > 1:
            return _read_shards(path.parent, _shards(shard), ema)
    return _read_file(path, ema)


def _read_file(path: Path, ema: bool) -> tuple[dict[str, Tensor], list[str]]:
    tensors, notes = (
        (read_safetensors(path)[0], []) if file_format(path) == "safetensors" else read_torch(path, ema=ema)
    )
    if not tensors:
        raise UserError(f"{path} has no tensors.")
    return tensors, notes


def _in_folder(folder: Path, ema: bool) -> Path:
    """Returns the weights file in a folder that has one."""
    for part in MODEL_FILES:
        if file := find_weights(folder, part, ema=ema):
            return file
    if (folder / "adapter_config.json").is_file() or list(folder.glob("pytorch_lora_weights.*")):
        raise UserError(
            f"{folder} is a LoRA adapter: sample with it (sample.py --lora), or merge it into a weights folder "
            "(convert_torch.py merge-lora)."
        )
    if list(folder.glob("*.distcp")):
        raise UserError(
            f"{folder} is a distributed checkpoint: convert it first, with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE."
        )
    if list(folder.glob("*zero_pp_rank_*")) or (folder / "zero_to_fp32.py").is_file():
        raise UserError(f"{folder} is a DeepSpeed checkpoint: convert it first, with its zero_to_fp32.py.")
    files = sorted(f for f in folder.iterdir() if f.suffix in WEIGHTS and not f.name.startswith(".") and f.is_file())
    whole = [file for file in files if not SHARD.fullmatch(file.name)]
    if len(files) > len(whole) and not whole:
        return files[0]
    if len(whole) == 1:
        return whole[0]
    listed = f"; it has {', '.join(file.name for file in whole[:5])}" if whole else ""
    raise UserError(f"{folder} is a folder with {len(whole)} weights files: give the path of one{listed}.")


def _index_of(path: Path, shard: re.Match) -> Path | None:
    names = index_names(shard["stem"] + shard["rest"])
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def _shards(shard: re.Match) -> list[str]:
    return [f"{shard['stem']}-{i + 1:05d}-of-{shard['count']}{shard['rest']}" for i in range(int(shard["count"]))]


def _read_index(path: Path, ema: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Reads a sharded model: {"weight_map": {tensor: file}}."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{path} is not the index of a sharded model: it has no weight_map of tensors to files.")
    outside = next((file for file in where.values() if file != Path(file).name or file in ("", ".", "..")), None)
    if outside is not None:
        raise UserError(f"{path} refers to {outside!r}; its shards must be files beside it.")
    tensors, notes = _read_shards(path.parent, sorted(set(where.values())), ema)
    if missing := [name for name in where if name not in tensors]:
        raise UserError(f"{path} lists {missing[0]}, which {where[missing[0]]} does not contain ({len(missing)} such).")
    in_order = {name: tensors[name] for name in where}  # the index has the order of the whole model
    return in_order | tensors, notes


def _read_shards(folder: Path, files: Iterable[str], ema: bool) -> tuple[dict[str, Tensor], list[str]]:
    files = list(files)
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{folder} lacks {len(absent)} of {len(files)} shards: {', '.join(absent[:3])}. Download them.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        shard = _read_file(folder / file, ema)[0]
        if twice := next((name for name in shard if name in tensors), None):
            raise UserError(f"{folder / file} has {twice}, which another shard of the model has too.")
        tensors |= shard
    return tensors, [f"read {len(files)} shards"]
