"""Reads of the metric store, as statements with bound parameters.

One dialect, ClickHouse's, for the server and for chDB. ``metric_points`` is read with FINAL, because
retries and replays may have stored an exact repeat twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

#: MLflow's comparators of a metric predicate; anything else never reaches a statement.
COMPARATORS = frozenset({"=", "!=", ">", ">=", "<", "<="})

CREATE_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS metric_points (
        experiment_id Int64,
        run_id String,
        key LowCardinality(String),
        step Int64,
        timestamp Int64,
        value Float64
    ) ENGINE = ReplacingMergeTree
    ORDER BY (run_id, key, step, timestamp, value)
    """,
    # Every aggregate is idempotent: a replayed point changes nothing. They are plain columns, not states, so
    # that FINAL reads them without a merge per group. `metrics.summary` makes the rows.
    """
    CREATE TABLE IF NOT EXISTS metric_latest (
        experiment_id Int64,
        key LowCardinality(String),
        run_id String,
        last SimpleAggregateFunction(max, Tuple(step Int64, timestamp Int64, number Float64, is_nan UInt8)),
        min_value SimpleAggregateFunction(min, Float64),
        max_value SimpleAggregateFunction(max, Float64)
    ) ENGINE = AggregatingMergeTree
    ORDER BY (experiment_id, key, run_id)
    """,
)


@dataclass(frozen=True)
class Statement:
    """SQL with ``{name:Type}`` placeholders and their values.

    ``run_ids``: the only runs whose points it reads, so that it need not wait for those of others; None: any.
    """

    sql: str
    parameters: dict[str, object] = field(default_factory=dict)
    run_ids: tuple[str, ...] | None = None


# Not `last.number`: with FINAL a subcolumn is read without the merge that makes the tuple the greatest.
_LAST_VALUE = "if(tupleElement(last, 'is_nan'), nan, tupleElement(last, 'number'))"


def latest(experiment_ids: Sequence[int], run_ids: Sequence[str]) -> Statement:
    """Rows ``(run_id, key, value, step, timestamp)``: the greatest (step, timestamp, value) per run and key."""
    return Statement(
        f"""
        SELECT run_id, key, {_LAST_VALUE} AS value, tupleElement(last, 'step') AS step,
               tupleElement(last, 'timestamp') AS timestamp
        FROM metric_latest FINAL
        WHERE experiment_id IN {{experiment_ids:Array(Int64)}} AND run_id IN {{run_ids:Array(String)}}
        ORDER BY run_id, key
        """,  # noqa: S608 - nothing of the caller's is spliced in
        {"experiment_ids": list(experiment_ids), "run_ids": list(run_ids)},
        tuple(run_ids),
    )


_POSITION = "timestamp, step, isNaN(value), if(isNaN(value), 0, value)"


def history(run_id: str, key: str, limit: int, after: tuple[int, int, float] | None = None) -> Statement:
    """Rows ``(timestamp, step, value)`` in that order; ``after`` is the last row of the page before."""
    condition, parameters = "", {"run_id": run_id, "key": key, "limit": limit}
    if after is not None:
        # NaN compares with nothing, so it is spelled out, and comes after every number.
        condition = f"AND ({_POSITION}) > ({{a0:Int64}}, {{a1:Int64}}, {{a2:UInt8}}, {{a3:Float64}})"
        is_nan = math.isnan(after[2])
        parameters |= {"a0": after[0], "a1": after[1], "a2": int(is_nan), "a3": 0.0 if is_nan else after[2]}
    return Statement(
        f"""
        SELECT timestamp, step, value FROM metric_points FINAL
        WHERE run_id = {{run_id:String}} AND key = {{key:String}} {condition}
        ORDER BY {_POSITION} LIMIT {{limit:UInt64}}
        """,  # noqa: S608 - `condition` is one of two literals
        parameters,
        (run_id,),
    )


def runs_where(experiment_ids: Sequence[int], key: str, comparator: str, value: float) -> Statement:
    """Rows ``(run_id)`` of the runs whose last value of ``key`` compares so."""
    assert comparator in COMPARATORS
    return Statement(
        f"""
        SELECT run_id FROM metric_latest FINAL
        WHERE experiment_id IN {{experiment_ids:Array(Int64)}} AND key = {{key:String}}
            AND {_LAST_VALUE} {comparator} {{value:Float64}}
        """,  # noqa: S608 - the comparator is one of COMPARATORS
        {"experiment_ids": list(experiment_ids), "key": key, "value": value},
    )


def last_values(experiment_ids: Sequence[int], key: str) -> Statement:
    """Rows ``(run_id, value)``: the last value of ``key`` in every run of the experiments."""
    return Statement(
        f"""
        SELECT run_id, {_LAST_VALUE} AS value FROM metric_latest FINAL
        WHERE experiment_id IN {{experiment_ids:Array(Int64)}} AND key = {{key:String}}
        """,  # noqa: S608 - nothing of the caller's is spliced in
        {"experiment_ids": list(experiment_ids), "key": key},
    )
