"""Reads of the metric store, as statements with bound parameters.

One dialect, ClickHouse's, for the server and for chDB. ``metric_points`` is read with FINAL, because
retries and replays may have stored an exact repeat twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

#: MLflow's comparators of a metric predicate; anything else never reaches a statement.
COMPARATORS = frozenset({"=", "!=", ">", ">=", "<", "<=", "IN", "NOT IN"})


@dataclass(frozen=True)
class Statement:
    """SQL with ``{name:Type}`` placeholders and their values.

    ``run_ids``: the only runs whose points it reads, so that it need not wait for those of others; None: any.
    """

    sql: str
    parameters: dict[str, object] = field(default_factory=dict)
    run_ids: tuple[str, ...] | None = None


@dataclass(frozen=True)
class MetricTest:
    """A comparison of one aggregate (``last``, ``min``, ``max``) of a metric; ``value`` is a tuple for IN."""

    key: str
    aggregate: str
    comparator: str
    value: float | tuple[float, ...]


def latest(run_ids: Sequence[str]) -> Statement:
    """Rows ``(run_id, key, value, step, timestamp)``: the greatest (step, timestamp, value) per run and key."""
    return Statement(
        """
        SELECT run_id, key, last_value AS value, last_step AS step, last_timestamp AS timestamp
        FROM run_metrics FINAL
        WHERE run_id IN {run_ids:Array(String)}
        ORDER BY run_id, key
        """,
        {"run_ids": list(run_ids)},
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


#: Between the parts of a joined text; no run id contains it.
SEPARATOR = "\x1f"
_JOINED = "arrayStringConcat(groupArray(toString({})), '\\x1f')"
#: Nothing but NaN leaves the infinities that the feed starts from.
_AGGREGATES = {
    "last": "last_value",
    "min": "if(min_value > max_value, nan, min_value)",
    "max": "if(min_value > max_value, nan, max_value)",
}
_INSIDE = "experiment_id IN {experiment_ids:Array(Int64)}"


class _Where:
    """Conditions with bound values, on ``metric_latest`` of some experiments."""

    def __init__(self, experiment_ids: Sequence[int], key: str, tests: Sequence[MetricTest]) -> None:
        self.parameters: dict[str, object] = {"experiment_ids": list(experiment_ids)}
        by_key: dict[str, list[MetricTest]] = {key: []}
        for test in tests:
            by_key.setdefault(test.key, []).append(test)
        own = self._of_key(key, by_key.pop(key))
        others = [
            f"run_id IN (SELECT run_id FROM metric_latest FINAL WHERE {self._of_key(other, its)})"  # noqa: S608
            for other, its in by_key.items()
        ]
        self.sql = " AND ".join([own, *others])

    def _bind(self, kind: str, value: object) -> str:
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return f"{{{name}:{kind}}}"

    def _of_key(self, key: str, tests: Sequence[MetricTest]) -> str:
        return " AND ".join([_INSIDE, f"key = {self._bind('String', key)}", *map(self._test, tests)])

    def _test(self, test: MetricTest) -> str:
        assert test.comparator in COMPARATORS
        many = isinstance(test.value, tuple)
        bound = self._bind("Array(Float64)", list(test.value)) if many else self._bind("Float64", test.value)  # type: ignore[arg-type]
        return f"{_AGGREGATES[test.aggregate]} {test.comparator} {bound}"


def matching(experiment_ids: Sequence[int], tests: Sequence[MetricTest]) -> Statement:
    """One row ``(run_ids)``: the runs that pass every test, joined by ``SEPARATOR``."""
    where = _Where(experiment_ids, tests[0].key, tests)
    return Statement(
        f"SELECT {_JOINED.format('run_id')} AS run_ids FROM metric_latest FINAL WHERE {where.sql}",  # noqa: S608
        where.parameters,
    )


def values(experiment_ids: Sequence[int], key: str, aggregate: str) -> Statement:
    """One row ``(run_ids, in_experiments, numbers)``: an aggregate of ``key`` in every run that has it, joined."""
    where = _Where(experiment_ids, key, ())
    return Statement(
        f"""
        SELECT {_joined_columns()}
        FROM (
            SELECT run_id, experiment_id, {_AGGREGATES[aggregate]} AS value
            FROM metric_latest FINAL WHERE {where.sql}
        )
        """,  # noqa: S608
        where.parameters,
    )


def ordered(
    experiment_ids: Sequence[int],
    key: str,
    aggregate: str,
    ascending: bool,
    tests: Sequence[MetricTest],
    limit: int,
    start: tuple[float, bool] | None,
    run_ids: Sequence[str] | None = None,
) -> Statement:
    """The runs with the first values of ``key``: numbers in the direction asked for, then NaN.

    At least ``limit`` runs, unless there are fewer: every run with the last value is among them.
    One row ``(run_ids, in_experiments, numbers, found, last_nan, last_number)``, the first three joined.

    Args:
        start: a value, and True to leave the runs that have it out.
        run_ids: the only runs that count.
    """
    where = _Where(experiment_ids, key, tests)
    sign = "" if ascending else "-"
    after = "1"
    if start is not None:
        value, exclusive = start
        is_nan = math.isnan(value)
        where.parameters |= {"nan": int(is_nan), "number": 0.0 if is_nan else value if ascending else -value}
        after = f"(is_nan, position) {'>' if exclusive else '>='} ({{nan:UInt8}}, {{number:Float64}})"
    if run_ids is not None:
        where.parameters["run_ids"] = list(run_ids)
        after += " AND run_id IN {run_ids:Array(String)}"
    return Statement(
        f"""
        SELECT {_joined_columns()}, count() AS found, max((is_nan, position)) AS last,
               tupleElement(last, 1) AS last_nan, {sign}tupleElement(last, 2) AS last_number
        FROM (
            SELECT run_id, experiment_id, {_AGGREGATES[aggregate]} AS value, isNaN(value) AS is_nan,
                   if(is_nan, 0, {sign}value) AS position
            FROM metric_latest FINAL
            WHERE {where.sql} AND {after}
            ORDER BY is_nan, position LIMIT {{limit:UInt64}} WITH TIES
        )
        """,  # noqa: S608
        where.parameters | {"limit": limit},
    )


def _joined_columns() -> str:
    columns = {"run_ids": "run_id", "in_experiments": "experiment_id", "numbers": "value"}
    return ", ".join(f"{_JOINED.format(column)} AS {name}" for name, column in columns.items())
