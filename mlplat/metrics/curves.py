"""Reading the curves of many runs and keys at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from mlplat.errors import InvalidInput
from mlplat.metrics import queries
from mlplat.metrics.downsample import Axis, Buckets, Selection, bucketed, overview
from mlplat.metrics.queries import Statement

#: Series of one request, and buckets of all its series together; each bucket gives up to four points.
MAX_SERIES = 1_000
MAX_BUCKETS = 500_000

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
    """The curves that have points in the range; three statements, however many there are.

    Raises:
        InvalidInput: the range is empty, or the answer would be too large.
        Unavailable: the metric store is away.
    """
    if request.start is not None and request.end is not None and request.start > request.end:
        raise InvalidInput(f"start ({request.start}) lies behind end ({request.end})")
    selection = await _select(query, request)
    if not selection.keys:
        return Curves(request.axis, None, [])
    found = await query(overview(selection, request.buckets))
    origins = dict(zip(selection.run_ids, selection.origins, strict=True))
    is_dense = found["dense"].cast(pa.bool_())
    curves = _curves(selection, origins, found.filter(pc.invert(is_dense)), exact=True)
    dense = found.filter(is_dense)
    if not dense.num_rows:
        return Curves(request.axis, None, list(curves.values()))
    lowest, highest = pc.min(found["lowest"]).as_py(), pc.max(found["highest"]).as_py()
    buckets = Buckets.over(lowest, highest, request.buckets)
    # Points that arrive meanwhile may lie outside of the edges: they belong to the next answer.
    within = replace(_narrow(selection, dense["series"].to_pylist()), start=lowest, end=highest)
    coarse = await query(bucketed(within, buckets))
    wanted = {selection.series(number) for number in dense["series"].to_pylist()}
    curves |= {name: curve for name, curve in _curves(within, origins, coarse, exact=False).items() if name in wanted}
    order = {run_id: place for place, run_id in enumerate(selection.run_ids)}
    return Curves(
        request.axis, buckets, [curves[name] for name in sorted(curves, key=lambda name: (order[name[0]], name[1]))]
    )


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


def _narrow(selection: Selection, numbers: Sequence[int]) -> Selection:
    """The smallest selection of runs and keys that holds these series."""
    names = [selection.series(number) for number in numbers]
    runs, keys = {run_id for run_id, _key in names}, {key for _run_id, key in names}
    kept = [place for place, run_id in enumerate(selection.run_ids) if run_id in runs]
    return replace(
        selection,
        run_ids=[selection.run_ids[place] for place in kept],
        origins=[selection.origins[place] for place in kept],
        keys=sorted(keys),
    )


def _curves(
    selection: Selection, origins: dict[str, int], table: pa.Table, *, exact: bool
) -> dict[tuple[str, str], Curve]:
    columns = {name: table[name].combine_chunks() for name in ("steps", "timestamps", "values")}
    curves = {}
    for row, number in enumerate(table["series"].to_pylist()):
        run_id, key = selection.series(number)
        parts = (columns[name][row].values for name in ("steps", "timestamps", "values"))
        curves[run_id, key] = Curve(run_id, key, origins[run_id], exact, *parts)
    return curves
