"""What is done to points after they are stored: runs that are purged, runs that move to another experiment."""

from __future__ import annotations

from collections.abc import Sequence

from mlplat.metrics.queries import Statement

#: Ids travel in the request line of a ClickHouse server, which is at most 1 MiB long.
MAX_RUN_IDS = 1_000


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
            UNION ALL
            SELECT 'run_metrics' AS table, count() AS rows FROM run_metrics
            WHERE run_id IN {run_ids:Array(String)}
        ) AS r
        LEFT JOIN (
            SELECT table, sum(bytes_on_disk) / greatest(sum(rows), 1) AS row_bytes
            FROM system.parts WHERE active AND database = currentDatabase() GROUP BY table
        ) AS p ON p.table = r.table
        """,
        {"run_ids": list(run_ids)},
        tuple(run_ids),
    )


def forget(run_ids: Sequence[str]) -> list[Statement]:
    """Changes that remove every trace of the runs; done when they return, harmless when repeated."""
    parameters: dict[str, object] = {"run_ids": list(run_ids)}
    return [
        Statement(
            f"ALTER TABLE {table} DELETE WHERE run_id IN {{run_ids:Array(String)}} SETTINGS mutations_sync = 1",
            parameters,
        )
        for table in ("metric_points", "metric_latest", "run_metrics")
    ]


def counted_points(run_ids: Sequence[str]) -> Statement:
    """Rows ``(run_id, points)``: how many different points there are of each run that has some."""
    return Statement(
        "SELECT run_id, count() AS points FROM metric_points FINAL WHERE run_id IN {run_ids:Array(String)} "
        "GROUP BY run_id",
        {"run_ids": list(run_ids)},
        tuple(run_ids),
    )


def forget_points(run_ids: Sequence[str]) -> Statement:
    """The change that removes the points of the runs, and leaves what sums them up; harmless when repeated."""
    return Statement(
        "ALTER TABLE metric_points DELETE WHERE run_id IN {run_ids:Array(String)} SETTINGS mutations_sync = 1",
        {"run_ids": list(run_ids)},
    )


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
