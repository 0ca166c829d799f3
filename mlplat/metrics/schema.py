"""The tables of the metric store, and how a store that an earlier version made becomes this version's.

One dialect, ClickHouse's, for the server and for chDB.
"""

from __future__ import annotations

# The greatest (step, timestamp, value), NaN counting as 0. The parts are read by `tupleElement` and not as
# `last.step`: with FINAL, a subcolumn is read without the merge that makes the tuple the greatest.
_LAST = """
    last SimpleAggregateFunction(max, Tuple(step Int64, timestamp Int64, number Float64, is_nan UInt8)),
    last_step Int64 ALIAS tupleElement(last, 'step'),
    last_timestamp Int64 ALIAS tupleElement(last, 'timestamp'),
    last_value Float64 ALIAS if(tupleElement(last, 'is_nan'), nan, tupleElement(last, 'number'))
"""

_POINTS = """
    CREATE TABLE IF NOT EXISTS metric_points (
        experiment_id Int64,
        run_id String,
        key LowCardinality(String),
        step Int64,
        timestamp Int64,
        value Float64
    ) ENGINE = ReplacingMergeTree
    ORDER BY (run_id, key, step, timestamp, value)
"""
# Every aggregate is idempotent: a replayed point changes nothing. They are plain columns, not states, so that a
# GROUP BY puts rows together that were not merged yet at the price of numbers. `metrics.summary` makes the rows.
_LATEST = f"""
    CREATE TABLE metric_latest (
        experiment_id Int64,
        key LowCardinality(String),
        run_id String,
        min_value SimpleAggregateFunction(min, Float64),
        max_value SimpleAggregateFunction(max, Float64),
        {_LAST}
    ) ENGINE = AggregatingMergeTree
    ORDER BY (experiment_id, key, run_id)
"""
# The same by run, for the metrics of a page of runs: a few rows around each run are read, not the experiment.
_RUN_METRICS = f"""
    CREATE TABLE run_metrics (
        run_id String,
        key LowCardinality(String),
        min_value SimpleAggregateFunction(min, Float64),
        max_value SimpleAggregateFunction(max, Float64),
        {_LAST}
    ) ENGINE = AggregatingMergeTree
    ORDER BY (run_id, key)
    SETTINGS index_granularity = 256
"""
_RUN_METRICS_FEED = """
    CREATE MATERIALIZED VIEW run_metrics_feed TO run_metrics AS
    SELECT run_id, key, min_value, max_value, last FROM metric_latest
"""
_FILL_LATEST = """
    INSERT INTO metric_latest (experiment_id, key, run_id, min_value, max_value, last)
    SELECT
        experiment_id, key, run_id,
        min(if(isNaN(p.value), inf, p.value)), max(if(isNaN(p.value), -inf, p.value)),
        max(tuple(p.step, p.timestamp, if(isNaN(p.value), 0, p.value), toUInt8(isNaN(p.value))))
    FROM metric_points AS p
    GROUP BY experiment_id, key, run_id
"""

SCHEMA_TABLE = """
    CREATE TABLE IF NOT EXISTS metric_schema (version UInt32) ENGINE = ReplacingMergeTree ORDER BY version
"""
#: What leads to each version, from the one before. A version that broke off in the middle begins again.
VERSIONS: tuple[tuple[str, ...], ...] = (
    (_POINTS,),
    (
        "DROP VIEW IF EXISTS metric_latest_feed",
        "DROP VIEW IF EXISTS run_metrics_feed",
        "DROP TABLE IF EXISTS metric_latest",
        "DROP TABLE IF EXISTS run_metrics",
        _LATEST,
        _RUN_METRICS,
        _RUN_METRICS_FEED,
        _FILL_LATEST,
    ),
)
