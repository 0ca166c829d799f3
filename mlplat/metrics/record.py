"""The log's record: the batches of a group as they arrived, compressed together.

Layout: the magic, the number of batches, the length of each, then one zstd frame of all of them.
Joining raw bytes costs a quarter of what merging their tables and compressing column by column does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pyarrow as pa

_MAGIC = b"MLR1"
#: What every Arrow IPC stream begins with; schema 0001 logged bare streams.
_ARROW = b"\xff\xff\xff\xff"
_CODEC = pa.Codec("zstd", compression_level=1)


def pack(batches: Sequence[bytes]) -> bytes:
    """The record of a group of batches."""
    head = struct.pack(f"<4sI{len(batches)}I", _MAGIC, len(batches), *map(len, batches))
    frame: bytes = _CODEC.compress(b"".join(batches), asbytes=True)
    return head + frame


def unpack(record: bytes) -> list[bytes]:
    """The batches in a record.

    Raises:
        ValueError: not a record.
    """
    if record.startswith(_ARROW):
        return [record]
    if not record.startswith(_MAGIC):
        raise ValueError(f"not a record of the metric log: it begins with {record[:4]!r}")
    (count,) = struct.unpack_from("<I", record, 4)
    sizes = struct.unpack_from(f"<{count}I", record, 8)
    frame = memoryview(record)[8 + 4 * count :]
    joined = memoryview(_CODEC.decompress(frame, decompressed_size=sum(sizes), asbytes=True))
    batches, start = [], 0
    for size in sizes:
        batches.append(bytes(joined[start : start + size]))
        start += size
    return batches
