"""Which runs have a metric that passes a test, and in which order: statements over the summaries of metrics.

A run may have several rows of one metric that were not merged yet. One scan of all the metrics of a statement,
grouped by run, puts them together in half the time that FINAL takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlplat.metrics.packing import sortable_float, sortable_int, unsort_float
from mlplat.metrics.queries import Statement

#: MLflow's comparators of a metric predicate; anything else never reaches a statement.
COMPARATORS = frozenset({"=", "!=", ">", ">=", "<", "<=", "IN", "NOT IN"})


@dataclass(frozen=True)
class MetricTest:
    """A comparison of one aggregate (``last``, ``min``, ``max``) of a metric; ``value`` is a tuple for IN."""

    key: str
    aggregate: str
    comparator: str
    value: float | tuple[float, ...]


#: Between the parts of a joined text; no run id contains it.
SEPARATOR = "\x1f"
_SEPARATOR_SQL = "\\x1f"
_STEP, _TIME, _NUMBER, _IS_NAN = (f"tupleElement(last, '{name}')" for name in ("step", "timestamp", "number", "is_nan"))
#: The last point as one integer: the greatest of such is found far sooner than the greatest tuple.
_PACKED = (
    f"bitOr(bitShiftLeft(toUInt256(bitOr(bitShiftLeft(toUInt128({sortable_int(_STEP)}), 64), {sortable_int(_TIME)})), "
    f"128), bitOr(bitShiftLeft(toUInt128({sortable_float(_NUMBER)}), 64), {_IS_NAN}))"
)


class _Grouped:
    """A query with one row for each run that has all of the named metrics and passes the tests.

    ``where`` and ``parameters`` say which rows of ``table`` it is about.
    """

    def __init__(
        self, table: str, where: str, parameters: dict[str, object], tests: Sequence[MetricTest], *keys: str
    ) -> None:
        self.parameters = parameters
        self._table = table
        self._where = where
        self._keys = {key: self._bind("String", key) for key in dict.fromkeys([*keys, *(test.key for test in tests)])}
        conditions = [self._test(test) for test in tests]
        if len(self._keys) > 1:
            # No point packs to 0, which is what there is without one.
            conditions += [f"{self._merged('max', 'packed', key)} > 0" for key in self._keys]
        self._having = " AND ".join(conditions) or "1"

    def aggregate(self, key: str, aggregate: str) -> str:
        """The expression for ``last``, ``min`` or ``max`` of a metric."""
        if aggregate == "last":
            last = self._merged("max", "packed", key)
            number = unsort_float(f"toUInt64(bitShiftRight({last}, 64))")
            return f"if(toUInt8({last}) = 1, nan, {number})"
        lowest, highest = self._merged("min", "min_value", key), self._merged("max", "max_value", key)
        # Nothing but NaN leaves the infinities that the summaries start from.
        return f"if({lowest} > {highest}, nan, {lowest if aggregate == 'min' else highest})"

    def sql(self, columns: str, by: str) -> str:
        """The query."""
        return f"""
            SELECT {columns} FROM (
                SELECT *, {_PACKED} AS packed FROM {self._table}
                WHERE {self._where} AND key IN ({", ".join(self._keys.values())})
            ) GROUP BY {by} HAVING {self._having}
            """  # noqa: S608 - values are bound

    def _merged(self, function: str, column: str, key: str) -> str:
        if len(self._keys) == 1:
            return f"{function}({column})"
        return f"{function}If({column}, key = {self._keys[key]})"

    def _test(self, test: MetricTest) -> str:
        assert test.comparator in COMPARATORS
        many = isinstance(test.value, tuple)
        bound = self._bind("Array(Float64)", list(test.value)) if many else self._bind("Float64", test.value)  # type: ignore[arg-type]
        return f"{self.aggregate(test.key, test.aggregate)} {test.comparator} {bound}"

    def _bind(self, kind: str, value: object) -> str:
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return f"{{{name}:{kind}}}"


_IN_EXPERIMENTS = "experiment_id IN {experiment_ids:Array(Int64)}"
_AMONG = "run_id IN {run_ids:Array(String)}"


def matching(experiment_ids: Sequence[int] | None, tests: Sequence[MetricTest]) -> Statement:
    """One row ``(run_ids)``: the runs that pass every test, joined by ``SEPARATOR``; None: of all experiments."""
    if experiment_ids is None:
        return _joined_ids(_Grouped("metric_latest", "1", {}, tests))
    return _joined_ids(_Grouped("metric_latest", _IN_EXPERIMENTS, {"experiment_ids": list(experiment_ids)}, tests))


def passing(run_ids: Sequence[str], tests: Sequence[MetricTest]) -> Statement:
    """As ``matching``, but among a few runs, and without a look at any others."""
    return _joined_ids(_Grouped("run_metrics", _AMONG, {"run_ids": list(run_ids)}, tests), tuple(run_ids))


def values(experiment_ids: Sequence[int], key: str, aggregate: str) -> Statement:
    """One row ``(run_ids, in_experiments, numbers)``: an aggregate of ``key`` in every run that has it, joined."""
    grouped = _Grouped("metric_latest", _IN_EXPERIMENTS, {"experiment_ids": list(experiment_ids)}, (), key)
    rows = _values(grouped, experiment_ids, key, aggregate)
    return Statement(f"SELECT {_joined_values('groupArray({})')} FROM ({rows})", grouped.parameters, on_one_thread=True)  # noqa: S608


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
    One row ``(run_ids, in_experiments, numbers, found, last)``: the first three joined, ``last`` is the last value.

    Args:
        start: a value, and True to leave the runs that have it out.
        run_ids: the only runs that count.
    """
    where, parameters = _IN_EXPERIMENTS, {"experiment_ids": list(experiment_ids), "limit": limit}
    if run_ids is not None:
        where, parameters["run_ids"] = f"{where} AND {_AMONG}", list(run_ids)
    after = "1"
    if start is not None:
        number, exclusive = start
        parameters["start"] = 0.0 if math.isnan(number) else number
        first = _place("nan" if math.isnan(number) else "{start:Float64}", ascending)
        after = f"place {'>' if exclusive else '>='} {first}"
    grouped = _Grouped("metric_latest", where, parameters, tests, key)
    kept = "arrayFilter((one, at) -> at <= last_place, all_{}, places)"
    last = unsort_float("last_place")
    # Only the last place is looked for: to sort the rows, with those that share it, would take half as long again.
    return Statement(
        f"""
        SELECT {_joined_values(kept)}, countEqual(arrayMap(at -> at <= last_place, places), 1) AS found,
               {last if ascending else f"0. - {last}"} AS last
        FROM (
            SELECT groupArray(run_id) AS all_run_id, groupArray(experiment_id) AS all_experiment_id,
                   groupArray(value) AS all_value, groupArray(place) AS places,
                   arrayPartialSort({{limit:UInt64}}, places)[greatest(1, least({{limit:UInt64}}, length(places)))]
                       AS last_place
            FROM (
                SELECT *, {_place("value", ascending)} AS place
                FROM ({_values(grouped, experiment_ids, key, aggregate)})
            ) WHERE {after}
        )
        """,  # noqa: S608 - values are bound
        grouped.parameters,
        on_one_thread=True,
    )


def _joined_ids(grouped: _Grouped, run_ids: tuple[str, ...] | None = None) -> Statement:
    rows = grouped.sql("run_id", "run_id")
    sql = f"SELECT {_joined('groupArray(run_id)')} AS run_ids FROM ({rows})"  # noqa: S608
    return Statement(sql, grouped.parameters, run_ids, on_one_thread=True)


def _values(grouped: _Grouped, experiment_ids: Sequence[int], key: str, aggregate: str) -> str:
    """Rows ``(run_id, experiment_id, value)``."""
    value = f"{grouped.aggregate(key, aggregate)} AS value"
    if len(experiment_ids) == 1:  # one column less to read and to group by
        return grouped.sql(f"run_id, toInt64({experiment_ids[0]:d}) AS experiment_id, {value}", "run_id")
    return grouped.sql(f"run_id, experiment_id, {value}", "run_id, experiment_id")


def _place(value: str, ascending: bool) -> str:
    """Where a value is in the order, as an integer: both zeros at one place, NaN at the end."""
    return sortable_float(f"if(isNaN({value}), nan, {'0. +' if ascending else '0. -'} {value})")


def _joined_values(array: str) -> str:
    """``array`` makes an array of a column."""
    columns = {"run_ids": "run_id", "in_experiments": "experiment_id", "numbers": "value"}
    return ", ".join(f"{_joined(array.format(column))} AS {name}" for name, column in columns.items())


def _joined(array: str) -> str:
    return f"arrayStringConcat(arrayMap(one -> toString(one), {array}), '{_SEPARATOR_SQL}')"
