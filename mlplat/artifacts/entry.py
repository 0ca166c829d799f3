"""What the store keeps under a file's path: the file itself when it is small, else which chunks it consists of.

An entry begins with a line of ``HEADER_BYTES`` bytes: a name and version of the format, the kind, the file's size and
its SHA-256. A small file follows as it is, a larger one as a JSON list of its chunks. Entries replace one another as
a whole, so a path has one complete file or another at any moment, and chunks never change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from mlplat.artifacts.chunking import MAX_CHUNK_BYTES
from mlplat.artifacts.digests import sha256
from mlplat.errors import InvalidInput

HEADER_BYTES = 128
#: Files up to this size are in their entries.
INLINE_BYTES = 64 * 1024
#: An entry with at most as many bytes of its own has its file inside, so that listings need not look. Others are
#: longer, filled up with spaces where necessary.
SURE_BYTES = 4 * 1024
_HEADER = re.compile(rb"mlplat-artifact 1 (inline|chunks) (\d{1,18}) ([0-9a-f]{64}) *\n\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_SUFFIX = re.compile(r"(\.zst)?(\.[1-9]\d{0,8})?\Z", re.ASCII)


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A part of a file: the SHA-256 and size of its bytes, and the suffix of the blob that has them."""

    sha256: str
    size: int
    suffix: str = ""


@dataclass(frozen=True)
class Header:
    """The first line of an entry."""

    size: int
    sha256: str
    is_inline: bool


@dataclass(frozen=True)
class Entry:
    """A file: its size in bytes, its SHA-256 in hex, and its bytes or the chunks that have them, in order."""

    size: int
    sha256: str
    body: bytes | None
    chunks: tuple[Chunk, ...] = ()


def encode(entry: Entry) -> bytes:
    """The entry as an object."""
    kind = b"chunks" if entry.body is None else b"inline"
    header = b"mlplat-artifact 1 %b %d %b" % (kind, entry.size, entry.sha256.encode())
    header = header.ljust(HEADER_BYTES - 1) + b"\n"
    if entry.body is not None:
        return header + entry.body
    return (header + msgspec.json.encode(entry.chunks)).ljust(HEADER_BYTES + SURE_BYTES + 1)


def decode_header(start: bytes) -> Header:
    """The header that an object begins with.

    Raises:
        InvalidInput: it is damaged.
    """
    found = _HEADER.match(start[:HEADER_BYTES])
    if found is None:
        raise InvalidInput("its header is damaged")
    return Header(int(found[2]), found[3].decode(), found[1] == b"inline")


def decode(stored: bytes) -> Entry:
    """The entry of an object.

    Raises:
        InvalidInput: it is damaged.
    """
    header = decode_header(stored)
    rest = stored[HEADER_BYTES:]
    if header.is_inline:
        if len(rest) != header.size:
            raise InvalidInput(f"it has {len(rest)} bytes and had {header.size}")
        if sha256(rest) != header.sha256:
            raise InvalidInput("its bytes have another SHA-256")
        return Entry(header.size, header.sha256, rest)
    try:
        chunks = msgspec.json.decode(rest, type=tuple[Chunk, ...])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("its list of chunks is damaged") from error
    check_chunks(chunks, header.size)
    return Entry(header.size, header.sha256, None, chunks)


def check_chunks(chunks: Sequence[Chunk], size: int) -> None:
    """Raises:
    InvalidInput: a digest or suffix is none, a chunk is larger than chunks are, or the sizes do not add up.
    """
    for chunk in chunks:
        check_digest(chunk.sha256)
        if not _SUFFIX.match(chunk.suffix):
            raise InvalidInput(f"not a suffix of a blob: {chunk.suffix[:80]!r}")
        if not 0 < chunk.size <= MAX_CHUNK_BYTES:
            raise InvalidInput(f"a chunk with {chunk.size} bytes; chunks have at most {MAX_CHUNK_BYTES} bytes")
    if sum(chunk.size for chunk in chunks) != size:
        raise InvalidInput(f"the chunks have {sum(chunk.size for chunk in chunks)} bytes and the file {size}")


def check_digest(digest: str) -> str:
    """The digest.

    Raises:
        InvalidInput: it is none.
    """
    if not _DIGEST.match(digest):
        raise InvalidInput(f"not a SHA-256 in hex: {digest[:80]!r}")
    return digest
