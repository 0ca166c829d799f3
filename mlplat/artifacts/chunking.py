"""Cutting files into chunks where their content says so, and packing chunks that zstd makes smaller.

Equal stretches of two files give equal chunks wherever they are, so what is equal is stored once. The cuts are
FastCDC's (Xia et al., "The Design of Fast Content Defined Chunking", IEEE TPDS 2020) with the parameters below: to
change one of them is to store everything anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import pyarrow as pa
from pyfastcdc import FastCDC

from mlplat.errors import InvalidInput

MIN_CHUNK_BYTES = 256 * 1024
AVERAGE_CHUNK_BYTES = 1024 * 1024
MAX_CHUNK_BYTES = 4 * 1024 * 1024
#: Bytes that are looked at together: a cut is certain when a chunk's greatest length lies behind its start.
_WINDOW_BYTES = 2 * MAX_CHUNK_BYTES
#: zstd is worth its time when it saves a fifth, which the first bytes of a chunk tell.
_SAMPLE_BYTES = 64 * 1024
_WORTH_IT = 0.8
_ZSTD = pa.Codec("zstd", compression_level=1)


def sha256(body: bytes | bytearray | memoryview) -> str:
    """The SHA-256 of bytes, in hex."""
    return hashlib.sha256(body).hexdigest()


def cut(body: bytes | memoryview) -> Iterator[memoryview]:
    """The chunks of a whole file, as views of it."""
    if len(body):
        for chunk in _fastcdc().cut_buf(body):
            yield chunk.data


def cut_stream(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks of a file that comes in pieces of any size; holds at most about two of the largest chunks."""
    window = bytearray()
    for piece in pieces:
        window += piece
        if len(window) >= _WINDOW_BYTES:
            yield from _certain(window)
    yield from (bytes(chunk) for chunk in cut(bytes(window)))


def _certain(window: bytearray) -> Iterator[bytes]:
    body = bytes(window)
    taken = 0
    for chunk in cut(body):
        if len(body) - taken < MAX_CHUNK_BYTES:
            break
        taken += len(chunk)
        yield bytes(chunk)
    del window[:taken]


def _fastcdc() -> FastCDC:
    return FastCDC(AVERAGE_CHUNK_BYTES, min_size=MIN_CHUNK_BYTES, max_size=MAX_CHUNK_BYTES)


def pack(body: bytes | memoryview) -> bytes | None:
    """The bytes compressed, None when that saves less than a fifth."""
    if len(body) > 2 * _SAMPLE_BYTES and not _is_worth_it(body[:_SAMPLE_BYTES]):
        return None
    packed: bytes = _ZSTD.compress(body, asbytes=True)
    return packed if len(packed) <= len(body) * _WORTH_IT else None


def unpack(packed: bytes | memoryview, size: int) -> bytes:
    """What was packed: ``size`` bytes, and no byte more is ever made.

    Raises:
        InvalidInput: it is something else.
    """
    try:
        body: bytes = _ZSTD.decompress(packed, decompressed_size=size, asbytes=True)
    except OSError as error:
        raise InvalidInput(f"not {size} bytes compressed with zstd: {error}") from error
    return body


def _is_worth_it(sample: bytes | memoryview) -> bool:
    return len(_ZSTD.compress(sample, asbytes=True)) <= len(sample) * _WORTH_IT
