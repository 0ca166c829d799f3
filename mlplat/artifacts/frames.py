"""Chunks on the wire: each with its SHA-256 and size, compressed where that pays."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mlplat.artifacts.chunking import MAX_CHUNK_BYTES
from mlplat.errors import InvalidInput

MEDIA_TYPE = "application/vnd.mlplat.chunks"
#: SHA-256, bytes of the chunk, bytes that follow; fewer bytes follow when they are compressed with zstd.
_HEAD = struct.Struct(">32sII")


class Frame(NamedTuple):
    """A chunk: its SHA-256 in hex, its size in bytes, and its bytes, compressed when they are fewer."""

    sha256: str
    size: int
    stored: bytes | memoryview


def encode_frame(frame: Frame) -> tuple[bytes, bytes | memoryview]:
    """Head and bytes of a frame."""
    return _HEAD.pack(bytes.fromhex(frame.sha256), frame.size, len(frame.stored)), frame.stored


def decode_frames(pieces: Iterable[bytes]) -> Iterator[Frame]:
    """The frames of a body that comes in pieces; holds one at a time.

    Raises:
        InvalidInput: it is no series of frames, or a chunk is larger than chunks are.
    """
    body = _Body(pieces)
    while head := body.take(_HEAD.size):
        digest, size, count = _HEAD.unpack(head)
        if not 0 < count <= size <= MAX_CHUNK_BYTES:
            raise InvalidInput(f"a chunk of {size} bytes in {count}; chunks have at most {MAX_CHUNK_BYTES} bytes")
        yield Frame(digest.hex(), size, body.take(count, is_last=False))


class _Body:
    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")

    def take(self, count: int, *, is_last: bool = True) -> bytes:
        """The next ``count`` bytes; none at the end, where the body may be over if ``is_last``."""
        parts, left = list[memoryview](), count
        while left:
            if not self._piece:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._piece = memoryview(piece)
            parts.append(self._piece[:left])
            self._piece = self._piece[left:]
            left -= len(parts[-1])
        if left and not (is_last and left == count):
            raise InvalidInput("the last chunk is not complete")
        return b"".join(parts)
