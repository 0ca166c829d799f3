"""Curves for plotting, as statements: every point of a short series, the telling points of a long one.

Nothing is averaged. A bucket keeps real points: the first, the last, the lowest and the highest. NaN,
inf and -inf are kept the same way beside the finite values, so neither hides the other. All series of
one request share their bucket edges. No FINAL is needed: a point that was stored twice changes
neither a set nor a minimum or maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from mlplat.metrics.packing import sortable_float, sortable_int, unsort_float, unsort_int
from mlplat.metrics.queries import Statement


class Axis(StrEnum):
    """What a curve is drawn over: steps, wall time (ms), or ms since its run started."""

    STEP = "step"
    TIMESTAMP = "timestamp"
    RELATIVE = "relative"


@dataclass(frozen=True)
class Selection:
    """Series to read: each of ``run_ids`` with each of ``keys``.

    ``origins`` are the starts of the runs in ms since the epoch. ``start`` and ``end`` bound the axis,
    both included.
    """

    run_ids: Sequence[str]
    origins: Sequence[int]
    keys: Sequence[str]
    axis: Axis
    start: int | None = None
    end: int | None = None

    def series(self, number: int) -> tuple[str, str]:
        """``(run_id, key)`` of a series' number in the rows of a statement."""
        return self.run_ids[number // len(self.keys)], self.keys[number % len(self.keys)]


@dataclass(frozen=True)
class Buckets:
    """At most ``count`` buckets of ``width``, the first of which starts at ``start``."""

    start: int
    width: int
    count: int

    @classmethod
    def over(cls, lowest: int, highest: int, count: int) -> Buckets:
        """Buckets that hold ``lowest`` to ``highest``; ``count`` is at least 2, so that the width fits 64 bits."""
        return cls(lowest, (highest - lowest) // count + 1, count)


_FIRST_INT64 = "toInt64(-9223372036854775808)"
_AXES = {
    Axis.STEP: "step",
    Axis.TIMESTAMP: "timestamp",
    # A time so early that the difference would leave 64 bits counts as the earliest there is.
    Axis.RELATIVE: f"greatest(timestamp, {_FIRST_INT64} + origin) - origin",
}
#: Kinds of values, each of which has its own first, last, lowest and highest point in a bucket.
_KINDS = 4


@dataclass(frozen=True)
class Ends:
    """The least and the greatest of the axis' own number and of the other one (step and timestamp, or the reverse)."""

    main: tuple[int, int]
    other: tuple[int, int]


def overview(selection: Selection) -> Statement:
    """Rows ``(run_id, key, points, lowest, highest, main_low, main_high, other_low, other_high)``.

    One per series with points in range, ``lowest`` and ``highest`` are its ends on the axis. ``points`` counts one
    that was stored several times as often.
    """
    source, parameters = _points(selection, numbered=False)
    # In the order of the table, so that no row's run has to be looked up in a hash table.
    return Statement(
        f"""
        SELECT run_id, key, count() AS points, min(x) AS lowest, max(x) AS highest, min(main) AS main_low,
               max(main) AS main_high, min(other) AS other_low, max(other) AS other_high
        FROM ({source}) GROUP BY run_id, key SETTINGS optimize_aggregation_in_order = 1
        """,  # noqa: S608 - literals of this module
        parameters,
        tuple(selection.run_ids),
        reads_points=True,
    )


def whole(selection: Selection, limit: int) -> Statement:
    """Rows ``(series, dense, steps, timestamps, values)``: a series of at most ``limit`` points in the axis' order.

    Of any other, ``dense`` is true and the lists are empty.
    """
    source, parameters = _points(selection)
    step, timestamp = (1, 2) if selection.axis is Axis.STEP else (2, 1)
    return Statement(
        f"""
        SELECT series, dense, arrayMap(p -> p.{step}, points) AS steps,
               arrayMap(p -> p.{timestamp}, points) AS timestamps, arrayMap(p -> p.3, points) AS values
        FROM (
            SELECT series, groupUniqArray({limit + 1:d})((main, other, number)) AS found,
                   length(found) > {limit:d} AS dense, if(dense, [], arraySort(found)) AS points
            FROM ({source}) GROUP BY series
        )
        """,  # noqa: S608 - literals of this module and integers; an aggregate's parameter cannot be bound
        parameters,
        tuple(selection.run_ids),
        reads_points=True,
    )


#: Places of so many bits fit 64; a shift by all of them is left to the wide ones.
_NARROW = 63


@dataclass(frozen=True)
class _Place:
    """How a point's (main, other) becomes one unsigned integer of the same order, and back.

    ``wide`` makes an integer that has room for a value's 64 bits as well.
    """

    bits: int
    wide: str
    packed: str
    main: str
    other: str

    @classmethod
    def within(cls, ends: Ends) -> _Place:
        """The narrower the faster: 64 bits are enough unless both ranges are vast."""
        (main_low, main_high), (other_low, other_high) = ends.main, ends.other
        shift = (other_high - other_low).bit_length()
        if (main_high - main_low).bit_length() + shift > _NARROW:
            packed = f"bitOr(bitShiftLeft(toUInt128({sortable_int('main')}), 64), {sortable_int('other')})"
            return cls(128, "toUInt256", packed, unsort_int("bitShiftRight(place, 64)"), unsort_int("place"))
        main, other = (
            f"reinterpretAsUInt64({column} - {_int64(low)})"
            for column, low in (("main", main_low), ("other", other_low))
        )
        return cls(
            64,
            "toUInt128",
            f"bitOr(bitShiftLeft({main}, {shift}), {other})",
            f"reinterpretAsInt64(bitShiftRight(place, {shift})) + {_int64(main_low)}",
            f"reinterpretAsInt64(bitAnd(place, toUInt64({2**shift - 1}))) + {_int64(other_low)}",
        )


def _int64(number: int) -> str:
    return f"toInt64({number:d})"


def bucketed(selection: Selection, buckets: Buckets, ends: Ends) -> Statement:
    """Rows ``(series, steps, timestamps, values)``: each bucket's telling points, in the order of the axis.

    Points outside of ``ends`` are left out. A point is packed into one wide integer whose order is the wanted one, so
    that plain ``min`` and ``max`` give whole points, the same ones every time: ``by_place`` is (axis, other axis,
    value), ``by_value`` is (value, axis, other axis). This is ten times as fast as ``argMin`` over tuples.
    """
    source, parameters = _points(selection, ends=ends)
    place = _Place.within(ends)
    steps, timestamps = (place.main, place.other) if selection.axis is Axis.STEP else (place.other, place.main)
    return Statement(
        f"""
        SELECT series, values, arrayMap(place -> {steps}, places) AS steps,
               arrayMap(place -> {timestamps}, places) AS timestamps
        FROM (
            SELECT series, arrayMap(p -> toUInt{place.bits}(bitShiftRight(p, 64)), points) AS places,
                   arrayMap(p -> {unsort_float("toUInt64(p)")}, points) AS values
            FROM (
                SELECT intDiv(slot, {{slots:UInt64}}) AS series,
                       arraySort(arrayDistinct(groupArrayArray(ends))) AS points
                FROM (
                    SELECT series * {{slots:UInt64}} + bucket * {_KINDS} + kind AS slot,
                           min(by_value) AS low, max(by_value) AS high,
                           [min(by_place), max(by_place), {_place_first("low", place)},
                            {_place_first("high", place)}] AS ends
                    FROM (
                        SELECT series,
                               intDiv(reinterpretAsUInt64(x - {{first:Int64}}), {{width:UInt64}}) AS bucket,
                               multiIf(isFinite(number), 0, isNaN(number), 1, number > 0, 2, 3) AS kind,
                               {sortable_float("number")} AS value_bits, {place.packed} AS place,
                               bitOr(bitShiftLeft({place.wide}(place), 64), value_bits) AS by_place,
                               bitOr(bitShiftLeft({place.wide}(value_bits), {place.bits}), place) AS by_value
                        FROM ({source})
                    ) GROUP BY slot
                ) GROUP BY series
            )
        )
        """,  # noqa: S608 - literals of this module and integers
        parameters | {"first": buckets.start, "width": buckets.width, "slots": buckets.count * _KINDS},
        tuple(selection.run_ids),
        reads_points=True,
    )


def _points(selection: Selection, *, numbered: bool = True, ends: Ends | None = None) -> tuple[str, dict[str, object]]:
    """Rows ``(series, x, main, other, number)``, or with run_id and key unless ``numbered``: ``x`` on the axis,
    ``main`` and ``other`` are step and timestamp, the axis' own first. Equal points are equal bit by bit: there is
    one NaN and one zero."""
    main, other = ("step", "timestamp") if selection.axis is Axis.STEP else ("timestamp", "step")
    bounds = ""
    parameters: dict[str, object] = {"run_ids": list(selection.run_ids), "keys": list(selection.keys)}
    if numbered and len(selection.run_ids) * len(selection.keys) > 1:
        parameters["run_numbers"] = list(range(len(selection.run_ids)))
        parameters["key_numbers"] = list(range(len(selection.keys)))
    origin = ""
    if selection.axis is Axis.RELATIVE and len(selection.run_ids) == 1:
        origin, parameters["origin"] = "{origin:Int64} AS origin,", selection.origins[0]
    elif selection.axis is Axis.RELATIVE:
        origin = "transform(run_id, {run_ids:Array(String)}, {origins:Array(Int64)}, toInt64(0)) AS origin,"
        parameters["origins"] = list(selection.origins)
    for name, comparator, bound in (("start", ">=", selection.start), ("end", "<=", selection.end)):
        if bound is not None:
            bounds += f" AND x {comparator} {{{name}:Int64}}"
            parameters[name] = bound
    for column, within in () if ends is None else (("main", ends.main), ("other", ends.other)):
        bounds += f" AND {column} BETWEEN {{{column}_low:Int64}} AND {{{column}_high:Int64}}"
        parameters[f"{column}_low"], parameters[f"{column}_high"] = within
    source = f"""
        SELECT {f"{_series(selection)} AS series" if numbered else "run_id, key"}, {origin}
               {_AXES[selection.axis]} AS x, {main} AS main, {other} AS other,
               if(isNaN(value), nan, value + 0.) AS number
        FROM metric_points
        WHERE run_id IN {{run_ids:Array(String)}} AND key IN {{keys:Array(String)}}{bounds}
        """  # noqa: S608 - literals of this module
    return source, parameters


def _series(selection: Selection) -> str:
    """The number of a row's series; looking it up is worth a fifth of the query, so a single one goes without."""
    if len(selection.run_ids) * len(selection.keys) == 1:
        return "toUInt64(0)"
    return (
        "transform(run_id, {run_ids:Array(String)}, {run_numbers:Array(UInt64)}, toUInt64(0)) * "
        f"{len(selection.keys)} + transform(key, {{keys:Array(String)}}, {{key_numbers:Array(UInt64)}}, toUInt64(0))"
    )


def _place_first(by_value: str, place: _Place) -> str:
    """A ``by_value`` as the same point's ``by_place``."""
    its_place = f"toUInt{place.bits}({by_value})"
    return f"bitOr(bitShiftLeft({place.wide}({its_place}), 64), bitShiftRight({by_value}, {place.bits}))"
