"""The one wire format of metric points: an Arrow IPC stream of ``SCHEMA``.

The same bytes are the HTTP body, the actor's argument and the log's record.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mlplat.errors import InvalidInput
from mlplat.metrics.columns import float64_column, int64_column, text_column

#: One row per point. ``timestamp`` is in ms since the epoch, ``step`` may be negative.
SCHEMA = pa.schema(
    [
        pa.field("experiment_id", pa.int64(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)

MAX_KEY_LENGTH = 250


class Point(NamedTuple):
    """One metric point of one run."""

    key: str
    value: float
    timestamp: int
    step: int


def points_table(experiment_id: int, run_id: str, points: Iterable[Point]) -> pa.Table:
    """A table of ``SCHEMA`` with one row per point."""
    rows = list(points)
    count = len(rows)
    columns = [
        int64_column([experiment_id] * count),
        text_column([run_id] * count),
        text_column([row.key for row in rows]),
        int64_column([row.step for row in rows]),
        int64_column([row.timestamp for row in rows]),
        float64_column([row.value for row in rows]),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def encode(table: pa.Table, compression: str | None = None) -> bytes:
    """Arrow IPC stream of ``table``; ``compression`` is None, ``"zstd"`` or ``"lz4"``."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def decode(body: bytes) -> pa.Table:
    """The table in an Arrow IPC stream, checked against ``SCHEMA``.

    Raises:
        InvalidInput: not an Arrow stream, another schema, a null, or a key or step out of bounds.
    """
    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, EOFError) as error:
        raise InvalidInput(f"the body is not an Arrow IPC stream: {error}") from error
    if table.schema.names != SCHEMA.names:
        raise InvalidInput(f"metric batches have the columns {SCHEMA.names}, not {table.schema.names}")
    try:
        table = table.cast(pa.schema([column.with_nullable(True) for column in SCHEMA])).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InvalidInput(f"a column of the metric batch has the wrong type: {error}") from error
    if any(column.null_count for column in table.columns):
        raise InvalidInput("metric batches may not contain nulls")
    longest = pc.max(pc.utf8_length(table["key"])).as_py()
    if longest is not None and longest > MAX_KEY_LENGTH:
        raise InvalidInput(f"metric keys have at most {MAX_KEY_LENGTH} characters, found one with {longest}")
    return table.cast(SCHEMA)
