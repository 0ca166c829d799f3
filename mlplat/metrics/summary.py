"""One row per run and metric out of many points: the last value, the smallest and the largest.

Every aggregate is idempotent, so a point that is stored twice changes nothing. Computed here and not by
a materialized view, which took as long again as storing the points themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mlplat.metrics.model import SCHEMA, STORED_SCHEMA, concat

#: ``number`` is 0 where ``is_nan``: for MLflow a NaN counts as 0 among points of one step and time.
LAST = pa.struct(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("number", pa.float64(), nullable=False),
        pa.field("is_nan", pa.uint8(), nullable=False),
    ]
)
_NAME = pa.dictionary(pa.int32(), pa.string())
SUMMARY_SCHEMA = pa.schema(
    [
        pa.field("experiment_id", pa.int64(), nullable=False),
        pa.field("key", _NAME, nullable=False),
        pa.field("run_id", _NAME, nullable=False),
        pa.field("last", LAST, nullable=False),
        pa.field("min_value", pa.float64(), nullable=False),
        pa.field("max_value", pa.float64(), nullable=False),
    ]
)
#: Groups may be numbered densely while their table is at most so many times as long as the points are.
_DENSE = 4


def summarise(points: pa.Table) -> pa.Table:
    """A table of ``SUMMARY_SCHEMA`` from one of ``STORED_SCHEMA`` in one chunk.

    ``last`` is the greatest (step, timestamp, value). With nothing but NaN, ``min_value`` is infinity and
    ``max_value`` minus infinity.
    """
    if not points.num_rows:
        return SUMMARY_SCHEMA.empty_table()
    runs, keys = points.column("run_id").chunk(0), points.column("key").chunk(0)
    first, groups, count = _number_groups(_integers(runs.indices), _integers(keys.indices), len(keys.dictionary))
    values: NDArray[np.float64] = points.column("value").to_numpy()
    smallest, largest = np.full(count, np.inf), np.full(count, -np.inf)
    np.fmin.at(smallest, groups, values)  # fmin and fmax pass over NaN
    np.fmax.at(largest, groups, values)
    last = _last(groups, count, _integers(points.column("step")), _integers(points.column("timestamp")), values)
    rows = pa.array(first)
    columns = [
        points.column("experiment_id").take(rows),
        keys.take(rows),
        runs.take(rows),
        last,
        pa.array(smallest),
        pa.array(largest),
    ]
    return pa.Table.from_arrays(columns, schema=SUMMARY_SCHEMA)


def last_points(points: pa.Table) -> pa.Table:
    """The last point of each run and key; takes a table of ``SCHEMA`` in one chunk and gives another."""
    if not points.num_rows:
        return points
    nowhere = pa.array(np.zeros(points.num_rows, np.int64))
    found = summarise(pa.Table.from_arrays([nowhere, *points.columns], schema=STORED_SCHEMA))
    last = found.column("last").combine_chunks()
    value = pc.if_else(pc.equal(last.field("is_nan"), 1), float("nan"), last.field("number"))
    columns = [found.column("run_id"), found.column("key"), last.field("step"), last.field("timestamp"), value]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def merge_last_points(stored: pa.Table, pending: Sequence[pa.Table], run_ids: Collection[str]) -> pa.Table:
    """Rows ``(run_id, key, value, step, timestamp)`` by run and key: the last of what is stored and what is pending.

    Args:
        stored: rows of the same columns.
        pending: tables of ``SCHEMA``, in one chunk each, in which other runs may occur.
    """
    wanted = pa.array(list(run_ids), pa.string())
    names = SCHEMA.names
    tables = [stored.select(names).cast(SCHEMA), *(_of_runs(table, wanted) for table in pending)]
    merged = last_points(concat([table for table in tables if table.num_rows] or [SCHEMA.empty_table()]))
    plain = merged.set_column(0, "run_id", merged.column("run_id").cast(pa.string()))
    plain = plain.set_column(1, "key", plain.column("key").cast(pa.string()))
    return plain.sort_by([("run_id", "ascending"), ("key", "ascending")]).select(stored.column_names)


def _of_runs(points: pa.Table, wanted: pa.Array) -> pa.Table:
    runs = points.column("run_id").chunk(0)
    return points.filter(pc.is_in(runs.dictionary, wanted).take(runs.indices))


def _number_groups(
    runs: NDArray[np.int64], keys: NDArray[np.int64], key_count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """``(first row of each group, group of each row, number of groups)``; a group is a run and a key."""
    pairs = runs * key_count + keys
    size = int(pairs.max()) + 1
    if size > _DENSE * len(pairs):
        _pairs, first, groups = np.unique(pairs, return_index=True, return_inverse=True)
        return first, groups, len(first)
    row_of = np.full(size, -1, np.int64)
    row_of[pairs[::-1]] = np.arange(len(pairs) - 1, -1, -1)
    present = np.flatnonzero(row_of >= 0)
    number = np.zeros(size, np.int64)
    number[present] = np.arange(len(present))
    return row_of[present], number[pairs], len(present)


def _last(
    groups: NDArray[np.int64],
    count: int,
    steps: NDArray[np.int64],
    timestamps: NDArray[np.int64],
    values: NDArray[np.float64],
) -> pa.Array:
    """The greatest (step, timestamp, number, is_nan) of each group, one field after the other."""
    nan = np.isnan(values)
    fields = [steps, timestamps, np.where(nan, 0.0, values), nan.astype(np.uint8)]
    found = []
    for number, candidates in enumerate(fields):
        low = -np.inf if candidates.dtype.kind == "f" else np.iinfo(candidates.dtype).min
        best = np.full(count, low, candidates.dtype)
        np.maximum.at(best, groups, candidates)
        found.append(pa.array(best))
        kept = candidates == best[groups]
        groups = groups[kept]
        fields[number + 1 :] = [later[kept] for later in fields[number + 1 :]]
    return pa.StructArray.from_arrays(found, fields=list(LAST))


def _integers(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    array: NDArray[np.int64] = column.to_numpy().astype(np.int64, copy=False)
    return array
