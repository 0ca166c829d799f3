"""Reading the curves of many runs and keys at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from mlplat.errors import InvalidInput
from mlplat.metrics import queries
from mlplat.metrics.downsample import Axis, Buckets, Ends, Selection, bucketed, overview, whole
from mlplat.metrics.queries import Statement

#: Series of one request, and buckets of all its series together; each bucket gives up to four points.
MAX_SERIES = 1_000
MAX_BUCKETS = 500_000
#: Exact repeats of a point stay until they are merged. A series with more than so many rows for each point that it may
#: have counts as long, however few of them differ.
MAX_STORED = 4

#: Run and key.
Name = tuple[str, str]
Query = Callable[[Statement], Awaitable[pa.Table]]


@dataclass(frozen=True)
class RunOrigin:
    """What drawing a run's curves needs to know of it; ``started_ms`` is ms since the epoch."""

    run_id: str
    started_ms: int


@dataclass(frozen=True)
class CurveRequest:
    """Keys may hold ``*`` (anything) and ``?`` (one character). ``start`` and ``end`` bound the axis, both included."""

    runs: Sequence[RunOrigin]
    keys: Sequence[str]
    axis: Axis
    start: int | None
    end: int | None
    buckets: int


@dataclass(frozen=True)
class Curve:
    """One series in the order of the axis; ``exact`` when these are all of its points in the range.

    The arrays (int64, int64, float64) have one length. ``origin_ms`` is where the relative axis starts.
    """

    run_id: str
    key: str
    origin_ms: int
    exact: bool
    steps: pa.Array
    timestamps: pa.Array
    values: pa.Array


@dataclass(frozen=True)
class Curves:
    """Curves in the order of the runs asked for, then of their keys; ``buckets`` is None when all are exact."""

    axis: Axis
    buckets: Buckets | None
    curves: list[Curve]


async def read_curves(query: Query, request: CurveRequest) -> Curves:
    """The curves that have points in the range; three or four statements, however many there are.

    Raises:
        InvalidInput: the range is empty, or the answer would be too large.
        Unavailable: the metric store is away.
    """
    if request.start is not None and request.end is not None and request.start > request.end:
        raise InvalidInput(f"start ({request.start}) lies behind end ({request.end})")
    selection = await _select(query, request)
    found = (await query(overview(selection))).to_pylist() if selection.keys else []
    if not found:
        return Curves(request.axis, None, [])
    lowest, highest = min(row["lowest"] for row in found), max(row["highest"] for row in found)
    # Points that arrive meanwhile may lie outside of these: they belong to the next answer.
    selection = replace(selection, start=lowest, end=highest)
    long = {(row["run_id"], row["key"]) for row in found if row["points"] > MAX_STORED * request.buckets}
    curves: dict[Name, Curve] = {}
    if short := {(row["run_id"], row["key"]) for row in found} - long:
        narrow = _narrow(selection, short)
        points = await query(whole(narrow, request.buckets))
        dense = points.filter(points["dense"].cast(pa.bool_()))
        long |= {narrow.series(number) for number in dense["series"].to_pylist()} & short
        curves |= _curves(narrow, points, short - long, exact=True)
    buckets = None
    if long:
        buckets = Buckets.over(lowest, highest, request.buckets)
        narrow = _narrow(selection, long)
        curves |= _curves(narrow, await query(bucketed(narrow, buckets, _ends(found))), long, exact=False)
    order = {run_id: place for place, run_id in enumerate(selection.run_ids)}
    return Curves(
        request.axis, buckets, [curves[name] for name in sorted(curves, key=lambda name: (order[name[0]], name[1]))]
    )


def _ends(found: Sequence[dict[str, int]]) -> Ends:
    main, other = (
        (min(row[f"{name}_low"] for row in found), max(row[f"{name}_high"] for row in found))
        for name in ("main", "other")
    )
    return Ends(main, other)


async def _select(query: Query, request: CurveRequest) -> Selection:
    """The runs and keys that exist."""
    run_ids = [run.run_id for run in request.runs]
    series = await query(queries.series(run_ids, request.keys, MAX_SERIES + 1))
    if series.num_rows > MAX_SERIES:
        raise InvalidInput(f"these runs have more than {MAX_SERIES} series with such keys; ask for fewer runs or keys")
    if series.num_rows * request.buckets > MAX_BUCKETS:
        raise InvalidInput(
            f"{series.num_rows} series of {request.buckets} buckets are more than {MAX_BUCKETS} buckets in all; "
            f"ask for at most {MAX_BUCKETS // series.num_rows} buckets"
        )
    known = set(series["run_id"].to_pylist())
    runs = [run for run in request.runs if run.run_id in known]
    keys = sorted(set(series["key"].to_pylist()))
    return Selection(
        [run.run_id for run in runs], [run.started_ms for run in runs], keys, request.axis, request.start, request.end
    )


def _narrow(selection: Selection, names: Collection[Name]) -> Selection:
    """The smallest selection of runs and keys that holds these series."""
    runs, keys = {run_id for run_id, _key in names}, {key for _run_id, key in names}
    kept = [place for place, run_id in enumerate(selection.run_ids) if run_id in runs]
    return replace(
        selection,
        run_ids=[selection.run_ids[place] for place in kept],
        origins=[selection.origins[place] for place in kept],
        keys=sorted(keys),
    )


def _curves(selection: Selection, table: pa.Table, wanted: Collection[Name], *, exact: bool) -> dict[Name, Curve]:
    """Those of the rows that are wanted."""
    columns = [table[name].combine_chunks() for name in ("steps", "timestamps", "values")]
    origins = dict(zip(selection.run_ids, selection.origins, strict=True))
    curves = {}
    for row, number in enumerate(table["series"].to_pylist()):
        run_id, key = name = selection.series(number)
        if name in wanted:
            curves[name] = Curve(run_id, key, origins[run_id], exact, *(column[row].values for column in columns))
    return curves
