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
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.weights.safetensors_io import DTYPES, Tensor
from lavie_jax.weights.torchscript import is_torchscript, read_torchscript

# Where checkpoints have their weights, if not at the top level.
TOP_LEVEL = "the top level"
EMA_KEYS = ("ema", "ema_state_dict", "model_ema", "ema_model", "state_dict_ema", "params_ema", "ema_weights")
WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "module", "params", "weights", "unet", "net", "generator")
INNER_KEYS = ("state_dict", "module", "model", "shadow", "shadow_params")  # of a trainer's object below those
OLDEST = (2, 6)  # earlier versions of PyTorch can run code of a legacy file in spite of weights_only
LEGACY_PICKLES = 4  # magic number, protocol, system, data; followed by storage keys and raw bytes

# Modules of containers whose stand-ins keep their tensors: textual inversions of A1111 are pickled in a ParameterDict.
PARAMETER_DICTS = ("torch.nn.modules.container",)
# Stand-ins would make these harmless too, but no legitimate checkpoint contains them.
HOSTILE_MODULES = {
    "asyncio", "code", "commands", "ctypes", "importlib", "marshal", "multiprocessing", "nt", "os", "posix",
    "pty", "pickle", "_pickle", "runpy", "shutil", "socket", "subprocess", "sys", "webbrowser",
}  # fmt: skip
HOSTILE_FUNCTIONS = {"io.open", "_io.open", "codecs.open"} | {
    f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "__import__", "breakpoint", "input")
}


def read_torch(path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Reads the weights of a PyTorch file, under one of the usual keys or at its top level.

    Zip files are mapped, and tensors are read when needed; old files (before PyTorch 1.6) are loaded into memory.

    Args:
        path: the file, whose format `file_kinds` has checked.
        ema: whether to prefer moving averages where the file has both them and the weights.

    Returns:
        The tensors by name, and notes for the user.

    Raises:
        UserError: the file is damaged, malicious, or without weights, or torch is missing or too old.
    """
    if is_torchscript(path):
        return read_torchscript(path), ["read the tensors of a TorchScript archive, and none of its code"]
    torch = import_torch()
    loaded = _load_checked(torch, path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} contains a {type(loaded).__name__}, not a dict of weights (save model.state_dict()).")
    found, notes = _find_weights(torch, loaded, ema)
    weights = {str(k): _as_tensor(torch, path, k, v) for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not weights:
        if "param_groups" in loaded:
            raise UserError(f"{path} is an optimizer's state: give the weights.")
        keys = f" ({', '.join(map(str, list(loaded)[:8]))})" if loaded else ""
        raise UserError(
            f"{path} has no tensors at its top level{keys} nor under one of {', '.join(EMA_KEYS + WEIGHT_KEYS)}."
        )
    return weights, notes


def read_torch_object(path: Path) -> Any:
    """Reads a whole PyTorch file: tensors as `Tensor`, in the dicts and lists around them; foreign objects are inert.

    Raises UserError as `read_torch` does, but not for a file without weights.
    """
    torch = import_torch()

    def convert(name: str, value: Any) -> Any:
        """Returns a value with its tensors as `Tensor`; `name` says where it is, for errors."""
        if isinstance(value, torch.Tensor):
            return _as_tensor(torch, path, name, value.data)  # `data`: of a Parameter
        if isinstance(value, list | tuple):
            return [convert(f"{name}.{i}", one) for i, one in enumerate(value)]
        value = vars(value).get("parameters") if type(value).__module__ in PARAMETER_DICTS else value
        return {key: convert(f"{name}.{key}", one) for key, one in value.items()} if isinstance(value, dict) else value

    return convert("the file", _load_checked(torch, path))


def _load_checked(torch, path: Path) -> Any:
    """Loads a file's pickle after checks that it is one."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch.load decides; zipfile would also accept a zip after a pickle
    if is_zip and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated: its table of contents is missing. Copy it again.")
    if not is_zip and tarfile.is_tarfile(path):  # torch.load would unpack it
        raise UserError(f"{path} is a tar archive, not PyTorch weights.")
    return _load(torch, path, is_zip)


def _find_weights(torch, loaded: dict, ema: bool) -> tuple[dict, list[str]]:
    """Returns the dict of tensors in a checkpoint, and notes where it has both averages and weights."""
    found = {}
    for key in (*EMA_KEYS, *WEIGHT_KEYS):
        for inner in _nested(loaded.get(key)):
            if _has_tensors(torch, inner):
                found[key] = inner
                break
    averages, raw = ([key for key in keys if key in found] for keys in (EMA_KEYS, WEIGHT_KEYS))
    if averages and not raw and loaded.keys() & found[averages[0]].keys():  # the weights of the same names, not buffers
        raw, found[TOP_LEVEL] = [TOP_LEVEL], loaded
    order = averages + raw if ema else raw + averages
    if not order:
        return loaded, []
    notes = []
    if averages and raw:
        other = (raw if ema else averages)[0]
        hint = "; --no-ema chooses the latter" if ema else ""
        notes.append(f"used the weights under {order[0]!r}, not those under {other!r}{hint}")
    elif not ema:
        notes += [f"has only moving averages, under {key!r}" for key in averages[:1]]
    elif raw and (unnamed := next((key for key in EMA_KEYS if _is_filled(torch, loaded.get(key))), None)):
        notes.append(f"used the weights under {raw[0]!r}: the moving averages under {unnamed!r} have no names")
    return found[order[0]], notes


def _is_filled(torch, value: Any) -> bool:
    return isinstance(value, torch.Tensor) or bool(value)  # a tensor of several numbers has no truth value


def _nested(value: Any) -> Iterator[dict]:
    """Yields a dict and those under `INNER_KEYS` in it, three levels deep."""
    for _ in range(3):
        if not isinstance(value, dict):
            return
        yield value
        value = next((value[key] for key in INNER_KEYS if isinstance(value.get(key), dict)), None)


def _has_tensors(torch, values: dict) -> bool:
    return any(isinstance(value, torch.Tensor) and value.ndim for value in values.values())


def import_torch():
    """Imports torch. Raises UserError when it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "PyTorch is needed to read and write .pt, .bin and .ckpt files: pip install 'lavie_jax[convert]'"
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST:
        raise UserError(f"PyTorch {torch.__version__} is too old to read checkpoints safely: pip install 'torch>=2.6'")
    return torch


def _load(torch, path: Path, is_zip: bool):
    """Loads the file's pickle, with inert stand-ins for foreign classes."""
    containers: dict[str, type] = {}  # stand-ins that must behave like a dict or a list
    foreign = _foreign_globals(path, is_zip)
    while True:
        stand_ins = [_stand_in(name, containers.get(name)) for name in foreign]
        try:
            with torch.serialization.safe_globals(stand_ins), _path_for_torch(path) as given:
                return torch.load(given, map_location="cpu", weights_only=True, mmap=is_zip or None)
        except Exception as error:  # a damaged pickle can raise anything
            name = next((n for n in foreign if f"<class '{n}'>" in str(error) and n not in containers), None)
            if name is None:
                raise UserError(f"{path} cannot be read as a PyTorch file: {_reason(error)}") from error
            containers[name] = list if re.search("Can only (append to|extend) lists", str(error)) else OrderedDict


@contextmanager
def _path_for_torch(path: Path) -> Iterator[Path]:
    """Yields the path, or a link to it where its ending would make torch.load choose another reader."""
    if path.suffix != ".safetensors":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "weights.pt"
        link.symlink_to(path.resolve())
        yield link  # a mapped file stays mapped without its link


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


def _keep_parameters(self: Any, state: Any) -> None:
    """Restores the tensors of a ParameterDict, and nothing else of it."""
    self.parameters = state.get("_parameters") if isinstance(state, dict) else None


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
        "__setstate__": _keep_parameters if module in PARAMETER_DICTS else lambda self, state: None,
    }
    return type(qualname, (), body)


def _as_tensor(torch, path: Path, name: str, tensor) -> Tensor:
    dtypes = {getattr(torch, dtype.name): dtype for dtype in DTYPES.values() if dtype.name != "bool"}
    dtypes[torch.bool] = np.dtype(bool)
    if tensor.is_quantized or "float8" in str(tensor.dtype) or "float4" in str(tensor.dtype):
        raise UserError(f"{path} is quantized ({name} is {tensor.dtype}): give the float16, bfloat16 or float32 file.")
    if tensor.dtype not in dtypes or tensor.layout is not torch.strided:
        raise UserError(f"{path}: {name} is a {tensor.dtype} tensor ({tensor.layout}), which is not supported.")

    def read() -> np.ndarray:
        """Returns the values, without copying them."""
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
