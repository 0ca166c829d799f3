"""Purging: deleted things leave all three stores, whatever dies in between; active ones are never touched."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.removals import removing
from mlplat.errors import InvalidInput, NotFound, Overloaded, Unavailable
from mlplat.tracking.logged_model import NewModel
from mlplat.tracking.logged_models import LoggedModelStore
from mlplat.tracking.purge import Scope
from tests.contract.chdb import abandon, new_service, unique
from tests.contract.lifecycle import World

ALL = Scope()


async def test_restoring_an_experiment_restores_what_was_deleted_with_it(world: World) -> None:
    experiment = await world.experiment()
    before, along = await world.run(experiment, points=0, deleted=True), await world.run(experiment, points=0)
    await world.experiments.set_deleted(experiment, True)
    assert (await world.runs.get(along)).deleted
    await world.experiments.set_deleted(experiment, False)
    assert (await world.runs.get(before)).deleted
    assert not (await world.runs.get(along)).deleted


async def test_a_deleted_run_leaves_every_store_and_an_active_one_stays(world: World) -> None:
    experiment = await world.experiment()
    gone, stays = await world.run(experiment, deleted=True), await world.run(experiment)
    kept_rows = await world.stored(stays)
    report = await world.lifecycle.purger.purge(ALL)
    assert (report.runs, report.experiments, report.kept, report.next) == (1, 0, [], None)
    assert (report.artifact_files, report.artifact_bytes) == (1, 100)
    assert report.postgres_bytes > 0
    assert report.metric_bytes > 0
    with pytest.raises(NotFound):
        await world.runs.get(gone)
    assert await world.stored(gone) == 0
    assert await world.stored(stays) == kept_rows > 0
    assert world.files() == [f"{experiment}/{stays}/artifacts/file.bin"]
    assert not (world.folder / str(experiment) / gone).exists()
    assert await world.count("metric_outbox") == 0
    again = await world.lifecycle.purger.purge(ALL)
    assert (again.runs, again.metric_bytes, again.artifact_bytes, again.postgres_bytes) == (0, 0, 0, 0)


async def test_a_dry_run_says_the_same_and_changes_nothing(world: World) -> None:
    experiment = await world.experiment()
    for _ in range(3):
        await world.run(experiment)
    await world.experiments.set_deleted(experiment, True)
    dry = await world.lifecycle.purger.purge(ALL, dry_run=True)
    assert (dry.runs, dry.experiments, dry.artifact_bytes) == (3, 1, 300)
    assert len(world.files()) == 3
    await world.experiments.set_deleted(experiment, False)
    await world.experiments.set_deleted(experiment, True)
    real = await world.lifecycle.purger.purge(ALL)
    assert (real.runs, real.experiments, real.artifact_bytes) == (3, 1, 300)
    assert real.postgres_bytes == pytest.approx(dry.postgres_bytes, rel=0.2)
    assert world.files() == []
    assert not (world.folder / str(experiment)).exists()
    with pytest.raises(NotFound):
        await world.experiments.get(experiment)


async def test_what_is_too_young_or_out_of_scope_stays(world: World) -> None:
    first, second = await world.experiment(), await world.experiment()
    old, young, other = [await world.run(e, points=0, deleted=True) for e in (first, first, second)]
    await world.execute("UPDATE run SET deleted_at = now() - interval '31 days' WHERE run_id = :id", id=old)
    month = timedelta(days=30)
    report = await world.lifecycle.purger.purge(Scope(older_than=month))
    assert report.runs == 1
    assert (await world.runs.get(young)).deleted
    assert (await world.lifecycle.purger.purge(Scope(experiment_ids=(first,)))).runs == 1
    assert (await world.runs.get(other)).deleted
    report = await world.lifecycle.purger.purge(Scope(run_ids=(other, young)))
    assert (report.runs, report.missing) == (1, [young])


async def test_an_active_run_named_by_id_is_refused_and_nothing_is_removed(world: World) -> None:
    experiment = await world.experiment()
    deleted, active = await world.run(experiment, deleted=True), await world.run(experiment)
    for dry_run in (True, False):
        with pytest.raises(InvalidInput, match=f"{active} is active"):
            await world.lifecycle.purger.purge(Scope(run_ids=(deleted, active)), dry_run=dry_run)
    assert await world.stored(deleted) > 0


async def test_runs_whose_artifacts_a_model_version_uses_stay_with_their_experiment(world: World) -> None:
    experiment = await world.experiment()
    used, unused = await world.run(experiment), await world.run(experiment)
    await world.execute("INSERT INTO registered_model (name, created_at, updated_at) VALUES ('digits', now(), now())")
    await world.execute(
        "INSERT INTO model_version "
        "(name, version, source, artifact_uri, semantic, bump, bump_reason, created_at, updated_at) "
        "VALUES ('digits', 1, 'x', :uri, '{1,0,0}', '', '', now(), now())",
        uri=f"mlflow-artifacts:/{experiment}/{used}/artifacts/model",
    )
    await world.experiments.set_deleted(experiment, True)
    for dry_run in (True, False):
        report = await world.lifecycle.purger.purge(ALL, dry_run=dry_run)
        assert (report.runs, report.experiments) == (1, 0)
        assert [(kept.id, kept.reason) for kept in report.kept] == [(used, "model version digits 1 uses its artifacts")]
    assert (await world.runs.get(used)).deleted
    assert world.files() == [f"{experiment}/{used}/artifacts/file.bin"]
    await world.execute("DELETE FROM registered_model")
    assert (await world.lifecycle.purger.purge(ALL)).experiments == 1
    with pytest.raises(NotFound):
        await world.runs.get(unused)


async def test_pages_cover_everything_and_experiments_go_last(world: World) -> None:
    experiment = await world.experiment()
    for _ in range(5):
        await world.run(experiment, points=1)
    await world.experiments.set_deleted(experiment, True)
    runs, after, experiments = [], "", []
    while True:
        report = await world.lifecycle.purger.purge(ALL, limit=2, after=after)
        runs.append(report.runs)
        experiments.append(report.experiments)
        if report.next is None:
            break
        after = report.next
    assert (runs, experiments) == ([2, 2, 1], [0, 0, 1])


async def test_points_still_in_the_log_do_not_come_back(world: World, engine: AsyncEngine) -> None:
    experiment = await world.experiment()
    run_id = await world.run(experiment, points=0)
    service = world.shard.service
    service._flusher.cancel()  # as if the metric store were slow: what is acknowledged stays in the log
    await world.log(run_id, 10)
    await world.runs.set_deleted(run_id, True)
    assert service.lag() == "1 groups"
    shard = service._log._shard
    await abandon(service)
    successor = new_service(engine, shard)
    await successor.start()
    world.shard.service = successor
    assert (await world.lifecycle.purger.purge(ALL)).runs == 1
    assert successor.lag() == "0"
    await abandon(successor)
    third = new_service(engine, shard)
    await third.start()
    world.shard.service = third
    assert await world.stored(run_id) == 0
    await abandon(third)


async def test_a_purge_that_breaks_off_before_the_points_is_finished_by_the_next(world: World) -> None:
    experiment = await world.experiment()
    run_id = await world.run(experiment, deleted=True)
    assert await world.stored(run_id) > 0
    world.shard.away = Unavailable("the metric shard is restarting")
    with pytest.raises(Unavailable):
        await world.lifecycle.purger.purge(ALL)
    assert await world.stored(run_id) > 0
    assert await world.count("metric_outbox") == 1
    world.shard.away = None
    report = await world.lifecycle.purger.purge(Scope(run_ids=("another",)))
    assert (report.runs, report.metric_bytes > 0) == (0, True)
    assert await world.stored(run_id) == await world.count("metric_outbox") == 0


async def test_a_purge_that_breaks_off_between_artifacts_is_finished_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = await world.experiment()
    runs = [await world.run(experiment, points=1) for _ in range(3)]
    await world.experiments.set_deleted(experiment, True)
    real, calls = world.artifacts.delete, []

    def dies_at_the_second(path: str) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("the disk went away")
        real(path)

    monkeypatch.setattr(world.artifacts, "delete", dies_at_the_second)
    with pytest.raises(OSError, match="went away"):
        await world.lifecycle.purger.purge(ALL)
    assert len(world.files()) == 2
    # What has begun to go cannot be restored half.
    for run_id in runs:
        with pytest.raises(InvalidInput, match="is being purged"):
            await world.runs.set_deleted(run_id, False)
    report = await world.lifecycle.purger.purge(ALL)
    assert (report.runs, report.experiments, world.files()) == (3, 1, [])
    assert await world.count("run") == 0


async def test_an_experiment_restored_in_the_middle_of_a_purge_stays(world: World) -> None:
    experiment = await world.experiment()
    marked = await world.run(experiment, points=0)
    other = await world.run(experiment, points=0)
    await world.experiments.set_deleted(experiment, True)
    await world.execute("UPDATE run SET purge_started_at = now() WHERE run_id = :id", id=marked)
    await world.experiments.set_deleted(experiment, False)
    report = await world.lifecycle.purger.purge(ALL)
    assert (report.runs, report.experiments) == (1, 0)
    assert not (await world.runs.get(other)).deleted


async def test_the_default_experiment_and_moved_artifacts_stay(world: World) -> None:
    await world.experiments.ensure_default()
    experiment, target = await world.experiment(), await world.experiment()
    moved = await world.run(experiment)
    await world.lifecycle.mover.move([moved], target, with_children=False)
    await world.run(experiment)
    for number in (0, experiment):
        await world.experiments.set_deleted(number, True)
    report = await world.lifecycle.purger.purge(ALL)
    assert (report.runs, report.experiments) == (1, 1)
    assert (await world.experiments.get(0)).deleted
    assert world.files() == [f"{experiment}/{moved}/artifacts/file.bin"]


async def test_one_purge_at_a_time(world: World) -> None:
    async with removing(world.engine):
        with pytest.raises(Overloaded, match="is under way"):
            await world.lifecycle.purger.purge(ALL)
    assert (await world.lifecycle.purger.purge(ALL)).runs == 0


async def test_artifacts_elsewhere_are_left_and_named(world: World) -> None:
    experiment = await world.experiment()
    run_id = await world.run(experiment, points=0, deleted=True)
    await world.execute("UPDATE run SET artifact_uri = 's3://other/place' WHERE run_id = :id", id=run_id)
    report = await world.lifecycle.purger.purge(ALL)
    assert report.runs == 1
    assert [(kept.kind, kept.id, kept.reason) for kept in report.kept] == [
        ("artifacts", run_id, "they live at s3://other/place")
    ]


async def test_files_of_logged_models_that_moved_with_their_run_stay(world: World) -> None:
    experiment, target = await world.experiment(), await world.experiment()
    moved, models = await world.run(experiment, points=0), LoggedModelStore(world.engine)
    model = await models.create(f"m-{unique('model')}", NewModel(experiment, source_run_id=moved))
    path = f"{model.artifact_location.removeprefix('mlflow-artifacts:/')}/MLmodel"
    world.artifacts.write(path, [b"flavors: {}"])
    await world.lifecycle.mover.move([moved], target, with_children=False)
    await world.runs.set_deleted(moved, True)
    await world.experiments.set_deleted(experiment, True)
    report = await world.lifecycle.purger.purge(Scope(run_ids=(moved,)))
    assert report.runs == 1
    report = await world.lifecycle.purger.purge(Scope(experiment_ids=(experiment,)))
    assert report.experiments == 1
    assert world.files() == [path]
