"""Imports: hidden until complete, the same again when repeated, nobody else's ids."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.tracking.import_ids import MODELS, RUNS
from mlplat.tracking.imported import ImportedModel, ImportedRun, InputLink, ModelLink
from mlplat.tracking.imports import NewExperiment
from mlplat.tracking.inputs import Dataset, DatasetInput, ModelOutput
from mlplat.tracking.logged_model import LoggedModelStatus, ModelMetric, NewModel
from mlplat.tracking.logged_models import LoggedModelStore
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


def _model(model_id: str, *, deleted: bool = False, **changes: str) -> ImportedModel:
    model = ImportedModel(
        model_id, "name", LoggedModelStatus.READY, "tree", None, NOW, NOW, deleted, None, {"p": "1"}, {"t": "2"}
    )
    return replace(model, **changes)  # type: ignore[arg-type]


async def test_models_datasets_and_links_are_seen_when_the_import_is_complete(world: World) -> None:
    imports, rows, models = world.lifecycle.imports, world.lifecycle.import_rows, LoggedModelStore(world.engine)
    target = (await imports.begin(_new())).experiment_id
    (run,) = [each.new_id for each in await imports.assign(target, RUNS, [unique("run")])]
    kept, gone = [each.new_id for each in await imports.assign(target, MODELS, [unique("m"), unique("m")])]
    dataset = Dataset("digits", "d1", "local", "{}", None, "[]")
    point = ModelMetric(kept, run, "score", 0.5, 1, 2, "digits", "d1")
    for _twice in range(2):
        await rows.put_runs(target, [_run(run)])
        uris = await rows.put_models(target, [_model(kept), _model(gone, deleted=True)])
        assert uris[0] == f"mlflow-artifacts:/{target}/models/{kept}/artifacts"
        await rows.put_datasets(target, [dataset])
        links = [ModelLink(run, "output", kept, 3), ModelLink(run, "input", gone, 0), ModelLink(run, "input", "m-x", 0)]
        assert await rows.put_links(target, [InputLink(run, "digits", "d1", {"k": "v"})], links) == ["m-x"]
        stranger = replace(point, run_id="nobody")
        assert await rows.put_model_metrics(target, [point, stranger]) == ["nobody"]
    with pytest.raises(NotFound):
        await models.get(kept)
    await imports.complete(target, RUNS, [run])
    await imports.complete(target, MODELS, [kept])
    with pytest.raises(InvalidInput, match="1 logged models of this import"):
        await imports.finish(target)
    await imports.complete(target, MODELS, [gone])
    await imports.finish(target)
    shown = await models.get(kept)
    assert (shown.created_at, shown.updated_at, shown.status) == (NOW, NOW, LoggedModelStatus.READY)
    assert (shown.params, shown.tags, shown.metrics) == ({"p": "1"}, {"t": "2"}, (point,))
    assert (await models.get(gone, allow_deleted=True)).deleted
    found = (await world.runs.get(run)).links
    assert found.datasets == (DatasetInput(dataset, {"k": "v"}),)
    assert (found.model_inputs, found.model_outputs) == ((gone,), (ModelOutput(kept, 3),))


async def test_ids_of_models_are_kept_when_free_and_found_later(world: World) -> None:
    imports, models = world.lifecycle.imports, LoggedModelStore(world.engine)
    taken = f"m-{unique('taken')}"
    await models.create(taken, NewModel(await world.experiment()))
    new, free = _new(), f"m-{unique('free')}"
    target = (await imports.begin(new)).experiment_id
    assigned = await imports.assign(target, MODELS, [free, taken])
    assert [each.new_id == each.source_id for each in assigned] == [True, False]
    assert await imports.assign(target, MODELS, [free, taken]) == assigned
    assert await imports.find(new.origin, MODELS, ["nobody", taken]) == [assigned[1]]
    assert await imports.find(new.origin, RUNS, [free]) == []
    with pytest.raises(NotFound, match="Nothing was imported"):
        await imports.find(unique("origin"), MODELS, [free])


async def test_parts_that_are_malformed_or_somebody_elses_are_refused(world: World) -> None:
    imports, rows = world.lifecycle.imports, world.lifecycle.import_rows
    target = (await imports.begin(_new())).experiment_id
    (run,) = [each.new_id for each in await imports.assign(target, RUNS, [unique("run")])]
    (model,) = [each.new_id for each in await imports.assign(target, MODELS, [unique("m")])]
    theirs = await world.run(await world.experiment(), points=0)
    point = ModelMetric(model, run, "score", 0.5, 1, 2)
    cases = [
        (rows.put_models(target, [_model("m-foreign")]), "not part of this import"),
        (rows.put_models(target, [_model(model, name="a/b")]), "Invalid model name"),
        (rows.put_models(target, [_model(model, artifact_uri="mlflow-artifacts:/0/x")]), "cannot claim artifacts"),
        (rows.put_model_metrics(target, [replace(point, model_id="m-foreign")]), "not part of this import"),
        (rows.put_model_metrics(target, [replace(point, key="../x")]), "Invalid metric name"),
        (rows.put_model_metrics(target, [replace(point, dataset_digest="x" * 37)]), "maximum length"),
        (rows.put_model_metrics(target, [point] * 20_001), "At most 20000"),
        (rows.put_datasets(target, [Dataset("", "d", "local", "")]), "'name' of a dataset"),
        (rows.put_links(target, [InputLink(theirs, "n", "d")], []), "not part of this import"),
        (rows.put_links(target, [InputLink(run, "n", "d")], []), "was not sent yet"),
        (rows.put_links(target, [], [ModelLink(run, "sideways", model, 0)]), "direction"),
        (imports.complete(target, MODELS, [model]), "1 of these logged models were not sent"),
    ]
    for call, message in cases:
        with pytest.raises(InvalidInput, match=message):
            await call
    await rows.put_runs(target, [_run(run)])
    with pytest.raises(InvalidInput, match="The dataset"):
        await rows.put_links(target, [InputLink(run, "n", "d")], [])
