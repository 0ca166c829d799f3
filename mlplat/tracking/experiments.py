"""Experiments in Postgres.

Contract: names are unique, deleted ones included. Deleting an experiment deletes its active runs,
restoring it restores them. Methods raise ``NotFound`` for unknown ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, Select, delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.engine import is_unique_violation
from mlplat.db.tables import experiment, experiment_tag, run
from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.keys import check_key
from mlplat.tracking.model import (
    DEFAULT_EXPERIMENT_ID,
    DEFAULT_EXPERIMENT_NAME,
    Experiment,
    ViewType,
    check_name,
    cut_tag,
)


class ExperimentStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine, artifact_root: str) -> None:
        """``artifact_root``: URI under which experiments without a location of their own keep artifacts."""
        self._engine = engine
        self._artifact_root = artifact_root.rstrip("/")

    async def ensure_default(self) -> None:
        """Creates experiment 0, ``Default``, on the first call of an installation."""
        statement = upsert(experiment).values(
            experiment_id=DEFAULT_EXPERIMENT_ID,
            name=DEFAULT_EXPERIMENT_NAME,
            artifact_location=f"{self._artifact_root}/{DEFAULT_EXPERIMENT_ID}",
            created_at=func.clock_timestamp(),
            updated_at=func.clock_timestamp(),
        )
        async with self._engine.begin() as connection:
            await connection.execute(statement.on_conflict_do_nothing())

    async def create(self, name: str, artifact_location: str | None, tags: Mapping[str, str]) -> int:
        """A new experiment's id.

        Raises:
            AlreadyExists: the name is taken, maybe by a deleted experiment.
            InvalidInput: a malformed name or tag.
        """
        check_name("experiment", name)
        for key in tags:
            check_key("tag", key)
        values = {"name": name, "artifact_location": artifact_location or "",
                  "created_at": func.clock_timestamp(), "updated_at": func.clock_timestamp()}  # fmt: skip
        try:
            async with self._engine.begin() as connection:
                statement = insert(experiment).values(**values).returning(experiment.c.experiment_id)
                experiment_id = (await connection.execute(statement)).scalar_one()
                if not artifact_location:
                    location = f"{self._artifact_root}/{experiment_id}"
                    await self._update(connection, experiment_id, artifact_location=location)
                await self._put_tags(connection, experiment_id, tags)
        except IntegrityError as error:
            if not is_unique_violation(error):
                raise
            raise AlreadyExists(f"Experiment(name={name}) already exists.") from error
        return int(experiment_id)

    async def get(self, experiment_id: int) -> Experiment:
        """The experiment, deleted or not."""
        async with self._engine.connect() as connection:
            found = await self._load(connection, select(experiment).where(experiment.c.experiment_id == experiment_id))
        if not found:
            raise NotFound(f"No Experiment with id={experiment_id} exists")
        return found[0]

    async def get_by_name(self, name: str) -> Experiment:
        """The experiment of that name, deleted or not."""
        async with self._engine.connect() as connection:
            found = await self._load(connection, select(experiment).where(experiment.c.name == name))
        if not found:
            raise NotFound(f"Could not find experiment with name '{name}'")
        return found[0]

    async def search(self, view: ViewType, limit: int, offset: int) -> list[Experiment]:
        """Experiments, newest first."""
        query = select(experiment).order_by(experiment.c.created_at.desc(), experiment.c.experiment_id.desc())
        if view is not ViewType.ALL:
            query = query.where(experiment.c.deleted == (view is ViewType.DELETED_ONLY))
        async with self._engine.connect() as connection:
            return await self._load(connection, query.limit(limit).offset(offset))

    async def rename(self, experiment_id: int, name: str) -> None:
        """Gives an active experiment another name.

        Raises:
            AlreadyExists: the name is taken.
        """
        check_name("experiment", name)
        try:
            async with self._engine.begin() as connection:
                await self._require_active(connection, experiment_id)
                await self._update(connection, experiment_id, name=name)
        except IntegrityError as error:
            if not is_unique_violation(error):
                raise
            raise AlreadyExists(f"Experiment(name={name}) already exists.") from error

    async def set_deleted(self, experiment_id: int, deleted: bool) -> None:
        """Deletes or restores an experiment with its runs.

        Raises:
            NotFound: unknown, or already in that state.
        """
        async with self._engine.begin() as connection:
            changed = await self._update(connection, experiment_id, only_if_deleted=not deleted, deleted=deleted)
            if not changed:
                word = "active" if deleted else "deleted"
                raise NotFound(f"No {word} Experiment with id={experiment_id} exists")
            await connection.execute(update(run).where(run.c.experiment_id == experiment_id).values(deleted=deleted))

    async def set_tag(self, experiment_id: int, key: str, value: str) -> None:
        """Sets one tag of an active experiment."""
        check_key("tag", key)
        async with self._engine.begin() as connection:
            await self._require_active(connection, experiment_id)
            await self._put_tags(connection, experiment_id, {key: value})

    async def delete_tag(self, experiment_id: int, key: str) -> None:
        """Removes one tag.

        Raises:
            NotFound: no such experiment or tag.
        """
        statement = delete(experiment_tag).where(
            experiment_tag.c.experiment_id == experiment_id, experiment_tag.c.key == key
        )
        async with self._engine.begin() as connection:
            await self._require_active(connection, experiment_id)
            if not (await connection.execute(statement)).rowcount:
                raise NotFound(f"No tag with name: {key} in experiment with id={experiment_id}")

    async def _require_active(self, connection: AsyncConnection, experiment_id: int) -> None:
        query = select(experiment.c.deleted).where(experiment.c.experiment_id == experiment_id)
        deleted = (await connection.execute(query.with_for_update(read=True))).scalar()
        if deleted is None:
            raise NotFound(f"No Experiment with id={experiment_id} exists")
        if deleted:
            raise InvalidInput(f"The experiment {experiment_id} must be in the 'active' state; it is deleted.")

    @staticmethod
    async def _update(
        connection: AsyncConnection, experiment_id: int, only_if_deleted: bool | None = None, **values: object
    ) -> bool:
        statement = update(experiment).where(experiment.c.experiment_id == experiment_id)
        if only_if_deleted is not None:
            statement = statement.where(experiment.c.deleted == only_if_deleted)
        result = await connection.execute(statement.values(**values, updated_at=func.clock_timestamp()))
        return result.rowcount > 0

    @staticmethod
    async def _put_tags(connection: AsyncConnection, experiment_id: int, tags: Mapping[str, str]) -> None:
        if not tags:
            return
        rows = [{"experiment_id": experiment_id, "key": key, "value": cut_tag(value)} for key, value in tags.items()]
        statement = upsert(experiment_tag).values(rows)
        await connection.execute(
            statement.on_conflict_do_update(
                index_elements=["experiment_id", "key"], set_={"value": statement.excluded.value}
            )
        )

    @staticmethod
    async def _load(connection: AsyncConnection, query: Select[Any]) -> list[Experiment]:
        rows = (await connection.execute(query)).all()
        tag_query = select(experiment_tag).where(
            experiment_tag.c.experiment_id.in_([row.experiment_id for row in rows])
        )
        tags: dict[int, dict[str, str]] = {}
        for tag in (await connection.execute(tag_query)).all() if rows else []:
            tags.setdefault(tag.experiment_id, {})[tag.key] = tag.value
        return [_experiment(row, tags.get(row.experiment_id, {})) for row in rows]


def _experiment(row: Row[Any], tags: dict[str, str]) -> Experiment:
    return Experiment(
        row.experiment_id, row.name, row.artifact_location, row.deleted, row.created_at, row.updated_at, tags
    )
