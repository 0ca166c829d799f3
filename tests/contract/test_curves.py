"""Curves against a reference in Python, on a real chDB: nothing is lost, nothing is made up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.metrics import curves
from mlplat.metrics.curves import Curve, CurveRequest, Curves, RunOrigin, read_curves
from mlplat.metrics.downsample import Axis, Buckets
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from tests.contract.chdb import stored, unique, unique_number

INF, NAN = math.inf, math.nan
LOW, HIGH = -(2**63), 2**63 - 1
ORIGIN = 1_000
#: (step, timestamp, value)
Row = tuple[int, int, float]


class Probe:
    """Writes series into one experiment and reads their curves."""

    def __init__(self, store: MetricStore) -> None:
        self.store = store
        self.experiment = unique_number()
        self.statements = 0

    def write(self, rows: Sequence[Row], key: str = "m", run: str | None = None) -> str:
        run = run or unique("run")
        points = [Point(key, value, timestamp, step) for step, timestamp, value in rows]
        self.store.insert(stored(self.experiment, run, points))
        return run

    async def query(self, statement: Statement) -> pa.Table:
        self.statements += 1
        return self.store.query(statement)

    async def read(
        self, runs: Sequence[str], keys: Sequence[str] = ("m",), axis: Axis = Axis.STEP, buckets: int = 10,
        start: int | None = None, end: int | None = None,
    ) -> Curves:  # fmt: skip
        origins = [RunOrigin(run, ORIGIN) for run in runs]
        return await read_curves(self.query, CurveRequest(origins, keys, axis, start, end, buckets))


@pytest.fixture(scope="session")
def probe(metric_store: MetricStore) -> Probe:
    return Probe(metric_store)


def _rows(curve: Curve) -> list[Row]:
    columns = (curve.steps, curve.timestamps, curve.values)
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def _canonical(row: Row) -> tuple[int, int, float | str]:
    """The row with a NaN that equals itself, and one zero."""
    return row[0], row[1], "NaN" if math.isnan(row[2]) else row[2] + 0.0


def _place(axis: Axis, row: Row) -> int:
    if axis is Axis.STEP:
        return row[0]
    return row[1] if axis is Axis.TIMESTAMP else max(row[1], LOW + ORIGIN) - ORIGIN


def _kind(value: float) -> int:
    return 0 if math.isfinite(value) else 1 if math.isnan(value) else 2 if value > 0 else 3


def _telling(axis: Axis, rows: Sequence[Row], buckets: Buckets) -> set[tuple[int, int, float | str]]:
    """The reference: of each bucket and kind of value the first, last, lowest and highest point."""
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[(_place(axis, row) - buckets.start) // buckets.width, _kind(row[2])].append(row)
    assert all(0 <= bucket < buckets.count for bucket, _kind_of in groups)
    kept: set[tuple[int, int, float | str]] = set()
    for group in groups.values():

        def by_place(row: Row) -> tuple[int, int, float]:
            other = row[1] if axis is Axis.STEP else row[0]
            main = row[0] if axis is Axis.STEP else row[1]
            return main, other, 0.0 if math.isnan(row[2]) else row[2]

        def by_value(row: Row) -> tuple[float, int, int]:
            main, other, value = by_place(row)
            return value, main, other

        for row in (min(group, key=by_place), max(group, key=by_place), min(group, key=by_value),
                    max(group, key=by_value)):  # fmt: skip
            kept.add(_canonical(row))
    return kept


def _check(found: Curves, written: Sequence[Row], axis: Axis, limit: int, start: int | None, end: int | None) -> None:
    """The one curve that was read is what the reference makes of what was written."""
    distinct = {_canonical(row): row for row in written}
    inside = [
        row
        for row in distinct.values()
        if (start is None or _place(axis, row) >= start) and (end is None or _place(axis, row) <= end)
    ]
    if not inside:
        assert found.curves == []
        return
    [curve] = found.curves
    shown = _rows(curve)
    assert [_place(axis, row) for row in shown] == sorted(_place(axis, row) for row in shown)
    assert len({_canonical(row) for row in shown}) == len(shown)
    assert curve.exact == (len(inside) <= limit)
    if curve.exact:
        assert {_canonical(row) for row in shown} == {_canonical(row) for row in inside}
        return
    assert found.buckets is not None
    assert found.buckets.start == min(_place(axis, row) for row in inside)
    assert {_canonical(row) for row in shown} == _telling(axis, inside, found.buckets)


int64 = st.one_of(
    st.integers(-20, 20), st.integers(-(10**6), 10**6), st.integers(LOW, HIGH), st.sampled_from([LOW, HIGH, 0, ORIGIN])
)
number = st.one_of(st.floats(width=64), st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0]), st.floats(-1, 1))
bound = st.one_of(st.none(), int64)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(int64, int64, number), max_size=60),
    twice=st.booleans(),
    axis=st.sampled_from(Axis),
    limit=st.sampled_from([2, 3, 7, 50]),
    start=bound,
    end=bound,
)
async def test_a_curve_is_what_the_reference_says(
    probe: Probe, rows: list[Row], twice: bool, axis: Axis, limit: int, start: int | None, end: int | None
) -> None:
    if start is not None and end is not None and start > end:
        start, end = end, start
    run = probe.write(rows + rows[: len(rows) // 2])
    if twice:
        probe.write(rows, run=run)  # parts that are not merged yet
    _check(await probe.read([run], axis=axis, buckets=limit, start=start, end=end), rows, axis, limit, start, end)


async def test_a_series_without_points_has_no_curve(probe: Probe) -> None:
    run = probe.write([(1, 1, 1.0)])
    assert (await probe.read([run], ["nobody"])).curves == []
    assert (await probe.read([unique("nobody")])).curves == []
    assert (await probe.read([run], start=2)).curves == []


@pytest.mark.parametrize("value", [1.5, NAN, INF, -INF])
async def test_one_point_is_a_curve(probe: Probe, value: float) -> None:
    run = probe.write([(3, 7, value)])
    found = await probe.read([run])
    assert found.buckets is None
    assert [_canonical(row) for row in _rows(found.curves[0])] == [_canonical((3, 7, value))]


async def test_a_spike_a_dip_and_a_nan_show_among_many_points(probe: Probe) -> None:
    rows = [(step, step, 1.0) for step in range(5_000)]
    odd = [(1_234, 1_234, 1e9), (2_345, 2_345, -1e9), (2_346, 2_346, NAN), (3_456, 3_456, INF)]
    for row in odd:
        rows[row[0]] = row
    [curve] = (await probe.read([probe.write(rows)], buckets=10)).curves
    assert not curve.exact
    assert {_canonical(row) for row in odd} < {_canonical(row) for row in _rows(curve)}
    assert _rows(curve)[0] == rows[0]
    assert _rows(curve)[-1] == rows[-1]
    assert len(_rows(curve)) <= 10 * 4 + 2


async def test_points_stored_twice_do_not_make_a_series_dense(probe: Probe) -> None:
    rows = [(step, step, float(step)) for step in range(10)]
    run = probe.write(rows + rows)
    probe.write(rows, run=run)
    [curve] = (await probe.read([run], buckets=10)).curves
    assert curve.exact
    assert _rows(curve) == rows


async def test_many_series_share_their_edges_and_come_in_order(probe: Probe) -> None:
    runs = [probe.write([(step, step, 0.5) for step in range(start, start + 300)], "acc") for start in (100, 0)]
    probe.write([(5, 5, 1.0)], "loss", runs[0])
    before = probe.statements
    found = await probe.read(runs, ["acc", "loss"], buckets=4)
    assert probe.statements - before == 4
    assert found.buckets == Buckets(start=0, width=100, count=4)
    assert [(curve.run_id, curve.key, curve.exact) for curve in found.curves] == [
        (runs[0], "acc", False), (runs[0], "loss", True), (runs[1], "acc", False),
    ]  # fmt: skip
    edges = [{step // 100 for step in curve.steps.to_pylist()} for curve in found.curves]
    assert edges == [{1, 2, 3}, {0}, {0, 1, 2}]


async def test_zooming_shows_every_point_of_the_range(probe: Probe) -> None:
    rows = [(step, 10 * step, float(step)) for step in range(-500, 500)]
    run = probe.write(rows)
    assert not (await probe.read([run])).curves[0].exact
    [curve] = (await probe.read([run], start=-3, end=4)).curves
    assert (curve.exact, _rows(curve)) == (True, rows[497:505])
    [curve] = (await probe.read([run], axis=Axis.TIMESTAMP, start=4_950)).curves
    assert _rows(curve) == rows[-5:]
    [curve] = (await probe.read([run], axis=Axis.RELATIVE, end=-5_980)).curves
    assert (curve.origin_ms, _rows(curve)) == (ORIGIN, rows[:3])


async def test_the_time_axes_order_points_by_time(probe: Probe) -> None:
    run = probe.write([(2, 10, 1.0), (1, 20, 2.0), (3, 5, 3.0)])
    for axis in (Axis.TIMESTAMP, Axis.RELATIVE):
        [curve] = (await probe.read([run], axis=axis)).curves
        assert _rows(curve) == [(3, 5, 3.0), (2, 10, 1.0), (1, 20, 2.0)]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], {"train/loss", "train/acc", "val_loss", "val-loss", "100%"}),
        (["train/*"], {"train/loss", "train/acc"}),
        (["*loss"], {"train/loss", "val_loss", "val-loss"}),
        (["val?loss"], {"val_loss", "val-loss"}),
        (["val_*"], {"val_loss"}),
        (["100%"], {"100%"}),
        (["100%*", "nobody"], {"100%"}),
        (["train/loss", "*acc"], {"train/loss", "train/acc"}),
        (["train"], set()),
        (["tr\\*", "'; --*"], set()),
    ],
)
async def test_keys_are_exact_or_patterns(probe: Probe, patterns: list[str], expected: set[str]) -> None:
    run = unique("run")
    for key in ("train/loss", "train/acc", "val_loss", "val-loss", "100%"):
        probe.write([(0, 0, 0.0)], key, run)
    assert {curve.key for curve in (await probe.read([run], patterns)).curves} == expected


async def test_what_is_too_much_is_refused_before_it_is_read(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    run = unique("run")
    for key in "abc":
        probe.write([(0, 0, 0.0)], key, run)
    with pytest.raises(InvalidInput, match="lies behind"):
        await probe.read([run], start=1, end=0)
    monkeypatch.setattr(curves, "MAX_BUCKETS", 25)
    with pytest.raises(InvalidInput, match="at most 8 buckets"):
        await probe.read([run], ["*"])
    assert len((await probe.read([run], ["*"], buckets=8)).curves) == 3
    monkeypatch.setattr(curves, "MAX_SERIES", 2)
    with pytest.raises(InvalidInput, match="more than 2 series"):
        await probe.read([run], ["*"], buckets=2)


def test_buckets_fit_64_bits_and_hold_their_ends() -> None:
    for count in (2, 3, 10_000):
        for lowest, highest in ((0, 0), (0, 1), (-5, 5), (LOW, HIGH), (LOW, LOW), (HIGH, HIGH), (0, count), (1, count)):
            buckets = Buckets.over(lowest, highest, count)
            assert 1 <= buckets.width < 2**64
            assert 0 <= (highest - buckets.start) // buckets.width < count
