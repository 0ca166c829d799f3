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
    # Every aggregate is idempotent: a replayed point changes nothing.
    """
    CREATE TABLE IF NOT EXISTS metric_latest (
        experiment_id Int64,
        key LowCardinality(String),
        run_id String,
        last AggregateFunction(argMax, Tuple(Float64, Int64, Int64), Tuple(Int64, Int64, Float64)),
        min_value SimpleAggregateFunction(min, Float64),
        max_value SimpleAggregateFunction(max, Float64)
    ) ENGINE = AggregatingMergeTree
    ORDER BY (experiment_id, key, run_id)
    """,
    """
    CREATE MATERIALIZED VIEW IF NOT EXISTS metric_latest_feed TO metric_latest AS
    SELECT
        experiment_id,
        key,
        run_id,
        argMaxState(
            tuple(p.value, p.step, p.timestamp), tuple(p.step, p.timestamp, if(isNaN(p.value), 0, p.value))
        ) AS last,
        min(if(isNaN(p.value), inf, p.value)) AS min_value,
        max(if(isNaN(p.value), -inf, p.value)) AS max_value
    FROM metric_points AS p
    GROUP BY experiment_id, key, run_id
    """,
)


@dataclass(frozen=True)
class Statement:
    """SQL with ``{name:Type}`` placeholders and their values."""

    sql: str
    parameters: dict[str, object] = field(default_factory=dict)


def latest(experiment_ids: Sequence[int], run_ids: Sequence[str]) -> Statement:
    """Rows ``(run_id, key, value, step, timestamp)``: the greatest (step, timestamp, value) per run and key."""
    return Statement(
        """
        SELECT run_id, key, tupleElement(point, 1) AS value, tupleElement(point, 2) AS step,
               tupleElement(point, 3) AS timestamp
        FROM (
            SELECT run_id, key, argMaxMerge(last) AS point
            FROM metric_latest
            WHERE experiment_id IN {experiment_ids:Array(Int64)} AND run_id IN {run_ids:Array(String)}
            GROUP BY experiment_id, key, run_id
        )
        ORDER BY run_id, key
        """,
        {"experiment_ids": list(experiment_ids), "run_ids": list(run_ids)},
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
    )


def runs_where(experiment_ids: Sequence[int], key: str, comparator: str, value: float) -> Statement:
    """Rows ``(run_id)`` of the runs whose last value of ``key`` compares so."""
    assert comparator in COMPARATORS
    return Statement(
        f"""
        SELECT run_id FROM (
            SELECT run_id, tupleElement(argMaxMerge(last), 1) AS last_value
            FROM metric_latest
            WHERE experiment_id IN {{experiment_ids:Array(Int64)}} AND key = {{key:String}}
            GROUP BY experiment_id, key, run_id
        ) WHERE last_value {comparator} {{value:Float64}}
        """,  # noqa: S608 - the comparator is one of COMPARATORS
        {"experiment_ids": list(experiment_ids), "key": key, "value": value},
    )


def last_values(experiment_ids: Sequence[int], key: str) -> Statement:
    """Rows ``(run_id, value)``: the last value of ``key`` in every run of the experiments."""
    return Statement(
        """
        SELECT run_id, tupleElement(argMaxMerge(last), 1) AS value
        FROM metric_latest
        WHERE experiment_id IN {experiment_ids:Array(Int64)} AND key = {key:String}
        GROUP BY experiment_id, key, run_id
        """,
        {"experiment_ids": list(experiment_ids), "key": key},
    )


def stored_rows(run_ids: Sequence[str]) -> Statement:
    """Rows ``(table, rows, bytes)``: what the runs take up in each table, at its average size of a row on disk."""
    return Statement(
        """
        SELECT r.table AS table, r.rows AS rows, toInt64(r.rows * ifNull(p.row_bytes, 0)) AS bytes
        FROM (
            SELECT 'metric_points' AS table, count() AS rows FROM metric_points
            WHERE run_id IN {run_ids:Array(String)}
            UNION ALL
            SELECT 'metric_latest' AS table, count() AS rows FROM metric_latest
            WHERE run_id IN {run_ids:Array(String)}
        ) AS r
        LEFT JOIN (
            SELECT table, sum(bytes_on_disk) / sum(rows) AS row_bytes
            FROM system.parts WHERE active AND database = currentDatabase() GROUP BY table
        ) AS p ON p.table = r.table
        """,
        {"run_ids": list(run_ids)},
    )


def points_of(run_ids: Sequence[str], limit: int, after: tuple[str, str, int, int, float] | None = None) -> Statement:
    """Rows ``(run_id, key, step, timestamp, value)`` in that order; ``after`` is the last row of the page before."""
    condition, parameters = "", {"run_ids": list(run_ids), "limit": limit}
    if after is not None:
        run_id, key, step, timestamp, value = after
        is_nan = math.isnan(value)
        # The first line lets the primary key skip what was read before.
        condition = """
            AND run_id >= {a0:String}
            AND (run_id, key, step, timestamp, isNaN(value), if(isNaN(value), 0, value))
              > ({a0:String}, {a1:String}, {a2:Int64}, {a3:Int64}, {a4:UInt8}, {a5:Float64})
        """
        parameters |= {"a0": run_id, "a1": key, "a2": step, "a3": timestamp, "a4": int(is_nan)}
        parameters["a5"] = 0.0 if is_nan else value
    return Statement(
        f"""
        SELECT run_id, key, step, timestamp, value FROM metric_points FINAL
        WHERE run_id IN {{run_ids:Array(String)}} {condition}
        ORDER BY run_id, key, step, timestamp, isNaN(value), if(isNaN(value), 0, value)
        LIMIT {{limit:UInt64}}
        """,  # noqa: S608 - `condition` is one of two literals
        parameters,
    )


def forget(run_ids: Sequence[str]) -> list[Statement]:
    """Changes that remove every trace of the runs; done when they return, harmless when repeated."""
    parameters: dict[str, object] = {"run_ids": list(run_ids)}
    return [
        Statement(
            f"ALTER TABLE {table} DELETE WHERE run_id IN {{run_ids:Array(String)}} SETTINGS mutations_sync = 1",
            parameters,
        )
        for table in ("metric_points", "metric_latest")
    ]


_ELSEWHERE = "run_id IN {run_ids:Array(String)} AND experiment_id != {experiment_id:Int64}"


def stored_elsewhere(run_ids: Sequence[str], experiment_id: int) -> Statement:
    """Row ``(rows)``: how much of the runs is stored under another experiment."""
    return Statement(
        f"SELECT count() AS rows FROM metric_latest WHERE {_ELSEWHERE}",  # noqa: S608 - a literal
        {"run_ids": list(run_ids), "experiment_id": experiment_id},
    )


def rehome(run_ids: Sequence[str], experiment_id: int) -> list[Statement]:
    """Changes that put the runs under an experiment, in this order; harmless when repeated.

    The experiment is a part of ``metric_latest``'s key, so its rows are copied, then removed at the old
    place: a search finds the run at one of the two places at any time. That table goes last, so that
    ``stored_elsewhere`` sees changes that broke off.
    """
    copy = (
        "INSERT INTO metric_latest (experiment_id, key, run_id, last, min_value, max_value) "
        "SELECT {experiment_id:Int64}, key, run_id, last, min_value, max_value FROM metric_latest WHERE "
    )
    changes = (
        "ALTER TABLE metric_points UPDATE experiment_id = {experiment_id:Int64} "
        f"WHERE {_ELSEWHERE} SETTINGS mutations_sync = 1",
        copy + _ELSEWHERE,
        f"ALTER TABLE metric_latest DELETE WHERE {_ELSEWHERE} SETTINGS mutations_sync = 1",
    )
    parameters: dict[str, object] = {"run_ids": list(run_ids), "experiment_id": experiment_id}
    return [Statement(sql, parameters) for sql in changes]
