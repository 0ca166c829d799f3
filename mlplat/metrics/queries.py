"""Reads of the metric store, as statements with bound parameters.

One dialect, ClickHouse's, for the server and for chDB. ``metric_points`` is read with FINAL, because
retries and replays may have stored an exact repeat twice. Rows of ``run_metrics`` that were not merged yet are put
together by GROUP BY: FINAL would merge everything in the blocks around the wanted rows as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Statement:
    """SQL with ``{name:Type}`` placeholders and their values.

    ``run_ids``: the only runs whose points it reads, so that it need not wait for those of others; None: any.
    """

    sql: str
    parameters: dict[str, object] = field(default_factory=dict)
    run_ids: tuple[str, ...] | None = None
    #: Rows ``(run_id, key, value, step, timestamp)`` with the last point of each run and key. The shard adds what is
    #: not stored yet by itself, and nothing has to be flushed first.
    gives_last_points: bool = False
    #: Reads points themselves, and not only what sums them up: those of ``run_ids`` have to be in the metric store.
    reads_points: bool = False
    #: Groups many rows by few of each: several threads of one small machine would spend more on joining their groups.
    on_one_thread: bool = False


_LAST = (
    "if(tupleElement(last, 'is_nan'), nan, tupleElement(last, 'number')) AS value, "
    "tupleElement(last, 'step') AS step, tupleElement(last, 'timestamp') AS timestamp"
)


def latest(run_ids: Sequence[str]) -> Statement:
    """Rows ``(run_id, key, value, step, timestamp)``: the greatest (step, timestamp, value) per run and key."""
    return Statement(
        f"""
        SELECT run_id, key, {_LAST} FROM (
            SELECT run_id, key, max(r.last) AS last
            FROM run_metrics AS r WHERE run_id IN {{run_ids:Array(String)}} GROUP BY run_id, key
        ) ORDER BY run_id, key
        """,  # noqa: S608 - a literal of this module
        {"run_ids": list(run_ids)},
        tuple(run_ids),
        gives_last_points=True,
    )


def summaries(run_ids: Sequence[str], limit: int) -> Statement:
    """Rows ``(run_id, key, value, step, timestamp, min_value, max_value)``, at most ``limit``.

    The first three numbers are the last point's. A series of NaN alone has ``min_value`` inf and ``max_value`` -inf.
    """
    return Statement(
        f"""
        SELECT run_id, key, {_LAST}, lowest AS min_value, highest AS max_value FROM (
            SELECT run_id, key, max(r.last) AS last, min(r.min_value) AS lowest, max(r.max_value) AS highest
            FROM run_metrics AS r WHERE run_id IN {{run_ids:Array(String)}} GROUP BY run_id, key
        ) ORDER BY run_id, key LIMIT {{limit:UInt64}}
        """,  # noqa: S608 - a literal of this module
        {"run_ids": list(run_ids), "limit": limit},
        tuple(run_ids),
    )


def series(run_ids: Sequence[str], keys: Sequence[str], limit: int) -> Statement:
    """Rows ``(run_id, key)``, at most ``limit``: the series of the runs whose key is one of ``keys``.

    ``*`` in a key stands for anything and ``?`` for one character.
    """
    exact = [key for key in keys if not _is_pattern(key)]
    parameters: dict[str, object] = {"run_ids": list(run_ids), "keys": exact, "limit": limit}
    condition = "key IN {keys:Array(String)}"
    for number, pattern in enumerate(key for key in keys if _is_pattern(key)):
        condition += f" OR key LIKE {{like{number}:String}}"
        parameters[f"like{number}"] = _like(pattern)
    return Statement(
        f"""
        SELECT DISTINCT run_id, key FROM run_metrics
        WHERE run_id IN {{run_ids:Array(String)}} AND ({condition})
        LIMIT {{limit:UInt64}}
        """,  # noqa: S608 - the condition has placeholders only
        parameters,
        tuple(run_ids),
    )


def _is_pattern(key: str) -> bool:
    return "*" in key or "?" in key


def _like(pattern: str) -> str:
    escaped = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


_POSITION = "timestamp, step, isNaN(value), if(isNaN(value), 0, value)"
_BY_STEP = "step, timestamp, isNaN(value), value"


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
        reads_points=True,
    )


def histories(run_ids: Sequence[str], key: str, limit: int) -> Statement:
    """Rows ``(run_id, timestamp, step, value)`` of all the runs in that order, at most ``limit`` in all."""
    return Statement(
        f"""
        SELECT run_id, timestamp, step, value FROM metric_points FINAL
        WHERE run_id IN {{run_ids:Array(String)}} AND key = {{key:String}}
        ORDER BY run_id, {_POSITION} LIMIT {{limit:UInt64}}
        """,  # noqa: S608 - a literal of this module
        {"run_ids": list(run_ids), "key": key, "limit": limit},
        tuple(run_ids),
        reads_points=True,
    )


def sampled_histories(run_ids: Sequence[str], key: str, limit: int, steps: tuple[int, int] | None) -> Statement:
    """Rows ``(run_id, timestamp, step, value)``: at most ``limit`` points of each run, in the order of ``run_ids``,
    then of step, timestamp and value.

    As MLflow picks them: the points are dealt out in order to ``limit`` tiles whose sizes differ by one at most,
    and the first of each tile is kept, except that the run's last point stands for the last tile. ``steps`` are
    the first and the last step to look at.
    """
    within, parameters = "", {"run_ids": list(run_ids), "key": key, "limit": limit}
    if steps is not None:
        within = "AND step BETWEEN {first:Int64} AND {last:Int64}"
        parameters |= {"first": steps[0], "last": steps[1]}
    return Statement(
        f"""
        WITH intDiv(points, {{limit:UInt64}}) AS small, (small + 1) * (points % {{limit:UInt64}}) AS in_large
        SELECT run_id, timestamp, step, value FROM (
            SELECT run_id, timestamp, step, value,
                   toUInt64(row_number() OVER (PARTITION BY run_id ORDER BY {_BY_STEP})) - 1 AS place,
                   count() OVER (PARTITION BY run_id) AS points
            FROM metric_points FINAL
            WHERE run_id IN {{run_ids:Array(String)}} AND key = {{key:String}} {within}
        )
        WHERE place = points - 1
           OR (place != points - small
               AND if(place < in_large, place % (small + 1), (place - in_large) % greatest(small, 1)) = 0)
        ORDER BY indexOf({{run_ids:Array(String)}}, run_id), {_BY_STEP}
        """,  # noqa: S608 - literals of this module
        parameters,
        tuple(run_ids),
        reads_points=True,
    )


def points_of(run_ids: Sequence[str], limit: int, after: tuple[str, str, int, int, float] | None = None) -> Statement:
    """Rows ``(run_id, key, step, timestamp, value)`` in that order; ``after`` is the last row of the page before."""
    condition, parameters = "", {"run_ids": list(run_ids), "limit": limit}
    if after is not None:
        run_id, key, step, timestamp, value = after
        is_nan = math.isnan(value)
        # The first lines let the primary key skip what was read before.
        condition = """
            AND run_id >= {a0:String}
            AND (run_id > {a0:String} OR key >= {a1:String})
            AND (run_id > {a0:String} OR key > {a1:String} OR step >= {a2:Int64})
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
        tuple(run_ids),
        reads_points=True,
    )
