"""Cutting files into chunks where their content says so, and packing chunks that zstd makes smaller.

Equal stretches of two files give equal chunks wherever they are, so what is equal is stored once. The cuts are
FastCDC's (Xia et al., "The Design of Fast Content Defined Chunking", IEEE TPDS 2020) with the sizes below: to change
one of them, or a store's average, is to store everything anew.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa
from pyfastcdc import FastCDC

from mlplat.errors import InvalidInput

#: The largest chunk of any store. The smallest of one is a quarter of its average, the largest four times as much.
MAX_CHUNK_BYTES = 16 * 1024 * 1024
_SPREAD = 4
#: Pieces that may wait to be hashed.
_HASH_AHEAD = 4
#: zstd is worth its time when it saves a fifth, which the first bytes of a chunk tell.
_SAMPLE_BYTES = 64 * 1024
_WORTH_IT = 0.8
_ZSTD = pa.Codec("zstd", compression_level=1)


def cut(pieces: Iterable[bytes], average: int) -> Iterator[memoryview]:
    """The chunks of a file that comes in pieces of any size.

    Large pieces are cut where they are, small ones are put together first: in memory are two pieces, or four of the
    largest chunks.

    Args:
        pieces: its bytes.
        average: bytes of a chunk, roughly.
    """
    largest = average * _SPREAD
    rest = memoryview(b"")
    for window in _windows(pieces, 2 * largest):
        size = len(rest)
        if size:  # where a chunk ends depends on what follows its start, up to the size of the largest
            ends = memoryview(b"".join((rest, window[:largest])))
            taken = yield from _cut_up_to(size, ends, average)
            window = window[taken - size :]  # noqa: PLW2901 - the part of it that is left
        taken = yield from _cut_up_to(len(window) - largest + 1, window, average)
        rest = window[taken:]
    yield from (chunk.data for chunk in _fastcdc(average).cut_buf(rest) if len(rest))


def _cut_up_to(end: int, window: memoryview, average: int) -> Generator[memoryview, None, int]:
    """The chunks that begin before ``end``; returns where the next one begins."""
    taken = 0
    if end > 0:
        for chunk in _fastcdc(average).cut_buf(window):
            if taken >= end:
                break
            taken += chunk.length
            yield chunk.data
    return taken


def _windows(pieces: Iterable[bytes], size: int) -> Iterator[memoryview]:
    """The same bytes in pieces of at least ``size``; the last one may be smaller."""
    waiting, count = list[bytes](), 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count >= size:
            yield memoryview(waiting[0] if len(waiting) == 1 else b"".join(waiting))
            waiting, count = [], 0
    if count:
        yield memoryview(b"".join(waiting))


def _fastcdc(average: int) -> FastCDC:
    return FastCDC(average, min_size=average // _SPREAD, max_size=average * _SPREAD)


class WholeHash:
    """The SHA-256 of a file that comes in pieces, computed in a thread beside whatever else is done with them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._waiting = deque[Future[None]]()

    def of(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces."""
        with self._pool:
            for piece in pieces:
                self._waiting.append(self._pool.submit(self._hash.update, piece))
                if len(self._waiting) > _HASH_AHEAD:
                    self._waiting.popleft().result()
                yield piece

    def hexdigest(self) -> str:
        """The digest, once all pieces have been taken."""
        return self._hash.hexdigest()


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


def unpack_all(packed: bytes) -> bytes:
    """What was packed, whatever its size, up to that of the largest chunk.

    Raises:
        InvalidInput: it is something else.
    """
    try:
        with pa.input_stream(pa.BufferReader(packed), compression="zstd") as stream:
            body: bytes = stream.read(MAX_CHUNK_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"not compressed with zstd: {error}") from error
    return body


def _is_worth_it(sample: bytes | memoryview) -> bool:
    return len(_ZSTD.compress(sample, asbytes=True)) <= len(sample) * _WORTH_IT
