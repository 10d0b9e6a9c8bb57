"""Lists the members of a tar file, which may be several concatenated tars.

Data sets have tens of millions of members, so plain headers are parsed here, several times as fast as tarfile does.
Archives with other headers are left to tarfile.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_PAX = {b"path", b"size", b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its content is."""

    name: str
    offset: int
    size: int


class _Unusual(Exception):
    """A header that tarfile should parse."""


def archives(file: BinaryIO) -> Iterator[list[Member]]:
    """Yields the members of each archive in a file.

    Raises:
        tarfile.TarError: the file is truncated, damaged or not a tar.
    """
    start, end = 0, os.fstat(file.fileno()).st_size
    while True:
        try:
            members, offset = _plain(file, start)
        except (_Unusual, ValueError):
            members, offset = _by_tarfile(file, start)
        yield members
        file.seek(offset)
        while (block := file.read(BLOCK)) == _ZEROS:
            pass
        start = file.tell() - len(block)
        if not block.strip(b"\0") or start >= end:
            return
        if len(block) < BLOCK:
            raise tarfile.ReadError(f"the data after its end, at byte {start}, are not a tar")


def is_header(block: bytes) -> bool:
    """Whether a block is a member's header, by its checksum."""
    try:
        return int(block[148:156].strip(b" \0"), 8) == 256 + sum(block) - sum(block[148:156])
    except ValueError:
        return False


def _plain(file: BinaryIO, offset: int) -> tuple[list[Member], int]:
    """Returns the members of an archive with plain headers only, and the position of its end mark."""
    members: list[Member] = []
    fields: dict[bytes, bytes] = {}
    descriptor = file.fileno()
    while (block := os.pread(descriptor, BLOCK, offset)) != _ZEROS:
        if len(block) < BLOCK or not is_header(block):
            raise _Unusual
        size, kind, at = int(block[124:136].strip(b" \0") or b"0", 8), block[156:157], offset + BLOCK
        if kind == b"x":
            fields = _pax_fields(os.pread(descriptor, size, at))
        elif kind in (b"0", b"\0"):
            name = block[:100].partition(b"\0")[0]
            if block[257:263] == b"ustar\0" and block[345]:
                name = block[345:500].partition(b"\0")[0] + b"/" + name
            name, size = fields.get(b"path", name), int(fields.get(b"size", size))
            if kind == b"\0" and name.endswith(b"/"):  # a folder, in old tars
                raise _Unusual
            members.append(Member(name.decode("utf-8", "surrogateescape"), at, size))
            fields = {}
        elif kind == b"5":
            size, fields = 0, {}
        else:
            raise _Unusual
        offset = at + -(-size // BLOCK) * BLOCK
    return members, offset


def _pax_fields(content: bytes) -> dict[bytes, bytes]:
    """Returns the fields of an extended header, a sequence of "LENGTH KEY=VALUE\\n"."""
    fields: dict[bytes, bytes] = {}
    while content:
        length, _, _ = content.partition(b" ")
        record, content = content[len(length) + 1 : int(length)], content[int(length) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        if key not in _PAX or not int(length):
            raise _Unusual
        fields[key] = value
    return fields


def _by_tarfile(file: BinaryIO, start: int) -> tuple[list[Member], int]:
    """Does the same as `_plain` for any archive."""
    file.seek(start)
    members = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # tarfile would keep them all  # ty: ignore[missing-attribute]
            if member.isreg() and not member.issparse():
                members.append(Member(member.name, member.offset_data, member.size))
        # tarfile stops at a truncated or damaged header as if it were the end; the true end is a block of zeros.
        file.seek(tar.offset)
        if file.read(BLOCK) != _ZEROS:
            raise tarfile.ReadError(f"it ends at byte {tar.offset} without an end mark")
        return members, tar.offset
