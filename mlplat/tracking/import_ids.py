"""The ids of what an import brings: their own where these are free, and the same again for the same import."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Select, Table, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import logged_model, metric_outbox, model_import, run, run_import


@dataclass(frozen=True)
class Assigned:
    """The id that a run or model of the source has here; ``complete`` when all of it has arrived."""

    source_id: str
    new_id: str
    complete: bool


@dataclass(frozen=True)
class Kind:
    """Something with ids: where an import notes them, what is there, and which other columns have ids in use."""

    noun: str
    prefix: str
    table: Table
    new_id: Column[Any]
    entity: Table
    in_use: tuple[Column[Any], ...]


#: The points of a purged run may still be there: its id is free when they are gone.
RUNS = Kind(
    "run", "", run_import, run_import.c.run_id, run, (run.c.run_id, run_import.c.run_id, metric_outbox.c.run_id)
)
MODELS = Kind(
    "logged model", "m-", model_import, model_import.c.model_id, logged_model,
    (logged_model.c.model_id, model_import.c.model_id),
)  # fmt: skip


async def assigned(
    connection: AsyncConnection, kind: Kind, experiment_id: int, source_ids: Collection[str]
) -> dict[str, Assigned]:
    """The ids that were given out before, by the source's ids."""
    table = kind.table.c
    query = select(table.source_id, kind.new_id, table.complete).where(
        table.experiment_id == experiment_id, table.source_id.in_(source_ids)
    )
    return {row.source_id: Assigned(*row) for row in await connection.execute(query)}


async def assign(
    connection: AsyncConnection, kind: Kind, experiment_id: int, source_ids: Sequence[str]
) -> list[Assigned]:
    """The ids of the source's runs or models here, in their order; those that are new get one."""
    known = await assigned(connection, kind, experiment_id, source_ids)
    new = [source_id for source_id in source_ids if source_id not in known]
    if new:
        taken = await _taken(connection, kind, new)
        free = [source_id for source_id in new if source_id not in taken]
        await _insert(connection, kind, experiment_id, {source_id: source_id for source_id in free})
        # Another import may have been faster.
        known |= await assigned(connection, kind, experiment_id, free)
        rest = [source_id for source_id in new if source_id not in known]
        others = {source_id: f"{kind.prefix}{uuid.uuid4().hex}" for source_id in rest}
        await _insert(connection, kind, experiment_id, others)
        known |= await assigned(connection, kind, experiment_id, rest)
    return [known[source_id] for source_id in source_ids]


async def strangers(connection: AsyncConnection, kind: Kind, experiment_id: int, ids: Collection[str]) -> set[str]:
    """Those of the ids that this import was not given."""
    query = select(kind.new_id).where(kind.table.c.experiment_id == experiment_id, kind.new_id.in_(ids))
    return set(ids) - set((await connection.execute(query)).scalars())


async def complete(connection: AsyncConnection, kind: Kind, experiment_id: int, ids: Collection[str]) -> int:
    """Notes that these have arrived; returns how many of them were never sent."""
    entity = kind.entity.c
    sent = select(entity[kind.new_id.name]).where(entity.experiment_id == experiment_id, _is_one(kind, ids))
    statement = (
        update(kind.table)
        .where(kind.table.c.experiment_id == experiment_id, kind.new_id.in_(sent))
        .values(complete=True)
    )
    return len(set(ids)) - (await connection.execute(statement)).rowcount


async def count_missing(connection: AsyncConnection, kind: Kind, experiment_id: int) -> int:
    """How many have not arrived."""
    table = kind.table.c
    query = select(func.count()).where(table.experiment_id == experiment_id, ~table.complete)
    return int((await connection.execute(query)).scalar_one())


def _is_one(kind: Kind, ids: Collection[str]) -> ColumnElement[bool]:
    return kind.entity.c[kind.new_id.name].in_(ids)


async def _taken(connection: AsyncConnection, kind: Kind, ids: Sequence[str]) -> set[str]:
    first, *others = (select(column).where(column.in_(ids)) for column in kind.in_use)
    query: Select[Any] | Any = first.union(*others)
    return set((await connection.execute(query)).scalars())


async def _insert(connection: AsyncConnection, kind: Kind, experiment_id: int, ids: Mapping[str, str]) -> None:
    """Gives out ids, but for those that somebody else was given meanwhile."""
    if ids:
        name = kind.new_id.name
        rows = [{"experiment_id": experiment_id, "source_id": old, name: new} for old, new in ids.items()]
        await connection.execute(upsert(kind.table).on_conflict_do_nothing(), rows)
