"""What an import brings: runs, datasets, logged models and the links between them.

All calls may be repeated. What is written stays hidden with the import's experiment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Table, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.artifacts.model import served_path
from mlplat.db.tables import (
    dataset,
    logged_model,
    logged_model_param,
    logged_model_tag,
    model_import,
    run,
    run_input,
    run_model,
    run_param,
    run_tag,
)
from mlplat.errors import InvalidInput
from mlplat.keys import check_key
from mlplat.tracking.import_ids import MODELS, RUNS, Kind, strangers
from mlplat.tracking.imported import ImportedModel, ImportedRun, InputLink, ModelLink
from mlplat.tracking.imports import require_importing
from mlplat.tracking.inputs import INPUT, OUTPUT, Dataset, check_dataset, check_input_tags
from mlplat.tracking.logged_model import ModelMetric, NewModel, check_metric_dataset, check_new
from mlplat.tracking.logged_models import put_points
from mlplat.tracking.model import RUN_NAME_TAG, cut_param, cut_tag

#: Runs, models or datasets in one call, and links or points.
MAX_ENTITIES = 1_000
MAX_ROWS = 20_000


class ImportRows:
    """All methods are safe to call concurrently.

    They raise ``NotFound`` and ``InvalidInput`` when no import is under way in the experiment, and
    ``InvalidInput`` for parts that are malformed, too many, or somebody else's.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def put_runs(self, experiment_id: int, runs: Sequence[ImportedRun]) -> list[str]:
        """Creates or updates runs under ids that were given out, and returns their artifact URIs."""
        _check_count(runs, MAX_ENTITIES)
        for each in runs:
            _check_run(each)
        async with self._engine.begin() as connection:
            location = await require_importing(connection, experiment_id)
            await _require_mine(connection, RUNS, experiment_id, [each.run_id for each in runs])
            uris = [each.artifact_uri or f"{location}/{each.run_id}/artifacts" for each in runs]
            await _put_runs(connection, experiment_id, runs, uris)
        return uris

    async def put_models(self, experiment_id: int, models: Sequence[ImportedModel]) -> list[str]:
        """Creates or updates models under ids that were given out, and returns their artifact URIs."""
        _check_count(models, MAX_ENTITIES)
        for each in models:
            check_new(NewModel(experiment_id, each.name, each.model_type, each.source_run_id, each.params, each.tags))
            _check_artifacts(MODELS, each.model_id, each.artifact_uri)
        async with self._engine.begin() as connection:
            location = await require_importing(connection, experiment_id)
            await _require_mine(connection, MODELS, experiment_id, [each.model_id for each in models])
            uris = [each.artifact_uri or f"{location}/models/{each.model_id}/artifacts" for each in models]
            await _put_models(connection, experiment_id, models, uris)
        return uris

    async def put_model_metrics(self, experiment_id: int, points: Sequence[ModelMetric]) -> list[str]:
        """Adds points to models of the import. Those of runs that do not exist are left out; returns these runs."""
        _check_count(points, MAX_ROWS)
        for point in points:
            check_key("metric", point.key)
            check_metric_dataset(point.dataset_name, point.dataset_digest)
        async with self._engine.begin() as connection:
            await require_importing(connection, experiment_id)
            await _require_mine(connection, MODELS, experiment_id, {point.model_id for point in points})
            runs = {point.run_id for point in points}
            query = select(run.c.run_id).where(run.c.run_id.in_(runs)).with_for_update(read=True, key_share=True)
            known = set((await connection.execute(query)).scalars())
            await put_points(connection, [point for point in points if point.run_id in known])
        return sorted(runs - known)

    async def put_datasets(self, experiment_id: int, datasets: Sequence[Dataset]) -> None:
        """Adds datasets; one that is there already stays as it is."""
        _check_count(datasets, MAX_ENTITIES)
        for each in datasets:
            check_dataset(each)
        async with self._engine.begin() as connection:
            await require_importing(connection, experiment_id)
            rows = [vars(each) | {"experiment_id": experiment_id} for each in datasets]
            if rows:
                await connection.execute(upsert(dataset).on_conflict_do_nothing(), rows)

    async def put_links(
        self, experiment_id: int, inputs: Sequence[InputLink], models: Sequence[ModelLink]
    ) -> list[str]:
        """Links runs of the import to datasets of it, and to any models. Links to models that do not exist are left
        out; returns the ids of those."""
        _check_count(inputs, MAX_ROWS)
        _check_count(models, MAX_ROWS)
        for one in inputs:
            check_input_tags(one.tags)
        for link in models:
            if link.direction not in {INPUT, OUTPUT}:
                raise InvalidInput(f"The direction of a link is {INPUT!r} or {OUTPUT!r}, not {link.direction[:50]!r}.")
        async with self._engine.begin() as connection:
            await require_importing(connection, experiment_id)
            runs = {one.run_id for one in inputs} | {link.run_id for link in models}
            await _require_mine(connection, RUNS, experiment_id, runs)
            await _require_sent(connection, experiment_id, runs)
            await _link_datasets(connection, experiment_id, inputs)
            return await _link_models(connection, models)


def _check_count(items: Sequence[object], limit: int) -> None:
    if len(items) > limit:
        raise InvalidInput(f"At most {limit} in one call, not {len(items)}.")


def _check_run(each: ImportedRun) -> None:
    for kind, keys in (("param", each.params), ("tag", each.tags)):
        for key in keys:
            check_key(kind, key)
    _check_artifacts(RUNS, each.run_id, each.artifact_uri)


def _check_artifacts(kind: Kind, entity_id: str, uri: str | None) -> None:
    if uri is not None and served_path(uri) is not None:
        raise InvalidInput(f"The {kind.noun} {entity_id} cannot claim artifacts of the platform: {uri}")


async def _require_mine(connection: AsyncConnection, kind: Kind, experiment_id: int, ids: Collection[str]) -> None:
    foreign = await strangers(connection, kind, experiment_id, ids)
    if foreign:
        raise InvalidInput(f"The {kind.noun} {min(foreign)} is not part of this import.")


async def _require_sent(connection: AsyncConnection, experiment_id: int, run_ids: Collection[str]) -> None:
    query = select(run.c.run_id).where(run.c.run_id.in_(run_ids), run.c.experiment_id == experiment_id)
    missing = set(run_ids) - set((await connection.execute(query)).scalars())
    if missing:
        raise InvalidInput(f"The run {min(missing)} was not sent yet.")


async def _put_runs(
    connection: AsyncConnection, experiment_id: int, runs: Sequence[ImportedRun], uris: Sequence[str]
) -> None:
    """Writes the runs with their params and tags; they count as deleted along with the experiment."""
    if not runs:
        return
    statement = upsert(run)
    changing = {name: statement.excluded[name] for name in ("name", "status", "ended_at", "deleted_with_experiment")}
    rows = [
        {
            "run_id": each.run_id, "experiment_id": experiment_id, "name": each.name, "status": each.status,
            "user_id": each.user_id, "artifact_uri": uri, "started_at": each.started_at, "ended_at": each.ended_at,
            "deleted": True, "deleted_with_experiment": not each.deleted, "importing": True,
        }
        for each, uri in zip(runs, uris, strict=True)
    ]  # fmt: skip
    await connection.execute(statement.on_conflict_do_update(index_elements=["run_id"], set_=changing), rows)
    mine = update(run).where(run.c.run_id.in_([each.run_id for each in runs]), run.c.experiment_id == experiment_id)
    if (await connection.execute(mine.values(deleted_at=func.clock_timestamp()))).rowcount != len(runs):
        raise InvalidInput("Somebody else created a run with an id of this import, or a run occurs twice.")
    params = {each.run_id: {key: cut_param(value) for key, value in each.params.items()} for each in runs}
    tags = {
        each.run_id: {key: cut_tag(value) for key, value in (dict(each.tags) | {RUN_NAME_TAG: each.name}).items()}
        for each in runs
    }
    await _put_pairs(connection, run_param, "run_id", params)
    await _put_pairs(connection, run_tag, "run_id", tags)


async def _put_models(
    connection: AsyncConnection, experiment_id: int, models: Sequence[ImportedModel], uris: Sequence[str]
) -> None:
    """Writes the models with their params and tags; until the import is complete they count as deleted."""
    if not models:
        return
    statement = upsert(logged_model)
    changing = {name: statement.excluded[name] for name in ("status", "updated_at")}
    rows = [
        {
            "model_id": each.model_id, "experiment_id": experiment_id, "name": each.name, "artifact_location": uri,
            "status": each.status, "model_type": each.model_type, "source_run_id": each.source_run_id,
            "deleted": True, "created_at": each.created_at, "updated_at": each.updated_at,
        }
        for each, uri in zip(models, uris, strict=True)
    ]  # fmt: skip
    await connection.execute(statement.on_conflict_do_update(index_elements=["model_id"], set_=changing), rows)
    is_mine = logged_model.c.model_id.in_([each.model_id for each in models])
    mine = select(func.count()).where(is_mine, logged_model.c.experiment_id == experiment_id)
    if (await connection.execute(mine)).scalar_one() != len(models):
        raise InvalidInput("Somebody else created a logged model with an id of this import, or one occurs twice.")
    for deleted in (False, True):
        ids = [each.model_id for each in models if each.deleted is deleted]
        noted = update(model_import).where(model_import.c.model_id.in_(ids))
        await connection.execute(noted.values(deleted=deleted))
    await _put_pairs(connection, logged_model_param, "model_id", {each.model_id: each.params for each in models})
    await _put_pairs(connection, logged_model_tag, "model_id", {each.model_id: each.tags for each in models})


async def _put_pairs(
    connection: AsyncConnection, table: Table, owner: str, pairs: Mapping[str, Mapping[str, str]]
) -> None:
    """Params or tags by the id of what they belong to; the newest value counts."""
    rows: list[dict[str, Any]] = [
        {owner: entity_id, "key": key, "value": value}
        for entity_id, entries in pairs.items()
        for key, value in entries.items()
    ]
    if rows:
        put = upsert(table)
        put = put.on_conflict_do_update(index_elements=[owner, "key"], set_={"value": put.excluded.value})
        await connection.execute(put, rows)


async def _link_datasets(connection: AsyncConnection, experiment_id: int, inputs: Sequence[InputLink]) -> None:
    if not inputs:
        return
    names = {(one.name, one.digest) for one in inputs}
    query = select(dataset.c.name, dataset.c.digest, dataset.c.dataset_id).where(
        dataset.c.experiment_id == experiment_id, tuple_(dataset.c.name, dataset.c.digest).in_(names)
    )
    ids = {(row.name, row.digest): row.dataset_id for row in await connection.execute(query)}
    if names - ids.keys():
        raise InvalidInput(f"The dataset {min(names - ids.keys())} was not sent yet.")
    rows = [{"run_id": one.run_id, "dataset_id": ids[one.name, one.digest], "tags": dict(one.tags)} for one in inputs]
    await connection.execute(upsert(run_input).on_conflict_do_nothing(), rows)


async def _link_models(connection: AsyncConnection, links: Sequence[ModelLink]) -> list[str]:
    wanted = {link.model_id for link in links}
    column = logged_model.c.model_id
    query = select(column).where(column.in_(wanted)).order_by(column).with_for_update(read=True, key_share=True)
    known = set((await connection.execute(query)).scalars())
    rows = [vars(link) for link in links if link.model_id in known]
    if rows:
        await connection.execute(upsert(run_model).on_conflict_do_nothing(), rows)
    return sorted(wanted - known)
