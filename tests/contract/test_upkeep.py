"""What goes by itself and when: checkpoints, logs and consoles past their time, and nothing that somebody needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.console import FOLDER as CONSOLE
from mlplat.artifacts.store import ArtifactStore
from mlplat.backup.connection import connected
from mlplat.backup.rows import lock_removals
from mlplat.db.removals import removing
from mlplat.errors import Overloaded, PlatformError, Unavailable
from mlplat.metrics.model import Archived
from mlplat.storage.guard import StorageGuard
from mlplat.storage.model import Retention
from mlplat.storage.upkeep import Upkeep
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import unique
from tests.contract.lifecycle import NOW
from tests.contract.pipelines import Pipelines

CHECKPOINT, LOG = "checkpoints/train/-1/000001-000001.json", "logs/train/-1/1/0"


@dataclass
class Metrics:
    """A metric shard without points, which notes what it is to archive."""

    asked: list[str] = field(default_factory=list)
    problem: PlatformError | None = None

    async def archive(self, run_ids: Sequence[str]) -> Archived:
        """All of them, it says."""
        if self.problem is not None:
            raise self.problem
        self.asked += run_ids
        return Archived(len(run_ids), 10 * len(run_ids))


@dataclass
class Place:
    """Stores whose runs can be made old."""

    engine: AsyncEngine
    root: Path

    def __post_init__(self) -> None:
        self.store = ArtifactStore(f"file://{self.root}")
        self.guard = StorageGuard(self.engine)
        self.experiments = ExperimentStore(self.engine, "mlflow-artifacts:")
        self.runs = RunStore(self.engine)
        self.metrics = Metrics()

    def upkeep(self, retention: Retention | None = None) -> Upkeep:
        """What collects."""
        return Upkeep(self.engine, self.store, self.guard, self.metrics, retention or Retention(every=None))

    async def execute(self, statement: str, **values: object) -> int:
        """SQL, for what no method does; how many rows it found."""
        async with self.engine.begin() as connection:
            return (await connection.execute(text(statement), values)).rowcount

    async def pipeline_run(self, pipelines: Pipelines, days: int | None, resumed_from: str | None = None) -> str:
        """A pipeline run with a checkpoint and a log, that ended so many days ago; None: it is under way."""
        run_id, _epoch = await pipelines.run(resumed_from=resumed_from)
        for name in (CHECKPOINT, LOG):
            self.store.write(f"pipelines/{run_id}/{name}", [name.encode()])
        if days is not None:
            age = timedelta(days=days)
            ended = "UPDATE pipeline_run SET state = 'FAILED', finished_at = now() - :age WHERE run_id = :run"
            assert await self.execute(ended, age=age, run=run_id) == 1
        return run_id

    async def run(self, experiment_id: int, days: int | None) -> str:
        """A run with a model and a console, that ended so many days ago."""
        run_id = unique("run")
        await self.runs.create(run_id, experiment_id, None, "me", NOW, {})
        for name in (f"{CONSOLE}/host-1-1/0", "model/MLmodel"):
            self.store.write(f"{experiment_id}/{run_id}/artifacts/{name}", [name.encode()])
        if days is not None:
            ended = "UPDATE run SET ended_at = now() - :age WHERE run_id = :run"
            assert await self.execute(ended, age=timedelta(days=days), run=run_id) == 1
        return run_id

    def files(self) -> Mapping[str, bytes]:
        """All that is stored."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}

    def has(self, run_id: str) -> tuple[bool, bool]:
        """Whether a pipeline run has its checkpoint and its log."""
        checkpoint, log = (self.store.has(f"pipelines/{run_id}/{name}") for name in (CHECKPOINT, LOG))
        return checkpoint, log

    def has_console(self, experiment_id: int, run_id: str) -> bool:
        """Whether a run has its console; its model stays in any case."""
        folder = f"{experiment_id}/{run_id}/artifacts"
        assert self.store.has(f"{folder}/model/MLmodel")
        return self.store.has(f"{folder}/{CONSOLE}/host-1-1/0")


@pytest.fixture
def place(engine: AsyncEngine, tmp_path: Path) -> Place:
    return Place(engine, tmp_path / "store")


async def test_checkpoints_go_after_a_week_and_logs_after_a_year(place: Place, pipelines: Pipelines) -> None:
    expected = {
        await place.pipeline_run(pipelines, days): left
        for days, left in ((None, (True, True)), (6, (True, True)), (8, (False, True)), (400, (False, False)))
    }
    place.store.write("pipelines/nobody/checkpoints/train/-1/x", [b"of a run that is not known here"])
    report = (await place.upkeep().collect()).report
    assert {run_id: place.has(run_id) for run_id in expected} == expected
    assert report is not None
    assert (report["expired_checkpoints"], report["expired_logs"]) == (2, 1)
    assert place.store.has("pipelines/nobody/checkpoints/train/-1/x")
    again = (await place.upkeep().collect()).report
    assert again is not None
    assert (again["expired_checkpoints"], again["expired_logs"]) == (0, 0)


async def test_what_a_run_under_way_goes_on_from_stays_however_far_back(place: Place, pipelines: Pipelines) -> None:
    first = await place.pipeline_run(pipelines, 400)
    second = await place.pipeline_run(pipelines, 300, resumed_from=first)
    third = await place.pipeline_run(pipelines, 30, resumed_from=second)
    under_way = await place.pipeline_run(pipelines, None, resumed_from=third)
    other = await place.pipeline_run(pipelines, 30, resumed_from=first)
    await place.upkeep().collect()
    assert {place.has(run_id) for run_id in (first, second, third, under_way)} == {(True, True)}
    assert place.has(other) == (False, True)
    await place.execute("UPDATE pipeline_run SET finished_at = now() WHERE run_id = :run", run=under_way)
    await place.upkeep().collect()
    assert [place.has(run_id) for run_id in (first, second, third)] == [(False, False), (False, True), (False, True)]
    assert place.has(under_way) == (True, True)


async def test_consoles_go_after_a_year_unless_they_are_held(place: Place) -> None:
    held_experiment, experiment = [await place.experiments.create(unique("experiment"), None, {}) for _ in range(2)]
    await place.guard.hold("experiment", str(held_experiment), "audit", "counsel")
    old, young, running, held = [await place.run(experiment, days) for days in (400, 300, None, 400)]
    of_held = await place.run(held_experiment, 400)
    await place.guard.hold("run", held, "case 42", "counsel")
    report = (await place.upkeep().collect()).report
    assert report is not None
    assert report["expired_logs"] == 1
    assert not place.has_console(experiment, old)
    assert all(place.has_console(experiment, run_id) for run_id in (young, running, held))
    assert place.has_console(held_experiment, of_held)


async def test_what_was_held_goes_when_the_hold_is_lifted(place: Place) -> None:
    experiment = await place.experiments.create(unique("experiment"), None, {})
    held = await place.run(experiment, 400)
    await place.guard.hold("run", held, "case 42", "counsel")
    await place.upkeep().collect()
    assert place.has_console(experiment, held)
    await place.guard.lift("run", held)
    await place.upkeep().collect()
    assert not place.has_console(experiment, held)


async def test_a_shorter_time_counts_for_what_is_older(place: Place) -> None:
    experiment = await place.experiments.create(unique("experiment"), None, {})
    run_id = await place.run(experiment, 100)
    await place.upkeep().collect()
    assert place.has_console(experiment, run_id)
    await place.upkeep(Retention(logs=timedelta(days=30), every=None)).collect()
    assert not place.has_console(experiment, run_id)


async def test_a_dry_run_tells_the_same_and_changes_nothing(place: Place, pipelines: Pipelines) -> None:
    experiment = await place.experiments.create(unique("experiment"), None, {})
    await place.guard.set_quota(experiment, 1_000, 7)
    run_id = await place.run(experiment, 400)
    old = await place.pipeline_run(pipelines, 400)
    before = place.files()
    dry = await place.upkeep().collect(dry_run=True)
    assert place.files() == before
    assert [quota.used_bytes for quota in await place.guard.quotas()] == [7]
    assert await place.upkeep().last(finished=True) == []
    real = await place.upkeep().collect()
    assert dry.report is not None
    assert real.report is not None
    expired = ("expired_checkpoints", "expired_logs")
    assert [dry.report[name] for name in expired] == [real.report[name] for name in expired] == [1, 2]
    assert place.has(old) == (False, False)
    assert not place.has_console(experiment, run_id)
    assert [quota.used_bytes for quota in await place.guard.quotas()] != [7]


async def test_nothing_goes_while_a_purge_or_a_backup_is_under_way(
    place: Place, pipelines: Pipelines, database_url: str
) -> None:
    old = await place.pipeline_run(pipelines, 400)
    async with removing(place.engine):
        with pytest.raises(Overloaded, match="a purge, a collection or a backup is under way; retry when it is done"):
            await place.upkeep().collect()
    with connected(database_url, "tests") as backup:
        lock_removals(backup)
        with pytest.raises(Overloaded, match="a purge, a collection or a backup is under way; retry when it is done"):
            await place.upkeep().collect()
    assert place.has(old) == (True, True)
    assert await place.upkeep().last() == []
    assert (await place.upkeep().collect()).finished_at is not None, "both have ended"
    assert place.has(old) == (False, False)


async def test_points_are_archived_a_year_after_the_end_of_their_run(place: Place) -> None:
    experiment = await place.experiments.create(unique("experiment"), None, {})
    ages = (400, 300, None, 500, 500)
    old, _young, _running, back, read_lately = [await place.run(experiment, days) for days in ages]
    for run_id, days in ((back, 8), (read_lately, 6)):
        await place.execute(
            "INSERT INTO metric_archive (run_id, points, bytes, archived_at, hot_since) "
            "VALUES (:run, 1, 1, now(), now() - :age)",
            run=run_id,
            age=timedelta(days=days),
        )
    dry = (await place.upkeep().collect(dry_run=True)).report
    assert dry is not None
    assert (dry["archived_runs"], place.metrics.asked) == (2, [])
    report = (await place.upkeep().collect()).report
    assert report is not None
    assert (report["archived_runs"], report["archived_points"], report["not_archived"]) == (2, 20, None)
    assert sorted(place.metrics.asked) == sorted([old, back])


async def test_many_runs_are_archived_in_batches(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlplat.storage.old_metrics.BATCH", 2)
    experiment = await place.experiments.create(unique("experiment"), None, {})
    run_ids = [await place.run(experiment, 400) for _ in range(5)]
    await place.upkeep().collect()
    assert place.metrics.asked == sorted(run_ids), "each once, though none is recorded as archived"


async def test_artifacts_do_not_wait_for_a_metric_store_that_is_away(place: Place, pipelines: Pipelines) -> None:
    await place.run(await place.experiments.create(unique("experiment"), None, {}), 400)
    old = await place.pipeline_run(pipelines, 400)
    place.metrics.problem = Unavailable("the metric store is away")
    report = (await place.upkeep().collect()).report
    assert report is not None
    assert (report["archived_runs"], report["not_archived"]) == (0, "the metric store is away")
    assert place.has(old) == (False, False)
