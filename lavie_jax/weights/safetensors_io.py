"""Reads and writes .safetensors one tensor at a time, so that files may be larger than memory.

The format (https://github.com/huggingface/safetensors): the header's length as a little-endian u64, a JSON header
{name: {dtype, shape, data_offsets}}, then the bytes of all tensors, row-major and without gaps. Unlike the safetensors
package with numpy, this reader supports bfloat16 and maps the file, and this writer holds one tensor at a time.
"""

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from lavie_jax.errors import UserError
from lavie_jax.weights.file_kinds import MAX_SAFETENSORS_HEADER

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 20  # elements checked at a time, which fit in the processor's cache
SHOW_PROGRESS_FROM = 256 << 20  # bytes; smaller files take no noticeable time


@dataclass(frozen=True)
class Tensor:
    """A tensor that is read when needed. It can be transposed and reshaped like an array before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def transpose(self, axes: tuple[int, ...]) -> "Tensor":
        """Returns the tensor with permuted axes."""
        return Tensor(tuple(self.shape[a] for a in axes), self.dtype, lambda: self.read().transpose(axes))

    def reshape(self, shape: tuple[int, ...]) -> "Tensor":
        """Returns the tensor with another shape of the same size."""
        return Tensor(tuple(shape), self.dtype, lambda: self.read().reshape(shape))


def as_tensor(array) -> Tensor:
    """Wraps a numpy or jax array as a `Tensor`; a `Tensor` is returned unchanged."""
    if isinstance(array, Tensor):
        return array
    return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file, in its order, and its metadata. Only the header is read; the rest is mapped.

    Raises:
        UserError: the file is truncated, is not a safetensors file, or has an unsupported dtype.
    """
    size = path.stat().st_size
    header = _read_header(path, size)
    metadata = header.pop("__metadata__")
    start = size - max((info["data_offsets"][1] for info in header.values()), default=0)
    mapped = np.memmap(path, np.uint8, "r") if size > start else np.zeros(size, np.uint8)

    def tensor(info) -> Tensor:
        shape, dtype = tuple(info["shape"]), DTYPES[info["dtype"]]
        begin, end = (start + offset for offset in info["data_offsets"])
        return Tensor(shape, dtype, lambda: np.asarray(mapped[begin:end]).view(dtype).reshape(shape))

    return {name: tensor(info) for name, info in header.items()}, metadata


def _read_header(path: Path, size: int) -> dict:
    """Reads and checks the header of a safetensors file of `size` bytes."""
    broken = f"{path} is not a safetensors file"
    with path.open("rb") as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            raise UserError(f"{broken}: it has only {size} bytes.")
        (length,) = struct.unpack("<Q", length_bytes)
        if length > MAX_SAFETENSORS_HEADER:
            raise UserError(f"{broken}: its header would have {length} bytes.")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path} is truncated: it has {size} bytes, but its header alone needs {8 + length}.")
    try:
        header = json.loads(text)
        entries = sorted((v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"])
        end = 0
        for info in entries:
            if info["dtype"] not in DTYPES:
                if re.match(r"F\d", str(info["dtype"])):  # float8, float4, ...
                    raise UserError(
                        f"{path} is quantized ({info['dtype']}): give the float16, bfloat16 or float32 file."
                    )
                raise UserError(f"{path}: dtype {info['dtype']!r} is not supported. Allowed: {', '.join(DTYPES)}")
            nbytes = int(np.prod(info["shape"], dtype=np.int64)) * DTYPES[info["dtype"]].itemsize
            if info["data_offsets"] != [end, end + nbytes]:
                raise UserError(f"{broken}: its tensors overlap or have gaps between them.")
            end += nbytes
        metadata = header.setdefault("__metadata__", {})
        header["__metadata__"] = {name: str(value) for name, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{broken}: its header cannot be read ({error}).") from error
    if size != 8 + length + end:
        what = "is truncated" if size < 8 + length + end else "has extra bytes at its end"
        raise UserError(f"{path} {what}: it has {size} bytes, not the {8 + length + end} of its header. Copy it again.")
    return header


def write_safetensors(path: Path, tensors: Mapping[str, object], metadata: Mapping[str, str]) -> None:
    """Writes arrays or `Tensor`s, one at a time, in the given order (but wider dtypes first, for alignment).

    Raises:
        UserError: a tensor has NaN or Inf. A partial file is left behind: callers write under a temporary name.
    """
    ordered = sorted(((name, as_tensor(t)) for name, t in tensors.items()), key=lambda item: -item[1].dtype.itemsize)
    header, end = ({"__metadata__": dict(metadata)} if metadata else {}), 0
    for name, tensor in ordered:
        if tensor.dtype not in NAMES:
            raise UserError(f"{name}: dtype {tensor.dtype} is not supported. Allowed: {', '.join(DTYPES)}")
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    quiet = end < SHOW_PROGRESS_FROM
    with (
        path.open("wb") as file,
        tqdm(total=end, unit="B", unit_scale=True, desc="writing", disable=quiet) as bar,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            array = np.ascontiguousarray(tensor.read())  # a transposed view would be written in the wrong order
            if array.shape != tensor.shape and tensor.shape:  # ascontiguousarray makes a scalar one-dimensional
                raise ValueError(f"{name} has shape {array.shape}, but its Tensor {tensor.shape}")
            check_finite(name, array)
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
            bar.update(tensor.nbytes)


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises UserError when a floating-point array has NaN or Inf."""
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
    if array.dtype.name not in exponent:
        return
    mask = exponent[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    for i in range(0, bits.size, CHUNK):
        if ((bits[i : i + CHUNK] & mask) == mask).any():  # all exponent bits set: NaN or Inf
            raise UserError(f"{name} has NaN or Inf. The weights are damaged; download or copy them again.")
