"""Reads of the registry's history, straight from the Postgres primary."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, func, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import registered_model, registry_change, registry_event
from mlplat.errors import NotFound
from mlplat.registry.history import Change, Moment, Recorded, Subject


class RegistryHistory:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def changes(
        self, name: str, subject: Subject | None, key: str | None, limit: int, before: int | None = None
    ) -> list[Recorded]:
        """Changes of the model that has the name, or of the last one that had it; newest first.

        Args:
            subject: only changes of names, aliases or stages.
            key: only those of this alias or version.
            before: only those before the change with this number.

        Raises:
            NotFound: no model ever had the name.
        """
        async with self._engine.connect() as connection:
            model_id = await _model_of(connection, name)
            query = _RECORDED.where(registry_change.c.model_id == model_id)
            if subject is not None:
                query = query.where(registry_change.c.subject == subject)
            if key is not None:
                query = query.where(registry_change.c.key == key)
            if before is not None:
                query = query.where(registry_change.c.change_id < before)
            newest = query.order_by(registry_change.c.change_id.desc()).limit(limit)
            return [_recorded(row) for row in await connection.execute(newest)]

    async def at(self, name: str, moment: datetime | None) -> Moment:
        """What the model that had the name then was then; None: now, by the database's clock.

        Raises:
            NotFound: no model had the name then.
        """
        async with self._engine.connect() as connection:
            if moment is None:
                moment = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
            model_id = await _model_at(connection, name, moment)
            found = _latest(moment).where(registry_change.c.model_id == model_id)
            rows: Sequence[Row[Any]] = (await connection.execute(found)).all()
        states = {(row.subject, row.key): row.after for row in rows if row.after is not None}
        return Moment(
            name,
            moment,
            {key: int(after) for (subject, key), after in sorted(states.items()) if subject == Subject.ALIAS},
            dict(sorted((int(key), after) for (subject, key), after in states.items() if subject == Subject.STAGE)),
        )


async def _model_of(connection: AsyncConnection, name: str) -> int:
    query = select(registered_model.c.model_id).where(registered_model.c.name == name)
    for candidates in (query, _named(name).limit(1)):
        found: int | None = (await connection.execute(candidates)).scalar()
        if found is not None:
            return found
    raise NotFound(f"no registered model has or had the name {name}")


async def _model_at(connection: AsyncConnection, name: str, moment: datetime) -> int:
    """The last model that took the name before the moment, if it had not lost it by then."""
    took = _named(name).join(registry_event).where(registry_event.c.created_at <= moment).limit(1)
    model_id = (await connection.execute(took)).scalar()
    if model_id is not None:
        had = _latest(moment).where(registry_change.c.model_id == model_id, registry_change.c.subject == Subject.MODEL)
        row = (await connection.execute(had)).first()
        if row is not None and row.after == name:
            return int(model_id)
    raise NotFound(f"no registered model had the name {name} at {moment.isoformat()}")


def _named(name: str) -> Select[Any]:
    return (
        select(registry_change.c.model_id)
        .where(registry_change.c.subject == Subject.MODEL, registry_change.c.after == name)
        .order_by(registry_change.c.change_id.desc())
    )


def _latest(moment: datetime) -> Select[Any]:
    """The last change of each subject before the moment."""
    return (
        select(registry_change.c.subject, registry_change.c.key, registry_change.c.after)
        .ext(distinct_on(registry_change.c.subject, registry_change.c.key))
        .join(registry_event)
        .where(registry_event.c.created_at <= moment)
        .order_by(registry_change.c.subject, registry_change.c.key, registry_change.c.change_id.desc())
    )


_RECORDED = select(
    registry_change, registry_event.c.created_at, registry_event.c.user_id, registry_event.c.reason,
    registry_event.c.request_id,
).join(registry_event)  # fmt: skip


def _recorded(row: Row[Any]) -> Recorded:
    change = Change(Subject(row.subject), row.key, row.before, row.after)
    return Recorded(row.change_id, change, row.created_at, row.user_id, row.reason, row.request_id)
