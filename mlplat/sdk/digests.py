"""Digests of data: the same data has the same digest in every process, and finding it has a bounded cost.

The rule for what is read: up to ``SAMPLE_ROWS`` rows (or ``SAMPLE_BYTES`` bytes of a file) all of it; of more,
``BLOCKS`` blocks spread evenly from the first row (byte) to the last. Names, types, the shape and the number
of rows (bytes) always count. So a change between the blocks of very large data may go unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mlplat.errors import InvalidInput

SAMPLE_ROWS = 100_000
SAMPLE_BYTES = 64 * 1024 * 1024
BLOCKS = 16
MAX_FILES = 10_000
#: MLflow allows 36 characters.
DIGEST_LENGTH = 32


def table_digest(table: pa.Table) -> str:
    """Of an Arrow table. Chunks, slices, dictionaries and the width of offsets make no difference."""
    hashed = hashlib.sha256(f"table {table.num_rows}".encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        pieces = [plain(column.slice(start, size)) for start, size in blocks(table.num_rows, SAMPLE_ROWS)]
        kind = pieces[0].type if pieces else plain(column).type
        hashed.update(f"\0{name}\0{kind}\0".encode())
        for piece in pieces:
            _update(hashed, piece)
    return hashed.hexdigest()[:DIGEST_LENGTH]


def array_digest(array: Any) -> str:
    """Of a numpy array; its byte order and memory layout make no difference."""
    shape = tuple(int(size) for size in array.shape)
    rows = shape[0] if shape else 1
    values = array if shape else array.reshape(1)
    kind = array.dtype.newbyteorder("<") if hasattr(array.dtype, "newbyteorder") else array.dtype
    hashed = hashlib.sha256(f"array {shape} {kind}".encode())
    per_row = max(1, int(array.size) // max(1, rows))
    for start, size in blocks(rows, max(BLOCKS, SAMPLE_ROWS * 16 // per_row)):
        part = values[start : start + size]
        if str(kind) == "object":  # the bytes would be addresses
            hashed.update(repr(part.tolist()).encode())
        else:
            hashed.update(part.astype(kind, copy=False).tobytes())
    return hashed.hexdigest()[:DIGEST_LENGTH]


def files_digest(filesystem: Any, files: dict[str, int]) -> str:
    """Of files of an fsspec filesystem, ``{full path: bytes}``.

    Raises:
        InvalidInput: there are too many.
    """
    if len(files) > MAX_FILES:
        raise InvalidInput(
            f"a dataset of {len(files)} files; give a file that lists them, at most {MAX_FILES} are read"
        )
    root = _common_folder(list(files))
    hashed = hashlib.sha256(f"files {len(files)}".encode())
    budget = max(1, SAMPLE_BYTES // max(1, len(files)))
    for path, size in sorted(files.items()):
        hashed.update(f"\0{path.removeprefix(root)}\0{size}\0".encode())
        with filesystem.open(path, "rb") as source:
            for start, count in blocks(size, budget):
                source.seek(start)
                hashed.update(source.read(count))
    return hashed.hexdigest()[:DIGEST_LENGTH]


def combined(digests: dict[str, str]) -> str:
    """One digest of several named ones."""
    text = "".join(f"{name}\0{digest}\0" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def blocks(total: int, limit: int) -> Iterator[tuple[int, int]]:
    """``(start, count)`` of what is read of ``total`` rows: all, or ``BLOCKS`` blocks of ``limit`` rows in all."""
    if total <= limit:
        if total:
            yield 0, total
        return
    size = max(1, limit // BLOCKS)
    for index in range(BLOCKS):
        yield index * (total - size) // (BLOCKS - 1), size


def plain(column: pa.ChunkedArray) -> pa.Array:
    """One array without dictionaries, views or short offsets, so that equal values have equal bytes."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return plain(column.cast(kind.value_type))
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_string())
    elif pa.types.is_binary(kind) or pa.types.is_binary_view(kind):
        column = column.cast(pa.large_binary())
    array = column.combine_chunks()
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)


def _update(hashed: Any, array: pa.Array) -> None:
    # What lies under a null is anything, so the nulls' places and the other values are hashed one by one.
    for part in (pc.cast(pc.is_null(array), pa.uint8()), array.drop_null()):
        batch = pa.record_batch([part], names=["values"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        hashed.update(memoryview(sink.getvalue()))


def _common_folder(paths: list[str]) -> str:
    """The folder that all lie in, with its slash; a single file's whole path. Neither makes a dataset another one."""
    if len(paths) < 2:
        return "".join(paths)
    first, last = min(paths), max(paths)
    same = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1]
