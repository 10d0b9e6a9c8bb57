"""Reads the tensors of TorchScript archives (`torch.jit.save`) without running them, and without torch.

An archive contains a pickle of its modules' attributes, the bytes of its tensors, and code, which is ignored. The
pickle's modules become objects that only keep their attributes. Every name that a plain archive does not need is
refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lavie_jax.errors import UserError
from lavie_jax.weights.safetensors_io import Tensor

STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class _Storage(NamedTuple):
    """The bytes of tensors in the archive, unread."""

    key: str
    dtype: np.dtype
    count: int


class _Module:
    """Stands for a module of the archive, whatever its class."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    with path.open("rb") as file:  # a zip archive after a pickle is for torch.load, which reads the pickle
        if file.read(4) != b"PK\x03\x04" or not zipfile.is_zipfile(path):
            return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of an archive, unread, under the names of its `state_dict`.

    Raises:
        UserError: the archive is damaged, would run anything, or has no tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            with archive.open(data) as file:
                root = _Unpickler(file, path, data.removesuffix("/data.pkl")).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} cannot be read as a TorchScript archive: {type(error).__name__}: {error}") from error
    tensors = dict(_walk(root, ""))
    if not tensors:
        raise UserError(f"{path} is a TorchScript archive without tensors.")
    return tensors


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    attributes = value.attributes if isinstance(value, _Module) else value
    for name, inner in attributes.items() if isinstance(attributes, dict) else ():
        if isinstance(inner, Tensor):
            yield f"{prefix}{name}", inner
        elif isinstance(inner, _Module):
            yield from _walk(inner, f"{prefix}{name}.")


class _Unpickler(pickle.Unpickler):
    """An unpickler of an archive's modules and tensors."""

    def __init__(self, file: Any, path: Path, folder: str):
        super().__init__(file, encoding="utf-8")
        self._path, self._folder = path, folder

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a name. Raises UserError for names that a plain archive does not need."""
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("torch", "device"): lambda *_: None,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
        }
        if (module, name) not in known:
            raise UserError(
                f"{self._path} was refused: it would run {module}.{name}. Weights need no code; do not trust this file."
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage that ("storage", type, key, device, count) refers to."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise UserError(f"{self._path} refers to {kind!r}, which is not a tensor's storage.")
        return _Storage(str(key), dtype, int(count))

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> Tensor:
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        reach = offset + sum((n - 1) * s for n, s in zip(shape, stride)) if all(shape) else offset - 1
        if min((offset, *stride), default=0) < 0 or len(shape) != len(stride) or reach >= storage.count:
            raise UserError(f"{self._path} is damaged: a tensor of shape {shape} reaches beyond its storage.")
        path, member = self._path, f"{self._folder}/data/{storage.key}"

        def read() -> np.ndarray:
            """Reads the values."""
            with zipfile.ZipFile(path) as archive:
                try:
                    content = archive.read(member)
                except (KeyError, zipfile.BadZipFile) as error:
                    raise UserError(f"{path} is damaged: {member} cannot be read.") from error
            if len(content) < storage.count * storage.dtype.itemsize:
                raise UserError(f"{path} is damaged: {member} is too short.")
            flat = np.frombuffer(content, storage.dtype, storage.count)[offset:]
            strides = tuple(s * storage.dtype.itemsize for s in stride)
            return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

        return Tensor(shape, storage.dtype, read)
