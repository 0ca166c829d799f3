"""Logged models in Postgres: the models that runs made, with params, tags and metrics of their own.

Contract: a model belongs to an experiment and outlives the run that made it. Params are written once
(the same value again is fine). A deleted model is unknown to every call but ``get(allow_deleted=True)``,
a second ``delete``, and metrics: a run goes on logging those. One call is one transaction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Row, delete, func, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import logged_model, logged_model_metric, logged_model_param, logged_model_tag
from mlplat.errors import InvalidInput, NotFound
from mlplat.tracking.experiments import require_active_experiment
from mlplat.tracking.logged_model import (
    LoggedModel,
    LoggedModelStatus,
    ModelMetric,
    NewModel,
    check_keys,
    check_new,
)
from mlplat.tracking.model import random_run_name

#: Points of one metric of one model that are answered: the newest ones.
POINTS_PER_METRIC = 100


class LoggedModelStore:
    """All methods are safe to call concurrently. They raise ``NotFound`` for unknown ids."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(self, model_id: str, new: NewModel) -> LoggedModel:
        """A new, pending model; creating it again under the same id gives the model that is there.

        Raises:
            NotFound: no such experiment.
            InvalidInput: it is deleted, or a name or key is malformed.
        """
        check_new(new)
        async with self._engine.begin() as connection:
            location = await require_active_experiment(connection, new.experiment_id)
            now = func.clock_timestamp()
            row = upsert(logged_model).values(
                model_id=model_id, experiment_id=new.experiment_id, name=new.name or random_run_name(),
                artifact_location=f"{location.rstrip('/')}/models/{model_id}/artifacts",
                status=LoggedModelStatus.PENDING, model_type=new.model_type, source_run_id=new.source_run_id,
                created_at=now, updated_at=now,
            )  # fmt: skip
            added = row.on_conflict_do_nothing().returning(logged_model.c.model_id)
            if (await connection.execute(added)).first() is not None:
                await _put_params(connection, model_id, new.params)
                await _put_tags(connection, model_id, new.tags)
            return await _load_one(connection, model_id)

    async def get(self, model_id: str, *, allow_deleted: bool = False) -> LoggedModel:
        """The model."""
        async with self._engine.connect() as connection:
            model = await _load_one(connection, model_id)
        if model.deleted and not allow_deleted:
            raise _not_found(model_id)
        return model

    async def finalize(self, model_id: str, status: LoggedModelStatus) -> LoggedModel:
        """Says how the upload ended.

        Raises:
            InvalidInput: the status is not a final one.
        """
        if status is LoggedModelStatus.PENDING:
            raise InvalidInput(f"Invalid model status for finalization: {status}. Valid ones are READY and FAILED.")
        async with self._engine.begin() as connection:
            await _touch(connection, model_id, status=status)
            return await _load_one(connection, model_id)

    async def delete(self, model_id: str) -> None:
        """Deletes the model; repeating it is fine."""
        async with self._engine.begin() as connection:
            await require_models(connection, [model_id])
            statement = update(logged_model).where(logged_model.c.model_id == model_id, ~logged_model.c.deleted)
            await connection.execute(statement.values(deleted=True, updated_at=func.clock_timestamp()))

    async def log_params(self, model_id: str, params: Mapping[str, str]) -> None:
        """Adds params.

        Raises:
            InvalidInput: a param has another value already, or a key is malformed.
        """
        check_keys("param", params)
        async with self._engine.begin() as connection:
            await _touch(connection, model_id)
            await _put_params(connection, model_id, params)

    async def set_tags(self, model_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags.

        Raises:
            InvalidInput: a key is malformed.
        """
        check_keys("tag", tags)
        async with self._engine.begin() as connection:
            await _touch(connection, model_id)
            await _put_tags(connection, model_id, tags)

    async def delete_tag(self, model_id: str, key: str) -> None:
        """Removes one tag.

        Raises:
            NotFound: no such model or tag.
        """
        tag = logged_model_tag.c
        async with self._engine.begin() as connection:
            await _touch(connection, model_id)
            statement = delete(logged_model_tag).where(tag.model_id == model_id, tag.key == key)
            if not (await connection.execute(statement)).rowcount:
                raise NotFound(f"No tag with key '{key}' found for model with ID '{model_id}'.")

    async def check(self, model_ids: Collection[str]) -> None:
        """Raises ``NotFound`` unless every model exists, deleted or not."""
        async with self._engine.connect() as connection:
            await require_models(connection, model_ids)

    async def log_metrics(self, points: Sequence[ModelMetric]) -> None:
        """Adds metric points to models; a point that is there already is left alone.

        Raises:
            NotFound: no such model.
        """
        if not points:
            return
        async with self._engine.begin() as connection:
            await require_models(connection, {point.model_id for point in points})
            await put_points(connection, points)

    async def of_experiment(self, experiment_id: int, limit: int, after: str) -> list[LoggedModel]:
        """A page of all models of an experiment, deleted ones too, without metrics; by id, behind ``after``."""
        column = logged_model.c
        query = select(logged_model).where(column.experiment_id == experiment_id, column.model_id > after)
        async with self._engine.connect() as connection:
            rows = (await connection.execute(query.order_by(column.model_id).limit(limit))).all()
            return await _load(connection, rows, metrics=False)

    async def points_of_experiment(
        self, experiment_id: int, limit: int, after: tuple[str, bytes] = ("", b"")
    ) -> list[ModelMetric]:
        """A page of the metric points of all models of an experiment, by model and ``identity``, behind ``after``."""
        point = logged_model_metric.c
        of_models = select(logged_model.c.model_id).where(logged_model.c.experiment_id == experiment_id)
        query = (
            select(logged_model_metric)
            .where(point.model_id.in_(of_models), tuple_(point.model_id, point.digest) > after)
            .order_by(point.model_id, point.digest)
            .limit(limit)
        )
        async with self._engine.connect() as connection:
            return [_point(row) for row in await connection.execute(query)]

    async def search(
        self,
        source: FromClause,
        where: ColumnElement[bool],
        order: Sequence[ColumnElement[Any]],
        limit: int,
        offset: int,
    ) -> list[LoggedModel]:
        """Models of ``source``, which is ``logged_model`` with what ``order`` needs joined to it."""
        query = select(logged_model).select_from(source).where(where).order_by(*order).limit(limit).offset(offset)
        async with self._engine.connect() as connection:
            return await _load(connection, (await connection.execute(query)).all())


async def require_models(connection: AsyncConnection, model_ids: Collection[str]) -> None:
    """Checks that models exist, deleted or not, and keeps them until the transaction ends.

    Raises:
        NotFound: one does not.
    """
    column = logged_model.c.model_id
    query = select(column).where(column.in_(model_ids)).order_by(column).with_for_update(read=True, key_share=True)
    known = set((await connection.execute(query)).scalars())
    for model_id in model_ids:
        if model_id not in known:
            raise _not_found(model_id)


async def put_points(connection: AsyncConnection, points: Sequence[ModelMetric]) -> None:
    """Adds metric points to models that exist, inside of a transaction."""
    rows = {
        (point.model_id, point.identity): {
            "model_id": point.model_id, "digest": point.identity, "run_id": point.run_id, "key": point.key,
            "value": point.value, "timestamp": point.timestamp, "step": point.step,
            "dataset_name": point.dataset_name, "dataset_digest": point.dataset_digest,
        }
        for point in points
    }  # fmt: skip
    if rows:
        # In one order, whoever comes: two requests that insert the same points could wait for one another.
        ordered = [rows[identity] for identity in sorted(rows)]
        await connection.execute(upsert(logged_model_metric).on_conflict_do_nothing(), ordered)


def _not_found(model_id: str) -> NotFound:
    return NotFound(f"Logged model with ID '{model_id[:200]}' not found.")


async def _touch(connection: AsyncConnection, model_id: str, **values: object) -> None:
    """Locks an active model for this transaction and marks it as changed."""
    statement = update(logged_model).where(logged_model.c.model_id == model_id, ~logged_model.c.deleted)
    result = await connection.execute(statement.values(**values, updated_at=func.clock_timestamp()))
    if not result.rowcount:
        raise _not_found(model_id)


async def _put_params(connection: AsyncConnection, model_id: str, params: Mapping[str, str]) -> None:
    if not params:
        return
    rows = [{"model_id": model_id, "key": key, "value": value} for key, value in params.items()]
    await connection.execute(upsert(logged_model_param).values(rows).on_conflict_do_nothing())
    column = logged_model_param.c
    query = select(logged_model_param).where(column.model_id == model_id, column.key.in_(params))
    for row in (await connection.execute(query)).all():
        if row.value != params[row.key]:
            raise InvalidInput(
                f"Changing param values is not allowed. Param with key='{row.key}' was already logged with "
                f"value='{row.value}' for model ID='{model_id}'. Attempted logging new value '{params[row.key]}'."
            )


async def _put_tags(connection: AsyncConnection, model_id: str, tags: Mapping[str, str]) -> None:
    if not tags:
        return
    statement = upsert(logged_model_tag).values(
        [{"model_id": model_id, "key": key, "value": value} for key, value in tags.items()]
    )
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["model_id", "key"], set_={"value": statement.excluded.value})
    )


async def _load_one(connection: AsyncConnection, model_id: str) -> LoggedModel:
    query = select(logged_model).where(logged_model.c.model_id == model_id)
    found = await _load(connection, (await connection.execute(query)).all())
    if not found:
        raise _not_found(model_id)
    return found[0]


async def _load(connection: AsyncConnection, rows: Sequence[Row[Any]], *, metrics: bool = True) -> list[LoggedModel]:
    """The models of these rows, with params, tags and metrics: three more statements, however many they are."""
    if not rows:
        return []
    model_ids = [row.model_id for row in rows]
    params: dict[str, dict[str, str]] = {}
    tags: dict[str, dict[str, str]] = {}
    for table, into in ((logged_model_param, params), (logged_model_tag, tags)):
        query = select(table).where(table.c.model_id.in_(model_ids)).order_by(table.c.key)
        for entry in (await connection.execute(query)).all():
            into.setdefault(entry.model_id, {})[entry.key] = entry.value
    points = await _load_metrics(connection, model_ids) if metrics else {}
    return [
        LoggedModel(
            row.model_id, row.experiment_id, row.name, row.artifact_location, LoggedModelStatus(row.status),
            row.model_type, row.source_run_id, row.deleted, row.created_at, row.updated_at,
            params.get(row.model_id, {}), tags.get(row.model_id, {}), tuple(points.get(row.model_id, ())),
        )
        for row in rows
    ]  # fmt: skip


async def _load_metrics(connection: AsyncConnection, model_ids: Sequence[str]) -> dict[str, list[ModelMetric]]:
    point = logged_model_metric.c
    newest = func.row_number().over(
        partition_by=[point.model_id, point.key], order_by=[point.timestamp.desc(), point.step.desc(), point.digest]
    )
    numbered = select(logged_model_metric, newest.label("number")).where(point.model_id.in_(model_ids)).subquery()
    column = numbered.c
    query = (
        select(numbered)
        .where(column.number <= POINTS_PER_METRIC)
        .order_by(column.model_id, column.key, column.timestamp, column.step, column.digest)
    )
    found: dict[str, list[ModelMetric]] = {}
    for row in (await connection.execute(query)).all():
        found.setdefault(row.model_id, []).append(_point(row))
    return found


def _point(row: Row[Any]) -> ModelMetric:
    return ModelMetric(
        row.model_id, row.run_id, row.key, row.value, row.timestamp, row.step, row.dataset_name, row.dataset_digest
    )
