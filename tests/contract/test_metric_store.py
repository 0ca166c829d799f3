"""The metric store: identity of points, last values, history and predicates, on chDB and over ClickHouse's HTTP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlplat.errors import Unavailable
from mlplat.metrics import queries, ranking
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.ranking import SEPARATOR, MetricTest
from mlplat.metrics.store import MetricStore
from tests.contract.chdb import chdb_url, stored, stored_points, unique, unique_number

INF = math.inf
NAN = math.nan
BIG = 2**63 - 1


class Probe:
    """Writes to runs of one experiment and reads them back."""

    def __init__(self, store: MetricStore) -> None:
        self.store = store
        self.experiment = unique_number()
        self.run = unique("run")

    def write(self, *points: Point, run: str | None = None) -> None:
        self.store.insert(stored(self.experiment, run or self.run, points))

    def latest(self, key: str = "m", run: str | None = None) -> tuple[float, int, int]:
        rows = self.store.query(queries.latest([run or self.run])).to_pylist()
        [row] = [row for row in rows if row["key"] == key]
        return row["value"], row["step"], row["timestamp"]

    def history(self, limit: int = 1000, after: tuple[int, int, float] | None = None) -> list[tuple[int, int, float]]:
        rows = self.store.query(queries.history(self.run, "m", limit, after)).to_pylist()
        return [(row["timestamp"], row["step"], row["value"]) for row in rows]

    def matching(self, comparator: str, value: float, key: str = "m") -> set[str]:
        return self.passing(MetricTest(key, "last", comparator, value))

    def passing(self, *tests: MetricTest) -> set[str]:
        """The runs that pass; asked for by name, they are the same."""
        everybody = self.store.query(Statement(
            "SELECT DISTINCT run_id FROM metric_latest WHERE experiment_id = {experiment:Int64}",
            {"experiment": self.experiment},
        ))["run_id"].to_pylist()  # fmt: skip
        found, named = (
            set(self.store.query(statement).to_pylist()[0]["run_ids"].split(SEPARATOR)) - {""}
            for statement in (ranking.matching([self.experiment], tests), ranking.passing(everybody, tests))
        )
        assert named == found
        return found


@pytest.fixture
def probe(metric_store: MetricStore) -> Probe:
    return Probe(metric_store)


def _points(rows: Iterable[tuple[int, int, float]]) -> list[Point]:
    return [Point("m", value, step=step, timestamp=timestamp) for timestamp, step, value in rows]


def test_creating_the_tables_again_keeps_the_points(probe: Probe) -> None:
    probe.write(Point("m", 1.0, 1, 1))
    probe.store.create_tables()
    assert probe.history() == [(1, 1, 1.0)]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        # (step, timestamp, value), the greatest of which counts whatever the order of writing
        ([(1, 9, 9.0), (2, 1, 1.0)], (1.0, 2, 1)),
        ([(2, 1, 1.0), (1, 9, 9.0)], (1.0, 2, 1)),
        ([(1, 5, 9.0), (1, 6, 1.0)], (1.0, 1, 6)),
        ([(1, 6, 1.0), (1, 5, 9.0)], (1.0, 1, 6)),
        ([(1, 5, 5.0), (1, 5, 3.0)], (5.0, 1, 5)),
        ([(1, 5, 3.0), (1, 5, 5.0)], (5.0, 1, 5)),
        ([(-3, 5, 1.0), (-7, 6, 2.0)], (1.0, -3, 5)),
        ([(0, 0, -INF), (0, 0, INF)], (INF, 0, 0)),
        ([(0, 0, -INF)], (-INF, 0, 0)),
        # NaN counts as 0 here
        ([(1, 5, NAN), (1, 5, 1.0)], (1.0, 1, 5)),
        ([(1, 5, NAN), (1, 5, -1.0)], (NAN, 1, 5)),
        ([(1, 5, -1.0), (1, 5, NAN)], (NAN, 1, 5)),
        ([(1, 5, 7.0), (2, 5, NAN)], (NAN, 2, 5)),
        ([(BIG, BIG, 1.0), (-BIG, BIG, 2.0)], (1.0, BIG, BIG)),
    ],
)
@pytest.mark.parametrize("inserts", ["one insert", "many inserts"])
def test_the_last_value_is_the_greatest_by_step_timestamp_and_value(
    probe: Probe, points: Sequence[tuple[int, int, float]], expected: tuple[float, int, int], inserts: str
) -> None:
    written = [Point("m", value, timestamp, step) for step, timestamp, value in points]
    if inserts == "one insert":
        probe.write(*written)
    else:
        for point in written:
            probe.write(point)
    value, step, timestamp = probe.latest()
    assert (step, timestamp) == expected[1:]
    assert value == expected[0] or (math.isnan(value) and math.isnan(expected[0]))


def test_last_values_are_per_key_run_and_experiment(probe: Probe, metric_store: MetricStore) -> None:
    other = Probe(metric_store)
    second = unique("run")
    probe.write(Point("m", 1.0, 1, 1), Point("Größe/x y", 2.0, 1, 1))
    probe.write(Point("m", 3.0, 1, 1), run=second)
    other.write(Point("m", 4.0, 1, 9))
    rows = probe.store.query(queries.latest([probe.run, second])).to_pylist()
    assert [(row["run_id"], row["key"], row["value"]) for row in rows] == sorted(
        [(probe.run, "Größe/x y", 2.0), (probe.run, "m", 1.0), (second, "m", 3.0)],
        key=lambda row: (row[0], row[1].encode()),
    )
    assert other.latest() == (4.0, 9, 1)
    [row] = probe.store.query(ranking.values([probe.experiment], "m", "last")).to_pylist()
    run_ids, numbers = row["run_ids"].split(SEPARATOR), row["numbers"].split(SEPARATOR)
    assert dict(zip(run_ids, map(float, numbers), strict=True)) == {probe.run: 1.0, second: 3.0}
    assert set(row["in_experiments"].split(SEPARATOR)) == {str(probe.experiment)}


def test_exact_repeats_collapse_and_other_values_do_not(probe: Probe) -> None:
    points = _points([(1, 1, 1.0), (1, 1, 2.0), (1, 2, 1.0), (2, 1, 1.0), (1, 1, NAN), (1, 1, INF)])
    for _repeat in range(3):
        probe.write(*points)
    probe.write(*points, *points)
    assert len(probe.history()) == len(points)
    [row] = probe.store.query(stored_points(probe.run)).to_pylist()
    assert row["n"] == len(points)
    assert probe.latest() == (1.0, 2, 1)


def test_values_come_back_bit_for_bit(probe: Probe) -> None:
    values = [0.1, -0.1, 5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 1 / 3, INF, -INF, NAN, 0.0]
    probe.write(*(Point("m", value, 0, step) for step, value in enumerate(values)))
    found = [value for _timestamp, _step, value in probe.history()]
    assert [value.hex() for value in found] == [value.hex() for value in values]


def test_history_is_in_the_order_of_timestamp_step_and_value(probe: Probe) -> None:
    rows = [(2, 0, 1.0), (1, 5, 9.0), (1, -5, 3.0), (1, 5, -INF), (1, 5, INF), (0, 7, 0.0), (BIG, -BIG, 0.0)]
    probe.write(*_points(rows))
    assert probe.history() == sorted(rows)
    assert probe.history(limit=3) == sorted(rows)[:3]


def test_history_is_of_one_run_and_key(probe: Probe) -> None:
    probe.write(Point("m", 1.0, 1, 1), Point("m2", 2.0, 1, 1))
    probe.write(Point("m", 3.0, 1, 1), run=unique("run"))
    assert probe.history() == [(1, 1, 1.0)]
    assert probe.store.query(queries.history(unique("none"), "m", 10)).num_rows == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_paging_the_history_shows_every_point_once_while_points_arrive(probe: Probe, limit: int) -> None:
    rows = sorted([(t, s, v) for t in (1, 2) for s in (-1, 0, 1) for v in (-INF, 0.5, INF)])
    probe.write(*_points(rows))
    seen: list[tuple[int, int, float]] = []
    page = probe.history(limit)
    while page:
        seen += page
        probe.write(Point("m", 0.0, 0, 0))  # before where the reader is: its next page must not move
        page = probe.history(limit, seen[-1])
    assert seen == rows


def test_a_summary_has_the_last_point_and_the_extremes(probe: Probe) -> None:
    probe.write(*_points([(1, 1, 3.0), (2, 2, -1.0), (3, 3, NAN), (4, 0, 9.0)]))
    probe.write(*_points([(3, 3, 2.0)]))
    probe.write(Point("nan", NAN, 1, 1), Point("inf", -INF, 1, 1), Point("inf", 0.0, 2, 2))
    rows = probe.store.query(queries.summaries([probe.run], 10)).to_pylist()
    found = {row.pop("key"): row for row in rows}
    assert list(found) == ["inf", "m", "nan"]
    assert found["m"] == {
        "run_id": probe.run, "value": 2.0, "step": 3, "timestamp": 3, "min_value": -1.0, "max_value": 9.0,
    }  # fmt: skip
    assert (found["inf"]["value"], found["inf"]["min_value"], found["inf"]["max_value"]) == (0.0, -INF, 0.0)
    assert found["nan"]["min_value"] > found["nan"]["max_value"]
    assert probe.store.query(queries.summaries([probe.run], 2)).num_rows == 2


def test_predicates_compare_the_last_value(probe: Probe) -> None:
    runs = {name: unique(name) for name in ("low", "high", "nan", "inf", "was-high")}
    probe.write(Point("m", 0.5, 1, 1), run=runs["low"])
    probe.write(Point("m", 0.9, 1, 1), run=runs["high"])
    probe.write(Point("m", 0.99, 1, 1), Point("m", NAN, 2, 2), run=runs["nan"])
    probe.write(Point("m", INF, 1, 1), run=runs["inf"])
    probe.write(Point("m", 0.9, 1, 1), Point("m", 0.1, 2, 2), run=runs["was-high"])
    probe.write(Point("other", 0.9, 1, 1), run=unique("other"))
    for comparator, value, expected in (
        ("=", 0.9, {"high"}),
        ("!=", 0.9, {"low", "nan", "inf", "was-high"}),
        (">", 0.5, {"high", "inf"}),
        (">=", 0.5, {"low", "high", "inf"}),
        ("<", 0.5, {"was-high"}),
        ("<=", 0.5, {"low", "was-high"}),
        ("=", INF, {"inf"}),
        ("<", INF, {"low", "high", "was-high"}),
        (">", -INF, {"low", "high", "inf", "was-high"}),
    ):
        assert probe.matching(comparator, value) == {runs[name] for name in expected}, (comparator, value)


def test_predicates_look_into_the_named_experiments_only(probe: Probe, metric_store: MetricStore) -> None:
    other = Probe(metric_store)
    probe.write(Point("m", 1.0, 1, 1))
    other.write(Point("m", 1.0, 1, 1))
    assert probe.matching("=", 1.0) == {probe.run}
    [row] = probe.store.query(ranking.matching([], [MetricTest("m", "last", "=", 1.0)])).to_pylist()
    assert row["run_ids"] == ""


def test_tests_of_several_metrics_and_aggregates_hold_together(probe: Probe) -> None:
    one, two, nan = unique("one"), unique("two"), unique("nan")
    probe.write(Point("a", 1.0, 1, 1), Point("a", 5.0, 1, 2), Point("b", 2.0, 1, 1), run=one)
    probe.write(Point("a", 3.0, 1, 1), Point("a", NAN, 1, 2), run=two)
    probe.write(Point("a", NAN, 1, 1), run=nan)
    assert probe.passing(MetricTest("a", "min", "<", 2.0)) == {one}
    assert probe.passing(MetricTest("a", "max", ">=", 3.0)) == {one, two}
    assert probe.passing(MetricTest("a", "max", "!=", 3.0)) == {one, nan}  # NaN differs from every number
    assert probe.passing(MetricTest("a", "last", "IN", (5.0, 6.0)), MetricTest("b", "last", "=", 2.0)) == {one}
    assert probe.passing(MetricTest("a", "last", "NOT IN", (5.0,))) == {two, nan}
    assert probe.passing(MetricTest("a", "last", "=", 5.0), MetricTest("b", "last", "=", 3.0)) == set()


def test_rows_that_are_not_merged_yet_count_as_one(probe: Probe) -> None:
    two = unique("two")
    for written in ([(1, 5, 9.0), (2, 5, 1.0)], [(2, 5, NAN)], [(2, 4, 7.0)], [(-1, 9, -3.0)]):
        probe.write(*(Point(key, value, at, step) for key in ("a", "b") for step, at, value in written))
    probe.write(Point("a", 1.0, 5, 2), Point("b", 1.0, 5, 2), run=two)
    last, both = MetricTest("a", "last", "=", 1.0), {probe.run, two}
    assert probe.passing(last) == both  # of one step and time, the greatest; NaN counts as 0
    assert probe.passing(last, MetricTest("b", "last", "=", 1.0)) == both
    assert probe.passing(last, MetricTest("b", "min", "=", -3.0), MetricTest("b", "max", "=", 9.0)) == {probe.run}
    assert probe.passing(MetricTest("a", "last", "!=", 0.0), MetricTest("c", "min", "!=", 5.0)) == set()
    for key, aggregate, number in (("a", "last", 1.0), ("b", "min", -3.0), ("b", "max", 9.0)):
        [row] = probe.store.query(
            ranking.ordered([probe.experiment], key, aggregate, True, (last,), 9, None)
        ).to_pylist()
        numbers = dict(zip(row["run_ids"].split(SEPARATOR), row["numbers"].split(SEPARATOR), strict=True))
        assert (float(numbers[probe.run]), float(numbers[two]), row["found"]) == (number, 1.0, 2)


@pytest.mark.parametrize("ascending", [True, False])
def test_values_come_in_order_in_slices_with_ties_and_nan_last(probe: Probe, ascending: bool) -> None:
    written = [0.5, 2.0, 2.0, 2.0, -INF, INF, NAN, NAN, -1.0]
    runs = {unique(str(number)): value for number, value in enumerate(written)}
    for run, value in runs.items():
        probe.write(Point("m", value, 1, 1), run=run)
    seen: list[str] = []
    start: tuple[float, bool] | None = None
    while True:
        statement = ranking.ordered([probe.experiment], "m", "last", ascending, (), 2, start)
        [row] = probe.store.query(statement).to_pylist()
        found = row["run_ids"].split(SEPARATOR) if row["found"] else []
        assert row["numbers"].split(SEPARATOR) == [f"{runs[run]:g}" for run in found] or not found
        seen += sorted(found, key=lambda run: (math.isnan(runs[run]), runs[run] if ascending else -runs[run]))
        if row["found"] < 2:
            break
        start = row["last"], True
    assert len(seen) == len(set(seen)) == len(written)
    numbers = sorted((value for value in written if not math.isnan(value)), reverse=not ascending)
    assert [str(runs[run]) for run in seen] == [str(value) for value in [*numbers, NAN, NAN]]


@pytest.mark.parametrize("hostile", ["'); DROP TABLE metric_points; --", "a\\'b", "{value:Float64}", "%(x)s", '`"\n\t'])
def test_hostile_text_is_data(probe: Probe, hostile: str) -> None:
    run = unique(hostile)
    probe.write(Point(hostile, 1.5, 1, 1), run=run)
    assert probe.latest(hostile, run)[0] == 1.5
    assert probe.store.query(queries.history(run, hostile, 10)).num_rows == 1
    assert probe.matching(">", 1.0, hostile) == {run}


def test_a_refused_statement_is_unavailable_and_the_store_goes_on(probe: Probe) -> None:
    with pytest.raises(Unavailable, match="the metric store refused"):
        probe.store.query(Statement("SELECT nonsense FROM nowhere"))
    probe.write(Point("m", 1.0, 1, 1))
    assert probe.history() == [(1, 1, 1.0)]


def test_threads_write_and_read_at_the_same_time(probe: Probe) -> None:
    def work(number: int) -> int:
        probe.write(*(Point("m", float(index), index, number) for index in range(50)))
        return len(probe.history(10_000))

    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(work, range(12)))
    assert all(count >= 50 for count in seen)
    assert len(probe.history(10_000)) == 600


def test_closing_one_store_object_leaves_the_others_open(probe: Probe, metric_url: str) -> None:
    other = MetricStore(metric_url)
    assert other.query(Statement("SELECT 1 AS one")).to_pylist() == [{"one": 1}]
    other.close()
    probe.write(Point("m", 1.0, 1, 1))
    assert probe.history() == [(1, 1, 1.0)]


def test_queries_of_the_embedded_store_use_every_core() -> None:
    plan = MetricStore(chdb_url()).query(
        Statement("EXPLAIN PIPELINE SELECT number % 7 AS rest, count() FROM numbers_mt(10000000) "
                  "GROUP BY rest SETTINGS max_threads = 2")
    )  # fmt: skip
    assert any("× 2" in line for line in plan["explain"].to_pylist())


def test_the_embedded_store_knows_its_free_space() -> None:
    store = MetricStore(chdb_url())
    assert store.is_embedded
    free = store.free_bytes()
    assert free is not None
    assert free > 0
    assert MetricStore("clickhouse://somewhere").free_bytes() is None
