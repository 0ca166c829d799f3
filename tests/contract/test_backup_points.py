"""Metric points in a backup: out of one metric store, whichever it is, and into another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from mlplat.backup import points as backup_points
from mlplat.backup.catalog import open_place
from mlplat.backup.model import Backup
from mlplat.backup.points import dump_points, load_points, remove_points, stored_points
from mlplat.backup.tree import Tree
from mlplat.errors import InvalidInput
from mlplat.metrics import queries
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from tests.clickhouse import ClickHouse
from tests.contract.backups import backup_of
from tests.contract.chdb import stored, unique, unique_number

KEYS = ("loss", "system/node/cpu", "é漢 %_", "acc")


@pytest.fixture
def place(tmp_path: Path) -> Tree:
    return open_place(f"file://{tmp_path}/backups")


@pytest.fixture
def empty_store(clickhouse: ClickHouse) -> Iterator[MetricStore]:
    """A metric store of the test's own: chDB has one path per process."""
    store = MetricStore(f"{clickhouse.url}/{unique('restored').replace('-', '_')}")
    store.create_tables()
    yield store
    store.close()


def store_points(store: MetricStore, run_id: str, experiment_id: int, points: list[Point]) -> None:
    store.insert(stored(experiment_id, run_id, points))


def all_points(store: MetricStore, run_ids: list[str]) -> list[dict[str, object]]:
    return [_comparable(row) for row in store.query(queries.points_of(run_ids, 1_000_000)).to_pylist()]


def _comparable(row: dict[str, object]) -> dict[str, object]:
    return {name: "nan" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def backup(store: MetricStore, runs: list[tuple[str, int]], place: Tree) -> Backup:
    count, files = dump_points(store.query, runs, place, "b/")
    return backup_of(points=count, files=files)


@pytest.fixture
def runs(metric_store: MetricStore) -> list[tuple[str, int]]:
    """Runs with points of all kinds; one of them has none."""
    experiments = [unique_number(), unique_number()]
    found = sorted((unique("run"), experiments[number % 2]) for number in range(7))
    for number, (run_id, experiment_id) in enumerate(found[:-1]):
        points = [
            Point(key, float(step * number), 1_700_000_000_000 + step % 3, step - 20)
            for key in KEYS
            for step in range(40)
        ]
        odd = [Point("odd", value, 1, 0) for value in (math.nan, math.inf, -math.inf, 5e-324, 0.1 + 0.2, 1e300)]
        store_points(metric_store, run_id, experiment_id, points + odd)
        store_points(metric_store, run_id, experiment_id, points[:50])  # again
    return found


@pytest.mark.parametrize(("page", "page_runs", "per_file"), [(250_000, 250, 8_000_000), (7, 3, 100), (46, 1, 1)])
def test_points_come_back_as_they_were(
    metric_store: MetricStore,
    runs: list[tuple[str, int]],
    empty_store: MetricStore,
    place: Tree,
    monkeypatch: pytest.MonkeyPatch,
    page: int,
    page_runs: int,
    per_file: int,
) -> None:
    monkeypatch.setattr(backup_points, "PAGE_POINTS", page)
    monkeypatch.setattr(backup_points, "PAGE_RUNS", page_runs)
    monkeypatch.setattr(backup_points, "FILE_POINTS", per_file)
    made = backup(metric_store, runs, place)
    assert made.points == 6 * (len(KEYS) * 40 + 6)
    assert (len(made.points_files) > 1) == (per_file < made.points)
    load_points(empty_store, place, made)
    run_ids = [run_id for run_id, _experiment in runs]
    assert all_points(empty_store, run_ids) == all_points(metric_store, run_ids)


def test_what_summarises_points_is_made_again(
    metric_store: MetricStore, runs: list[tuple[str, int]], empty_store: MetricStore, place: Tree
) -> None:
    load_points(empty_store, place, backup(metric_store, runs, place))
    run_ids = [run_id for run_id, _experiment in runs]
    for statement in (queries.latest(run_ids), queries.summaries(run_ids, 1_000)):
        before, after = (
            [_comparable(row) for row in s.query(statement).to_pylist()] for s in (metric_store, empty_store)
        )
        assert before == after
        assert before
    count = Statement("SELECT experiment_id, uniqExact(run_id, key) AS n FROM metric_latest GROUP BY 1 ORDER BY 1")
    found = {row["experiment_id"]: row["n"] for row in empty_store.query(count).to_pylist()}
    assert found.keys() == {experiment_id for _run, experiment_id in runs[:-1]}
    assert sum(found.values()) == 6 * (len(KEYS) + 1)


def test_a_run_is_restored_into_the_experiment_of_the_snapshot(
    metric_store: MetricStore, runs: list[tuple[str, int]], empty_store: MetricStore, place: Tree
) -> None:
    """It may have been moved since, or the move may not have reached the metric store by then."""
    there = unique_number()
    load_points(empty_store, place, backup(metric_store, [(run_id, there) for run_id, _here in runs], place))
    for table in ("metric_points", "metric_latest"):
        found = empty_store.query(Statement(f"SELECT DISTINCT experiment_id FROM {table}"))
        assert found["experiment_id"].to_pylist() == [there]


def test_points_of_runs_that_the_snapshot_does_not_know_stay_behind(
    metric_store: MetricStore, runs: list[tuple[str, int]], empty_store: MetricStore, place: Tree
) -> None:
    load_points(empty_store, place, backup(metric_store, runs[:2], place))
    found = empty_store.query(Statement("SELECT DISTINCT run_id FROM metric_points ORDER BY run_id"))
    assert found["run_id"].to_pylist() == [run_id for run_id, _experiment in runs[:2]]


def test_no_points_are_a_backup_too(metric_store: MetricStore, empty_store: MetricStore, place: Tree) -> None:
    made = backup(metric_store, [(unique("run"), 1)], place)
    assert (made.points, made.points_files) == (0, [])
    load_points(empty_store, place, made)
    assert stored_points(empty_store) == 0


def test_a_restore_is_repeated_from_the_start(
    metric_store: MetricStore, runs: list[tuple[str, int]], empty_store: MetricStore, place: Tree
) -> None:
    made = backup(metric_store, runs, place)
    store_points(empty_store, "left-over", 1, [Point("loss", 1.0, 1, 1)])
    assert stored_points(empty_store)
    remove_points(empty_store)
    assert stored_points(empty_store) == 0
    load_points(empty_store, place, made)
    found = empty_store.query(Statement("SELECT count() AS n FROM metric_points WHERE run_id = 'left-over'"))
    assert found["n"].to_pylist() == [0]


def test_a_file_with_less_points_than_there_were_is_found_out(
    metric_store: MetricStore, runs: list[tuple[str, int]], empty_store: MetricStore, place: Tree
) -> None:
    made = backup(metric_store, runs, place)
    more = backup_of(points=made.points + 1, files=made.files)
    with pytest.raises(InvalidInput, match=f"has {made.points} metric points, it says that it has {made.points + 1}"):
        load_points(empty_store, place, more)


def test_pages_of_one_long_run_have_no_gap_and_no_overlap(metric_store: MetricStore) -> None:
    run_id = unique("run")
    points = [Point("loss", float(n % 5), n // 9, n // 3 - 50) for n in range(600)]
    store_points(metric_store, run_id, 1, points)
    pages: list[pa.Table] = []
    after = None
    while not pages or pages[-1].num_rows:
        pages.append(metric_store.query(queries.points_of([run_id], 17, after)))
        if pages[-1].num_rows:
            row = pages[-1].slice(pages[-1].num_rows - 1).to_pylist()[0]
            after = (row["run_id"], row["key"], row["step"], row["timestamp"], row["value"])
    found = [(row["step"], row["timestamp"], row["value"]) for page in pages for row in page.to_pylist()]
    assert found == sorted({(point.step, point.timestamp, point.value) for point in points})
