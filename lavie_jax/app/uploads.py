"""Files that people upload: their size, and their kind by content.

The project's readers check pixels, colours, frame times and tensors. This module checks what matters for files of
strangers: decoders would also open playlists, which name other files, and PostScript, which is a program.
"""

import base64
import binascii
import re
import shutil
from pathlib import Path

from PIL import Image

from lavie_jax.errors import UserError

PICTURE, CLIP, LORA, EMBEDDING, MADE = "picture", "clip", "LoRA file", "embedding", "file"
MAX_PICTURE_PIXELS = 64e6
# The first bytes of the kinds that are read, and the ending under which each is stored.
_PICTURES = ((rb"\x89PNG\r\n", ".png"), (rb"\xff\xd8\xff", ".jpg"), (rb"RIFF....WEBP", ".webp"), (rb"GIF8", ".gif"),
             (rb"BM", ".bmp"), (rb"II\*\0|MM\0\*", ".tif"), (rb"....ftyp(avif|avis|mif1)", ".avif"))  # fmt: skip
_VIDEOS = ((rb"....(ftyp|moov|mdat|free|skip|wide|pnot)", ".mp4"), (rb"\x1a\x45\xdf\xa3", ".mkv"),
           (rb"RIFF....AVI ", ".avi"), (rb"GIF8", ".gif"), (rb"FLV\x01", ".flv"), (rb"\x00\x00\x01\xba", ".mpg"),
           (rb"\x47.{187}\x47", ".ts"), (rb"OggS", ".ogv"))  # fmt: skip
_ARRAYS = ((rb"PK\x03\x04", ".npz"),)
_TENSORS = ((rb".{7}\0\s*\{", ".safetensors"), (rb"PK\x03\x04|\x80[\x02-\x05]", ".pt"))
_MADE = ((rb"....ftyp", ".mp4"), (rb"GIF8", ".gif"), (rb"\x89PNG\r\n", ".png"), (rb"\s*\{", ".json"))
_KINDS = {PICTURE: _PICTURES, CLIP: (*_VIDEOS, *_ARRAYS), LORA: _TENSORS, EMBEDDING: _TENSORS, MADE: _MADE}
_ALLOWED = {
    PICTURE: "PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF",
    CLIP: "MP4, MOV, WebM, MKV, AVI, GIF, FLV, MPEG or an .npz with the array `video`",
    LORA: ".safetensors, .pt or .bin",
    EMBEDDING: ".safetensors, .pt or .bin",
    MADE: "the MP4, GIF, PNG or JSON file of a video that was made here or by sample.py",
}


def in_mib(count: float) -> str:
    """Returns a number of bytes in words."""
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def ending_of(path: Path, kind: str, most: int) -> str:
    """Returns the ending of a file by its content.

    Args:
        path: the file.
        kind: what it is to be: PICTURE, CLIP, LORA, EMBEDDING or MADE.
        most: the largest size, in bytes.

    Raises:
        UserError: it is too large or of another kind.
    """
    size = path.stat().st_size
    if size > most:
        raise UserError(f"The {kind} is too large: {in_mib(size)}, where at most {in_mib(most)} are allowed.")
    with path.open("rb") as file:
        head = file.read(256)
    ending = next((ending for pattern, ending in _KINDS[kind] if re.match(pattern, head, re.DOTALL)), None)
    if ending is None:
        raise UserError(f"The {kind} is not of a kind that can be read: give {_ALLOWED[kind]}.")
    if kind == PICTURE:
        _check_pixels(path)
    return ending


def _check_pixels(path: Path) -> None:
    """Raises UserError for a picture whose pixels would fill the memory, or that cannot be read."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except Exception as error:  # Pillow raises many types for broken and for huge pictures
        raise UserError(f"The picture cannot be read: {error}".replace(str(path), "it")) from error
    if width * height > MAX_PICTURE_PIXELS:
        raise UserError(
            f"The picture is too large: {width}x{height} pixels, where at most {MAX_PICTURE_PIXELS / 1e6:.0f} million "
            "are allowed."
        )


def keep(path: Path, folder: Path, name: str, kind: str, most: int) -> Path:
    """Copies an uploaded file to `folder` under a name of ours, with the ending of its content. Raises UserError."""
    ending = ending_of(path, kind, most)
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(path, folder / f"{name}{ending}"))


def decode(text: object, where: str, most: int) -> bytes:
    """Returns the bytes of a file in JSON: base64, alone or as a data URL. Raises UserError."""
    if not isinstance(text, str):
        raise UserError(f"{where} must be a file in base64, alone or as data:...;base64,...")
    head, comma, content = text.partition(",")
    content = content if comma and re.fullmatch(r"data:[\w.+/;=-]*;base64", head) else text
    if len(content) > most * 4 / 3 + 4:
        raise UserError(f"{where} is too large: at most {in_mib(most)} are allowed.")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where} is not base64; addresses of files are not read") from None
