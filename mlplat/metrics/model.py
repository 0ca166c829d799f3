"""The one wire format of metric points: an Arrow IPC stream of ``SCHEMA``.

The same bytes are the HTTP body, the actor's argument and a part of the log's record. A batch names
runs only; the experiment a run belongs to is the platform's own knowledge, added when points move
into the metric store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mlplat.errors import InvalidInput
from mlplat.keys import check_key
from mlplat.metrics.columns import constant_name, encoded_names, float64_column, int64_column

_NAME = pa.dictionary(pa.int32(), pa.string())
#: One row per point. ``timestamp`` is in ms since the epoch, ``step`` may be negative.
#: The media type of an Arrow IPC stream.
ARROW = "application/vnd.apache.arrow.stream"
SCHEMA = pa.schema(
    [
        pa.field("run_id", _NAME, nullable=False),
        pa.field("key", _NAME, nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
#: What the metric store holds.
STORED_SCHEMA = pa.schema([pa.field("experiment_id", pa.int64(), nullable=False), *SCHEMA])
#: What other writers may send instead: any type that casts to SCHEMA without loss.
_NULLABLE = pa.schema([column.with_nullable(True) for column in SCHEMA])
_STORED_NULLABLE = pa.schema([STORED_SCHEMA.field(0).with_nullable(True), *SCHEMA])

#: 9999-12-31T23:59:59.999Z.
MAX_TIMESTAMP = 253_402_300_799_999


class Point(NamedTuple):
    """One metric point of one run."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True)
class Archived:
    """Runs and points that have left the metric store."""

    runs: int = 0
    points: int = 0

    def __add__(self, other: Archived) -> Archived:
        return Archived(self.runs + other.runs, self.points + other.points)


def points_table(run_id: str, points: Iterable[Point]) -> pa.Table:
    """A table of ``SCHEMA`` with one row per point of a run."""
    rows = list(points)
    return columns_table(
        run_id,
        [row.key for row in rows],
        [row.step for row in rows],
        [row.timestamp for row in rows],
        [row.value for row in rows],
    )


def columns_table(
    run_id: str, keys: Sequence[str], steps: Sequence[int], timestamps: Sequence[int], values: Sequence[float]
) -> pa.Table:
    """A table of ``SCHEMA`` from columns of equal length, for one run.

    Raises:
        TypeError, OverflowError, UnicodeEncodeError: a value does not fit its column.
    """
    columns = [
        constant_name(run_id, len(keys)),
        encoded_names(keys),
        int64_column(steps),
        int64_column(timestamps),
        float64_column(values),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows in one chunk, with one dictionary per column."""
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def with_experiments(table: pa.Table, experiments: Mapping[str, int]) -> pa.Table:
    """A table of ``STORED_SCHEMA``, without the points of runs that ``experiments`` does not know.

    ``table`` is in one chunk.
    """
    runs = table.column("run_id").chunk(0)
    by_code = pa.array([experiments.get(name) for name in runs.dictionary.to_pylist()], pa.int64())
    ids = by_code.take(runs.indices)
    stored = pa.Table.from_arrays([ids, *table.columns], schema=_STORED_NULLABLE)
    return (stored.filter(ids.is_valid()) if ids.null_count else stored).cast(STORED_SCHEMA)


def encode(table: pa.Table, compression: str | None = None) -> bytes:
    """Arrow IPC stream of ``table``; ``compression`` is None, ``"zstd"`` or ``"lz4"``."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def decode(body: bytes) -> pa.Table:
    """The table in an Arrow IPC stream, checked against ``SCHEMA``, in one chunk.

    Raises:
        InvalidInput: not an Arrow stream, another schema, a null, a malformed key, or a time out of bounds.
    """
    try:
        with pa.ipc.open_stream(body) as reader:
            table = reader.read_all()
        table.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, EOFError) as error:
        raise InvalidInput(f"the body is not an Arrow IPC stream: {error}") from error
    if "experiment_id" in table.schema.names:  # a column of batches that 0.1.0 logged
        table = table.drop_columns("experiment_id")
    if table.schema.names != SCHEMA.names:
        raise InvalidInput(f"metric batches have the columns {SCHEMA.names}, not {table.schema.names}")
    if not table.schema.equals(SCHEMA):
        table = _cast(table)
    if any(column.num_chunks != 1 for column in table.columns):
        table = table.unify_dictionaries().combine_chunks()
    _check(table)
    return pa.Table.from_arrays(table.columns, schema=SCHEMA)


def names_of(table: pa.Table, column: str) -> list[str]:
    """The distinct names in a dictionary column; some may have no row."""
    found: list[str] = []
    for chunk in table.column(column).chunks:
        found += chunk.dictionary.to_pylist()
    return found


def _cast(table: pa.Table) -> pa.Table:
    try:
        return table.cast(_NULLABLE)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InvalidInput(f"a column of the metric batch has the wrong type: {error}") from error


def _check(table: pa.Table) -> None:
    if any(column.null_count for column in table.columns):
        raise InvalidInput("metric batches may not contain nulls")
    for key in names_of(table, "key"):
        if key is None:
            raise InvalidInput("metric batches may not contain nulls")
        check_key("metric", key)
    if table.num_rows:
        bounds = pc.min_max(table.column("timestamp")).as_py()
        for time in (bounds["min"], bounds["max"]):
            if not 0 <= time <= MAX_TIMESTAMP:
                raise InvalidInput(f"Invalid time {time}: expected milliseconds since 1970, before the year 10000")
