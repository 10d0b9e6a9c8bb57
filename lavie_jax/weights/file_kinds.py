"""Recognizes the format of a weights file by its content, because endings are often wrong.

Files that are neither PyTorch's nor safetensors (a web page instead of a download, archives, other frameworks) are
refused in one line that names what they are.
"""

import re
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

from lavie_jax.errors import UserError

Format = Literal["safetensors", "torch"]

HEAD = 512  # bytes that are read to recognize a file
MAX_SAFETENSORS_HEADER = 100 << 20  # the reference implementation's limit
LFS_POINTER = b"version https://git-lfs"  # start of the small file that Git LFS leaves in place of a large one
ZIP = b"PK\x03\x04"

UNPACK = "unpack it and give the file inside"
EXPORTED = "give the original PyTorch or safetensors file"
MAGIC: tuple[tuple[bytes, str, str], ...] = (  # start of a file, what it is, what to do
    (b"\x1f\x8b", "compressed with gzip", UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (b"\xfd7zXZ\x00", "compressed with xz", UNPACK),
    (b"BZh", "compressed with bzip2", UNPACK),
    (b"\x04\x22\x4d\x18", "compressed with lz4", UNPACK),
    (b"PK\x05\x06", "an empty zip archive", "download or copy it again"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!", "a RAR archive", UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras or TensorFlow)", EXPORTED),
    (b"GGUF", "a quantized GGUF file", "give the float16, bfloat16 or float32 file"),
    *((magic, "a quantized GGML file", "give the float16, bfloat16 or float32 file")
      for magic in (b"lmgg", b"tjgg", b"fmgg")),
    (b"\x93NUMPY", "a numpy array", EXPORTED),
    (b"\x89PNG", "a PNG picture", EXPORTED),
    (b"\xff\xd8\xff", "a JPEG picture", EXPORTED),
    (b"%PDF", "a PDF document", EXPORTED),
)  # fmt: skip
SUFFIXES = {  # endings of formats without a reliable magic number
    ".onnx": "an ONNX model",
    ".msgpack": "a Flax file (msgpack)",
    ".pb": "a TensorFlow graph",
    ".h5": "a Keras or TensorFlow file",
    ".keras": "a Keras file",
    ".tflite": "a TensorFlow Lite model",
    ".mlmodel": "a Core ML model",
    ".engine": "a TensorRT engine",
    ".plan": "a TensorRT engine",
}


def file_format(path: Path) -> Format:
    """Returns the format of a weights file.

    A file that is not recognized has the format of its ending, whose reader then reports what is wrong with it.

    Raises:
        UserError: the file is empty, or of a kind that is known and cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        raise UserError(f"{path} is empty; download or copy it again.")
    if head.startswith(LFS_POINTER):
        raise UserError(f"{path} is a Git LFS pointer without the weights: run git lfs pull in its repository.")
    if int.from_bytes(head[:8], "little") <= MAX_SAFETENSORS_HEADER and head[8:9] == b"{":
        return "safetensors"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # a pickle and its protocol
        return "torch"
    if head.startswith(ZIP):
        _check_zip(path)
        return "torch"
    if not any(head):
        raise _other(path, "filled with zeros at its start", "its download did not finish; download or copy it again")
    for magic, what, advice in MAGIC:
        if head.startswith(magic):
            raise _other(path, what, advice)
    if tarfile.is_tarfile(path):  # torch.load would unpack it, and torch before 2.6 could run code in it
        raise _other(path, "a tar archive", f"PyTorch's format of before 2017 is not supported; otherwise {UNPACK}")
    _check_other_bytes(path, head)
    if path.suffix.lower() in SUFFIXES:
        raise _other(path, SUFFIXES[path.suffix.lower()], EXPORTED)
    return "safetensors" if path.suffix == ".safetensors" else "torch"


def _other(path: Path, what: str, advice: str) -> UserError:
    return UserError(f"{path} is {what}, not PyTorch or safetensors weights: {advice}.")


def _check_zip(path: Path) -> None:
    """Raises UserError for a zip archive that PyTorch did not write. A truncated one is left to the reader."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged ({error}); download or copy it again.") from error
    if any(name.endswith("data.pkl") for name in names):
        return
    if names and all(name.endswith(".npy") for name in names):
        raise _other(path, "a numpy archive (.npz)", EXPORTED)
    if any(name.endswith(".h5") for name in names):
        raise _other(path, "a Keras file", EXPORTED)
    shown = f", such as {names[0]}" if names else ""
    raise _other(path, f"a zip archive of {len(names)} files{shown}", UNPACK)


def _check_other_bytes(path: Path, head: bytes) -> None:
    """Raises UserError for text, and for binary formats that have no fixed magic number."""
    if head[4:8] == b"TFL3":
        raise _other(path, SUFFIXES[".tflite"], EXPORTED)
    version, field = head[1:2], head[2:3]
    if head[0] == 0x08 and b"\x00" < version < b"\x40" and field and field in b"\x12\x1a\x22\x3a\x42":
        raise _other(path, SUFFIXES[".onnx"], EXPORTED)
    small_map, large_map = 0x80 < head[0] < 0x90, head[0] in (0xDE, 0xDF)
    key = {True: head[1:2], False: head[3:4] if head[0] == 0xDE else head[5:6]}[small_map]
    if (small_map or large_map) and key and (0xA0 <= key[0] <= 0xBF or key[0] == 0xD9):
        raise _other(path, SUFFIXES[".msgpack"], EXPORTED)
    text = _text(head)
    if text is None:
        return
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        raise _other(path, "an HTML page", "the download was answered with a web page (an error, or a login)")
    shown = f"it begins with {' '.join(text.split())[:60]!r}"
    if start.startswith("<"):
        raise _other(path, "an XML file", f"{shown}; download it again")
    if start.startswith(("{", "[")):
        raise _other(path, "a JSON file", f"{shown}; give the weights")
    if len(start.split()) > 1 and not re.match(r"[(cl}\]]\S*\n", start):  # not a pickle of protocol 0, which is ASCII
        raise _other(path, "a text file", f"{shown}; download it again")


def _text(head: bytes) -> str | None:
    """The start of a text file, None for a binary one."""
    for encoding in ("utf-16",) if head[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig",):
        try:
            text = head[: len(head) // 4 * 4].decode(encoding, errors="ignore" if len(head) == HEAD else "strict")
        except UnicodeDecodeError:
            return None
        return text if all(c.isprintable() or c in "\r\n\t" for c in text) else None
    return None
