"""Metadata inside mp4, gif and png files: a title, a comment, and an XMP packet. The pictures do not change."""

import dataclasses
import os
import struct
from pathlib import Path

from PIL import Image, PngImagePlugin

XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")  # the UUID of XMP in mp4 (XMP specification, part 3)
XMP_CHUNK = "XML:com.adobe.xmp"  # likewise the keyword in png
XMP_GIF = b"XMP DataXMP"
_GIF_TRAILER = bytes([1, *range(255, -1, -1), 0])  # ends the packet for readers that expect blocks with lengths


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Texts about a file that its format stores; "" for what is not stored.

    Attributes:
        xmp: an XMP packet.
        title: shown by players.
        comment: any text.
    """

    xmp: str
    title: str = ""
    comment: str = ""

    @property
    def tags(self) -> dict[str, str]:
        """Title and comment, if they are stored."""
        return {name: value for name, value in (("title", self.title), ("comment", self.comment)) if value}

    def png_chunks(self) -> PngImagePlugin.PngInfo:
        """The chunks for Pillow to write."""
        chunks = PngImagePlugin.PngInfo()
        for name, value in self.tags.items():
            chunks.add_itxt(name.title(), value)
        chunks.add_itxt(XMP_CHUNK, self.xmp)
        return chunks


def add_xmp_to_mp4(path: Path, xmp: str) -> None:
    """Appends a box with an XMP packet, which moves nothing else in the file."""
    packet = xmp.encode()
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 24 + len(packet), b"uuid") + XMP_BOX + packet)


def add_xmp_to_gif(path: Path, xmp: str) -> None:
    """Inserts an application extension with an XMP packet before the first frame."""
    content = path.read_bytes()
    flags = content[10]
    start = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)  # behind the header and the global colour table
    extension = b"\x21\xff\x0b" + XMP_GIF + xmp.encode() + _GIF_TRAILER
    path.write_bytes(content[:start] + extension + content[start:])


def read_metadata(path: Path) -> Metadata | None:
    """Returns the metadata of an mp4, gif or png file, or of the first picture in a folder. None if it has no XMP.

    Raises:
        OSError: the file cannot be read.
    """
    if path.is_dir():
        path = min(path.glob("*.png"), default=path)
    if path.suffix.lower() == ".mp4":
        xmp, tags = _mp4_xmp(path), _mp4_tags(path)
    else:
        try:
            with Image.open(path) as image:
                info = image.info
        except Image.DecompressionBombError as error:
            raise OSError(f"{path} has too many pixels: {error}") from error
        gif = image.format == "GIF"
        xmp = _gif_xmp(path) if gif else info.get(XMP_CHUNK, "")
        comment = info.get("comment", b"") if gif else info.get("Comment", "")
        tags = {"title": info.get("Title", ""), "comment": comment}
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in (xmp, *map(tags.get, _NAMES))]
    return Metadata(*texts) if texts[0] else None


_NAMES = ("title", "comment")


def _mp4_tags(path: Path) -> dict[str, str]:
    import av  # PyAV is needed only to read or write video files

    try:
        with av.open(os.fspath(path)) as container:
            return {name: container.metadata.get(name, "") for name in _NAMES}
    except av.error.FFmpegError as error:
        raise OSError(f"{path} cannot be read: {error}") from error


def _gif_xmp(path: Path) -> bytes:
    return path.read_bytes().partition(XMP_GIF)[2].partition(_GIF_TRAILER)[0]


def _mp4_xmp(path: Path) -> str:
    """The packet in a box of the file's top level."""
    end = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            start = file.tell() - 8
            if size == 1:
                size = int.from_bytes(file.read(8))
            if size < 8 or start + size > end:  # the last box, or a damaged file
                break
            if kind == b"uuid" and file.read(16) == XMP_BOX:
                return file.read(start + size - file.tell()).decode()
            file.seek(start + size)
    return ""
