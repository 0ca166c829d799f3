"""Experiments in Postgres.

Contract: names are unique, deleted ones included. Deleting an experiment deletes its active runs,
restoring it restores those and no others. Methods raise ``NotFound`` for unknown ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import FromClause, Row, Select, delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.engine import is_unique_violation
from mlplat.db.tables import experiment, experiment_tag, run
from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.keys import check_key
from mlplat.tracking.fields import EXPERIMENT_FIELDS
from mlplat.tracking.filters import FilterCompiler, shown
from mlplat.tracking.model import (
    DEFAULT_EXPERIMENT_ID,
    DEFAULT_EXPERIMENT_NAME,
    Experiment,
    ViewType,
    check_name,
    cut_tag,
)
from mlplat.tracking.orders import compile_order
from mlplat.tracking.paging import decode_token, digest, encode_token
from mlplat.tracking.search import parse_filter, parse_orders
from mlplat.tracking.search_tables import EXPERIMENTS


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

    async def search(
        self,
        filter_text: str = "",
        order_texts: Sequence[str] = (),
        view: ViewType = ViewType.ACTIVE_ONLY,
        limit: int = 1000,
        page_token: str | None = None,
    ) -> tuple[list[Experiment], str | None]:
        """A page of the experiments that satisfy the filter, ordered, then newest first; the next page's token.

        Raises:
            InvalidInput: the filter or an order is malformed, or the token belongs to another search.
        """
        condition = FilterCompiler(EXPERIMENTS).compile(parse_filter(filter_text, EXPERIMENT_FIELDS))
        order = compile_order(parse_orders(order_texts, EXPERIMENT_FIELDS), EXPERIMENTS)
        searched = digest("experiments", filter_text, list(order_texts), view)
        source: FromClause = experiment
        for table, on in order.joins:
            source = source.outerjoin(table, on)
        query = select(experiment, *order.labelled()).select_from(source).where(shown(experiment, view), condition)
        if page_token:
            query = query.where(order.after(decode_token(page_token, searched, order.kinds)))
        async with self._engine.connect() as connection:
            rows = (await connection.execute(query.order_by(*order.clauses).limit(limit + 1))).all()
            found = await self._with_tags(connection, rows[:limit])
        if len(rows) <= limit:
            return found, None
        return found, encode_token(searched, rows[limit - 1][len(experiment.c) :])

    async def rename(self, experiment_id: int, name: str) -> None:
        """Gives an active experiment another name.

        Raises:
            AlreadyExists: the name is taken.
        """
        check_name("experiment", name)
        try:
            async with self._engine.begin() as connection:
                await require_active_experiment(connection, experiment_id)
                await self._update(connection, experiment_id, name=name)
        except IntegrityError as error:
            if not is_unique_violation(error):
                raise
            raise AlreadyExists(f"Experiment(name={name}) already exists.") from error

    async def set_deleted(self, experiment_id: int, deleted: bool) -> None:
        """Deletes an experiment with its active runs, or restores it with those that were deleted with it.

        Raises:
            NotFound: unknown, or already in that state.
            InvalidInput: it is being purged, or its import is not complete.
        """
        async with self._engine.begin() as connection:
            if not deleted:
                await self._require_restorable(connection, experiment_id)
            changed = await self._update(
                connection,
                experiment_id,
                only_if_deleted=not deleted,
                deleted=deleted,
                deleted_at=func.clock_timestamp() if deleted else None,
            )
            if not changed:
                word = "active" if deleted else "deleted"
                raise NotFound(f"No Experiment with id={experiment_id} exists that is {word}")
            await (delete_runs_of if deleted else restore_runs_of)(connection, experiment_id)

    async def set_tag(self, experiment_id: int, key: str, value: str) -> None:
        """Sets one tag of an active experiment."""
        check_key("tag", key)
        async with self._engine.begin() as connection:
            await require_active_experiment(connection, experiment_id)
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
            await require_active_experiment(connection, experiment_id)
            if not (await connection.execute(statement)).rowcount:
                raise NotFound(f"No tag with name: {key} in experiment with id={experiment_id}")

    @staticmethod
    async def _require_restorable(connection: AsyncConnection, experiment_id: int) -> None:
        query = select(experiment.c.purge_started_at, experiment.c.importing).where(
            experiment.c.experiment_id == experiment_id
        )
        row = (await connection.execute(query.with_for_update())).first()
        if row is not None and row.purge_started_at is not None:
            raise InvalidInput(f"The experiment {experiment_id} is being purged and cannot be restored.")
        if row is not None and row.importing:
            raise InvalidInput(f"The experiment {experiment_id} is being imported; finish the import or purge it.")

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
        return await ExperimentStore._with_tags(connection, (await connection.execute(query)).all())

    @staticmethod
    async def _with_tags(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[Experiment]:
        tag_query = select(experiment_tag).where(
            experiment_tag.c.experiment_id.in_([row.experiment_id for row in rows])
        )
        tags: dict[int, dict[str, str]] = {}
        for tag in (await connection.execute(tag_query)).all() if rows else []:
            tags.setdefault(tag.experiment_id, {})[tag.key] = tag.value
        return [_experiment(row, tags.get(row.experiment_id, {})) for row in rows]


async def require_active_experiment(connection: AsyncConnection, experiment_id: int) -> str:
    """The artifact location of an experiment that may be written to; it stays active until the transaction ends.

    Raises:
        NotFound: no such experiment.
        InvalidInput: it is deleted.
    """
    query = select(experiment.c.artifact_location, experiment.c.deleted).where(
        experiment.c.experiment_id == experiment_id
    )
    row = (await connection.execute(query.with_for_update(read=True))).first()
    if row is None:
        raise NotFound(f"No Experiment with id={experiment_id} exists")
    if row.deleted:
        raise InvalidInput(f"The experiment {experiment_id} must be in the 'active' state. Current state is deleted.")
    return str(row.artifact_location)


async def delete_runs_of(connection: AsyncConnection, experiment_id: int) -> None:
    """Deletes the active runs of an experiment and remembers that they went with it."""
    await connection.execute(
        update(run)
        .where(run.c.experiment_id == experiment_id, ~run.c.deleted)
        .values(deleted=True, deleted_at=func.clock_timestamp(), deleted_with_experiment=True)
    )


async def restore_runs_of(connection: AsyncConnection, experiment_id: int) -> None:
    """Restores the runs that were deleted with their experiment, but for those that a purge has begun to remove."""
    await connection.execute(
        update(run)
        .where(run.c.experiment_id == experiment_id, run.c.deleted_with_experiment, run.c.purge_started_at.is_(None))
        .values(deleted=False, deleted_at=None, deleted_with_experiment=False)
    )


def _experiment(row: Row[Any], tags: dict[str, str]) -> Experiment:
    return Experiment(
        row.experiment_id, row.name, row.artifact_location, row.deleted, row.created_at, row.updated_at, tags
    )
