"""Imports: hidden until complete, the same again when repeated, nobody else's ids."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.tracking.import_ids import RUNS
from mlplat.tracking.imported import ImportedRun
from mlplat.tracking.imports import NewExperiment
from mlplat.tracking.model import RunStatus
from mlplat.tracking.purge import Scope
from tests.contract.chdb import unique
from tests.contract.lifecycle import NOW, World


def _new(experiment_id: int | None = None) -> NewExperiment:
    return NewExperiment(unique("origin"), unique("experiment"), experiment_id, NOW, NOW, {"a": "b"})


def _run(run_id: str, *, deleted: bool = False) -> ImportedRun:
    return ImportedRun(run_id, "name", RunStatus.FINISHED, "me", NOW, NOW, deleted, None, {"p": "1"}, {"t": "2"})


async def test_an_import_is_seen_when_it_is_complete(world: World) -> None:
    imports, new = world.lifecycle.imports, _new()
    begun = await imports.begin(new)
    assert not begun.complete
    assert (await world.experiments.get(begun.experiment_id)).deleted
    first, second = [
        each.new_id for each in await imports.assign(begun.experiment_id, RUNS, [unique("a"), unique("b")])
    ]
    await world.lifecycle.import_rows.put_runs(begun.experiment_id, [_run(first)])
    await imports.complete(begun.experiment_id, RUNS, [first])
    with pytest.raises(InvalidInput, match="1 runs of this import"):
        await imports.finish(begun.experiment_id)
    with pytest.raises(InvalidInput, match="being imported"):
        await world.experiments.set_deleted(begun.experiment_id, False)
    await world.lifecycle.import_rows.put_runs(begun.experiment_id, [_run(second, deleted=True), _run(first)])
    await imports.complete(begun.experiment_id, RUNS, [second])
    for _twice in range(2):
        await imports.finish(begun.experiment_id)
    found = await world.experiments.get(begun.experiment_id)
    assert (found.deleted, found.created_at, found.tags) == (False, NOW, {"a": "b"})
    shown = await world.runs.get(first)
    assert (shown.deleted, shown.params, shown.tags) == (False, {"p": "1"}, {"t": "2", "mlflow.runName": "name"})
    assert (await world.runs.get(second)).deleted
    assert await imports.begin(new) == replace(begun, complete=True)
    with pytest.raises(InvalidInput, match="is complete"):
        await imports.assign(begun.experiment_id, RUNS, ["late"])


async def test_ids_are_kept_when_free_and_stay_the_same(world: World) -> None:
    imports = world.lifecycle.imports
    experiment = await world.experiment()
    taken, purged, free = await world.run(experiment, points=0), unique("purged"), unique("free")
    await world.execute("INSERT INTO metric_outbox (run_id) VALUES (:id)", id=purged)
    first, second = (await imports.begin(_new())).experiment_id, (await imports.begin(_new())).experiment_id
    ids = [free, taken, purged]
    assigned = await imports.assign(first, RUNS, ids)
    assert [each.source_id for each in assigned] == ids
    assert [each.new_id == each.source_id for each in assigned] == [True, False, False]
    assert await imports.assign(first, RUNS, ids) == assigned
    assert (await imports.assign(second, RUNS, [free]))[0].new_id != free


async def test_imports_that_race_for_ids_share_none(world: World) -> None:
    imports = world.lifecycle.imports
    targets = [(await imports.begin(_new())).experiment_id for _ in range(4)]
    ids = [unique("run") for _ in range(20)]
    answers = await asyncio.gather(*(imports.assign(target, RUNS, ids) for target in targets))
    given = [each.new_id for answer in answers for each in answer]
    assert len(set(given)) == len(given) == 80
    assert set(ids) <= set(given)


async def test_experiment_ids_are_kept_when_free_and_later_ones_go_on_behind(world: World) -> None:
    imports = world.lifecycle.imports
    number = await world.experiment() + 1_000
    assert (await imports.begin(_new(number))).experiment_id == number
    assert (await imports.begin(_new(number))).experiment_id > number
    later = await asyncio.gather(*(world.experiments.create(unique("e"), None, {}) for _ in range(5)))
    assert min(later) > number
    assert (await imports.begin(_new(2**40))).experiment_id < 2**31


async def test_names_and_runs_of_others_are_refused(world: World) -> None:
    imports, new = world.lifecycle.imports, _new()
    begun = await imports.begin(new)
    with pytest.raises(AlreadyExists, match="another name"):
        await imports.begin(replace(_new(), name=new.name))
    other = await world.run(await world.experiment(), points=0)
    with pytest.raises(InvalidInput, match="not part of this import"):
        await world.lifecycle.import_rows.put_runs(begun.experiment_id, [_run(other)])
    # Somebody creates a run under an id that the import was given.
    (given,) = await imports.assign(begun.experiment_id, RUNS, [unique("run")])
    await world.runs.create(given.new_id, await world.experiment(), "theirs", "", NOW, {})
    with pytest.raises(InvalidInput, match="Somebody else"):
        await world.lifecycle.import_rows.put_runs(begun.experiment_id, [_run(given.new_id)])
    assert (await world.runs.get(given.new_id)).name == "theirs"
    with pytest.raises(NotFound, match="No import"):
        await imports.finish(await world.experiment())


async def test_an_import_that_was_given_up_is_purged_after_a_day(world: World) -> None:
    imports, new = world.lifecycle.imports, _new()
    begun = await imports.begin(new)
    (given,) = await imports.assign(begun.experiment_id, RUNS, [unique("run")])
    await world.lifecycle.import_rows.put_runs(begun.experiment_id, [_run(given.new_id)])
    report = await world.lifecycle.purger.purge(Scope())
    assert (report.runs, report.experiments) == (0, 0)
    for table in ("experiment", "run"):
        await world.execute(f"UPDATE {table} SET deleted_at = deleted_at - interval '25 hours'")
    report = await world.lifecycle.purger.purge(Scope())
    assert (report.runs, report.experiments) == (1, 1)
    assert (await imports.begin(new)).experiment_id != begun.experiment_id
