"""Reads and writes PyTorch's pickled files (.pt, .bin, .ckpt). The only module that imports torch.

A pickle contains functions to call, so it is not trusted. `torch.load(weights_only=True)` only builds tensors, dicts,
lists and numbers and rejects everything else. But checkpoints also contain trainer callbacks, argparse.Namespace,
OmegaConf or numpy scalars. Such names are found by reading the pickle's opcodes without executing them, and are
replaced by inert classes that accept any arguments and store nothing. Files with functions that run programs or code
are rejected.
"""

import _compat_pickle
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.weights.safetensors_io import DTYPES, Tensor

WEIGHT_KEYS = ("ema", "state_dict")  # where checkpoints have their weights, if not at the top level
LEGACY_PICKLES = 4  # magic number, protocol, system, data; followed by storage keys and raw bytes

# Stand-ins would make these harmless too, but no legitimate checkpoint contains them.
HOSTILE_MODULES = {
    "asyncio", "code", "commands", "ctypes", "importlib", "marshal", "multiprocessing", "nt", "os", "posix",
    "pty", "pickle", "_pickle", "runpy", "shutil", "socket", "subprocess", "sys", "webbrowser",
}  # fmt: skip
HOSTILE_FUNCTIONS = {"io.open", "_io.open", "codecs.open"} | {
    f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "__import__", "breakpoint", "input")
}


def read_torch(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a PyTorch file, under `ema` or `state_dict` or at its top level.

    Zip files are mapped, and tensors are read when needed; old files (before PyTorch 1.6) are loaded into memory.

    Raises:
        UserError: the file is damaged, malicious, or without weights, or torch is not installed.
    """
    torch = import_torch()
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not is_zip and file.read(4) == b"PK\x03\x04":
            raise UserError(f"{path} is truncated: its table of contents is missing. Copy it again.")
    loaded = _load(torch, path, is_zip)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} contains a {type(loaded).__name__}, not a dict of weights (save model.state_dict()).")
    for key in WEIGHT_KEYS:
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    weights = {str(k): _as_tensor(torch, path, k, v) for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise UserError(f"{path} has no tensors, neither at its top level nor under {' or '.join(WEIGHT_KEYS)}.")
    return weights


def import_torch():
    """Imports torch. Raises UserError when it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "PyTorch is needed to read and write .pt, .bin and .ckpt files: pip install 'lavie_jax[convert]'"
        ) from error
    return torch


def _load(torch, path: Path, is_zip: bool):
    """Loads the file's pickle, with inert stand-ins for foreign classes."""
    containers: dict[str, type] = {}  # stand-ins that must behave like a dict or a list
    foreign = _foreign_globals(path, is_zip)
    while True:
        stand_ins = [_stand_in(name, containers.get(name)) for name in foreign]
        try:
            with _allowed(torch, stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
        except Exception as error:  # a damaged pickle can raise anything
            name = next((n for n in foreign if f"<class '{n}'>" in str(error) and n not in containers), None)
            if name is None:
                raise UserError(f"{path} cannot be read as a PyTorch file: {_reason(error)}") from error
            containers[name] = list if re.search("Can only (append to|extend) lists", str(error)) else OrderedDict


@contextmanager
def _allowed(torch, classes: list[type]) -> Iterator[None]:
    """Lets torch.load build `classes` (PyTorch 2.4 has no `safe_globals` yet)."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _foreign_globals(path: Path, is_zip: bool) -> list[str]:
    """Returns all names in the file's pickles. Raises UserError for a malicious one."""
    names = set()
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                pickles = [n for n in archive.namelist() if n.endswith("data.pkl")]
                for name in pickles:
                    names |= _globals_of(archive.read(name))
        else:
            with path.open("rb") as file:
                for _ in range(LEGACY_PICKLES):
                    names |= _globals_of(file)
    except (ValueError, RuntimeError, zipfile.BadZipFile, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a PyTorch file, or is damaged: {error}") from error
    for name in sorted(names):
        if name.split(".")[0] in HOSTILE_MODULES or name in HOSTILE_FUNCTIONS:
            raise UserError(f"{path} was refused: it would run {name}. Weights need no code; do not trust this file.")
    return sorted(names)


def _globals_of(data) -> set[str]:
    """Returns the dotted names of a pickle's GLOBAL opcodes without executing it; torch rejects all other references.

    PyTorch's pickles use Python 2's names, whose Python 3 equivalents are included.
    """
    names = set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            module, name = argument.split(" ", 1)
            names.add(f"{module}.{name}")
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            names.add(f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}")
    return names


def _reason(error: Exception) -> str:
    """Returns one line of an error of torch.load, without its advice to trust the file."""
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return reason.split("\n")[0] or type(error).__name__


def _stand_in(name: str, container: type | None) -> type:
    """Creates an inert class called `name`; with `container`, its instances are empty containers of that type."""

    def make(cls, *args, **kwargs):
        return object.__new__(cls) if container is None else container()

    module, _, qualname = name.rpartition(".")
    body = {
        "__module__": module,
        "__qualname__": qualname,
        "__new__": make,
        "__init__": lambda self, *args, **kwargs: None,
        "__setstate__": lambda self, state: None,
    }
    return type(qualname, (), body)


def _as_tensor(torch, path: Path, name: str, tensor) -> Tensor:
    dtypes = {getattr(torch, dtype.name): dtype for dtype in DTYPES.values() if dtype.name != "bool"}
    dtypes[torch.bool] = np.dtype(bool)
    if tensor.dtype not in dtypes or tensor.layout is not torch.strided:
        raise UserError(f"{path}: {name} is a {tensor.dtype} tensor ({tensor.layout}), which is not supported.")

    def read() -> np.ndarray:
        values = tensor.detach()
        if tensor.dtype is torch.bfloat16:  # numpy has no such type
            return values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return values.numpy()

    return Tensor(tuple(tensor.shape), dtypes[tensor.dtype], read)


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors`, views of a mapped file, under the key `ema`, as LaVie's official scripts expect."""
    torch = import_torch()

    def to_torch(array: np.ndarray):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        try:
            torch.save({"ema": OrderedDict((n, to_torch(t.read())) for n, t in tensors.items())}, path)
        except RuntimeError as error:  # PyTorch's own writer does not raise OSError, e.g. on a full disk
            raise UserError(f"{path} cannot be written: {_reason(error)}") from error
