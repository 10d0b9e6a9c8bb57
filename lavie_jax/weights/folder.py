"""The weights folder: its format, how it is read, and its hash. `saving.py` writes it.

    config.json                                 format version, stage, sampling defaults, parts in other folders
    unet/ vae/ text_encoder/                    config.json and model.safetensors, our parameter paths joined by dots
    tokenizer/                                  what transformers' AutoTokenizer reads
    scheduler/ low_res_scheduler/               scheduler_config.json with diffusers' names; the second for "vsr" only

Stage "vae" has only a VAE. `parts` in config.json refers to parts of other folders instead of repeating them,
{"vae": "../base/vae"}, relative to this folder. A folder is written under a temporary name, then renamed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from lavie_jax.diffusion.schedule import Schedule
from lavie_jax.disk import file_hash
from lavie_jax.errors import UserError, suggest, user_path
from lavie_jax.models.registry import PARTS, Config, default_network, networks_of
from lavie_jax.stages import STAGES
from lavie_jax.text_files import read_json
from lavie_jax.weights.expected import compare, fingerprint
from lavie_jax.weights.names import is_buffer
from lavie_jax.weights.safetensors_io import SHOW_PROGRESS_FROM, Tensor, check_finite, read_safetensors

FORMAT_VERSION = 1
CONTENTS = {  # the parts of a folder
    **{stage.name: stage.parts for stage in STAGES.values()},
    "vae": ("vae",),
    "clip": ("clip", "tokenizer"),  # for CLIPSIM
}
MODEL_FILE = "model.safetensors"
# Fields of a part's config.json in addition to the network's config:
FINGERPRINT = "fits"  # see `expected.fingerprint`
NETWORK = "network"  # the network's name in the registry; absent for the part's default network


@dataclasses.dataclass(frozen=True)
class Part:
    """A network's config and its parameters, a nested dict of arrays."""

    config: Any
    params: dict


@dataclasses.dataclass(frozen=True)
class Weights:
    """A loaded weights folder. Parts that its stage does not have are None.

    `presets` are sampling settings by the name of a preset; a folder without any has those of its stage.
    `new_words` are words that textual inversions added to the tokenizer in `tokenizer_dir`, {word: number of tokens}.
    """

    path: Path
    stage: str
    sampling: dict
    unet: Part | None
    vae: Part
    text_encoder: Part | None
    tokenizer_dir: Path | None
    schedule: Schedule | None
    low_res_schedule: Schedule | None
    presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    new_words: Mapping[str, int] = dataclasses.field(default_factory=dict)


def load_folder(path: str | Path, *, stage: str | None = None, dtype=None, params: bool = True) -> Weights:
    """Loads a weights folder.

    Args:
        path: the folder.
        stage: the stage that the folder must be of.
        dtype: dtype of the parameters; by default that on disk, as read-only views of the mapped file.
        params: whether to read the parameters and check them for NaN, which takes nearly all the time.

    Raises:
        UserError: the folder is missing, incomplete, truncated or of another stage; a tensor is missing, unexpected,
            of the wrong shape, or has NaN or Inf; or the parts do not belong together.
    """
    path = user_path(path)
    config = read_config(path, stage)
    contents = CONTENTS[config["stage"]]
    for name in contents:
        if not _part_dir(path, config, name).is_dir():
            raise UserError(f"{path} is incomplete: {_part_dir(path, config, name)} is missing.")
    parts = {name: load_part(path, name, dtype=dtype, params=params) if name in contents else None for name in PARTS}
    if parts["unet"]:
        _check_widths(path, **{name: part.config for name, part in parts.items()})
    return Weights(
        path=path,
        stage=config["stage"],
        sampling=config["sampling"],
        presets=config.get("presets", {}),
        **parts,
        tokenizer_dir=_part_dir(path, config, "tokenizer") if "tokenizer" in contents else None,
        schedule=_read_schedule(path, config, "scheduler") if "scheduler" in contents else None,
        low_res_schedule=_read_schedule(path, config, "low_res_scheduler") if "low_res_scheduler" in contents else None,
    )


def _check_widths(path: Path, *, unet, vae, text_encoder) -> None:
    """Raises UserError when the parts of a folder, each of them complete, do not belong together."""
    for what, given, needed in (
        ("text encoder's width", text_encoder.width, unet.text_width),
        ("VAE's number of latent channels", vae.latent_channels, unet.out_channels),
    ):
        if given != needed:
            raise UserError(f"{path} has parts of different models: its {what} is {given}, but its UNet's is {needed}.")


def load_part(path: str | Path, part: str, *, dtype=None, params: bool = True) -> Part:
    """Loads "unet", "vae" or "text_encoder" of a weights folder; see `load_folder`."""
    config, tensors, _ = read_part(path, part)
    where = part_dir(path, part) / MODEL_FILE
    shapes = {p: t.shape for p, t in tensors.items()}
    known_to_fit = read_json(where.with_name("config.json")).get(FINGERPRINT) == fingerprint(config, shapes)
    if lines := [] if known_to_fit else compare(str(where), config, shapes):
        more = f" and {len(lines) - 1} more like this" if len(lines) > 1 else ""
        raise UserError(f"{lines[0]}{more}. The file does not belong to its config.json.")
    if not params:
        return Part(config, {})
    arrays, quiet = {}, sum(t.nbytes for t in tensors.values()) < SHOW_PROGRESS_FROM
    for name, tensor in tqdm(tensors.items(), desc=f"reading {part}", unit="tensor", disable=quiet):
        if not is_buffer(name):
            array = tensor.read()
            check_finite(f"{where}: {name.replace('/', '.')}", array)
            arrays[name] = array if dtype is None else array.astype(dtype)
    return Part(config, unflatten_dict(arrays, sep="/"))


def read_part(path: str | Path, part: str) -> tuple[Any, dict[str, Tensor], dict[str, str]]:
    """Returns a part's config, its {path: Tensor} (unread, unchecked, with buffers), and its file's metadata."""
    folder = part_dir(path, part)
    for name in ("config.json", MODEL_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{path} is incomplete: {folder / name} is missing.")
    config = _read_network_config(folder / "config.json", part)
    tensors, metadata = read_safetensors(folder / MODEL_FILE)
    return config, {name.replace(".", "/"): tensor for name, tensor in tensors.items()}, metadata


def _read_network_config(file: Path, part: str) -> Config:
    fields, networks = read_json(file), networks_of(part)
    name = fields.pop(NETWORK, default_network(part))
    if name not in tuple(networks):  # a tuple: a damaged file may hold what cannot be hashed
        raise UserError(f"{file}: unknown network {name!r}{suggest(str(name), networks)}")
    fields.pop(FINGERPRINT, None)
    return networks[name].config.from_dict(fields)


def part_dir(path: str | Path, part: str) -> Path:
    """Returns the folder of a part of a weights folder, which config.json may place elsewhere."""
    path = user_path(path)
    return _part_dir(path, read_config(path), part)


def _part_dir(path: Path, config: Mapping, name: str) -> Path:
    return path / config.get("parts", {}).get(name, name)


def read_config(path: Path, stage: str | None = None) -> dict:
    """Returns the content of a weights folder's config.json.

    Raises:
        UserError: it is not a weights folder of this format, or not of `stage`.
    """
    if path.is_file():
        raise UserError(f"{path} is a file, not a weights folder. Convert PyTorch files with convert_torch.py import.")
    if not path.is_dir():
        raise UserError(f"weights folder {path} does not exist.")
    if not (path / "config.json").is_file():
        inside = [name for name in (*CONTENTS, *PARTS) if (path / name / "config.json").is_file()]
        hint = ""
        if set(inside) & set(CONTENTS):
            hint = f" It contains {', '.join(inside)}; give the path of one of them."
        elif inside:
            hint = " It looks like a diffusers folder: convert it with convert_torch.py import."
        raise UserError(f"{path} is not a weights folder: it has no config.json.{hint}")
    config = read_json(path / "config.json")
    if "format_version" not in config or "stage" not in config:
        raise UserError(
            f"{path} is not a weights folder: its config.json has no stage. PyTorch files need convert_torch.py import"
        )
    if config["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {config['format_version']}; this version of lavie_jax reads {FORMAT_VERSION}."
        )
    if config["stage"] not in tuple(CONTENTS):  # a tuple: a damaged file may hold what cannot be hashed
        raise UserError(f"{path}: unknown stage {config['stage']!r}{suggest(str(config['stage']), CONTENTS)}")
    if stage is not None and config["stage"] != stage:
        raise UserError(f"{path} is of stage {config['stage']!r}, but {stage!r} is needed.")
    if config["stage"] in tuple(STAGES) and not isinstance(config.get("sampling"), dict):
        raise UserError(f"{path} is incomplete: its config.json has no sampling defaults.")
    parts = config.get("parts", {})
    if not isinstance(parts, dict) or not all(isinstance(where, str) for where in parts.values()):
        raise UserError(f'{path}: parts in its config.json must be like {{"vae": "../base/vae"}}, not {parts!r}.')
    presets = config.get("presets", {})
    if not isinstance(presets, dict) or not all(isinstance(values, dict) for values in presets.values()):
        raise UserError(
            f'{path}: presets in its config.json must be like {{"fast": {{"steps": 10}}}}, not {presets!r}.'
        )
    return {"sampling": {}, **config}  # part of the hash: a new default here would change that of every folder


def _read_schedule(path: Path, config: Mapping, name: str) -> Schedule:
    return Schedule.from_json(read_json(_part_dir(path, config, name) / "scheduler_config.json"))


def folder_hash(path: str | Path) -> str:
    """Returns the SHA-256, in hex, of a weights folder's config and of the files of its parts, wherever they are."""
    path = user_path(path)
    config = read_config(path)
    # Not presets: a sample depends on the settings that they stand for, which its JSON has.
    settings = json.dumps({k: v for k, v in config.items() if k not in ("parts", "presets")}, sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for name in CONTENTS[config["stage"]]:
        folder = _part_dir(path, config, name)
        if not folder.is_dir():
            raise UserError(f"{path} is incomplete: {folder} is missing.")
        digest.update(f"{name} {hash_dir(folder)}\n".encode())
    return digest.hexdigest()


def hash_dir(folder: Path, only: Collection[str] | None = None) -> str:
    """Returns the SHA-256 of the names and contents of all files in a folder, but for hidden ones.

    File managers, editors and version control leave hidden files, which are not part of a model.

    Args:
        folder: the folder.
        only: the names of the files that count; None for all.
    """
    digest = hashlib.sha256()
    files = (p for p in folder.rglob("*") if not any(name.startswith(".") for name in p.relative_to(folder).parts))
    for file in sorted(p for p in files if p.is_file() and (only is None or p.name in only)):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_hash(file)}\n".encode())
    return digest.hexdigest()
