"""Aliases: set and deleted, also by compare-and-set."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import model_alias
from mlplat.errors import Conflict
from mlplat.registry.history import Change, Subject
from mlplat.registry.model import ABSENT, DeleteAlias, SetAlias, check_alias
from mlplat.registry.rows import require_model, require_version


async def set_alias(connection: AsyncConnection, command: SetAlias) -> list[Change]:
    """See ``SetAlias``."""
    name, alias, version = command.name, command.alias, command.version
    check_alias(alias)
    await require_version(connection, name, version)
    before = await _expect(connection, name, alias, command.expected)
    if before == version:
        return []
    statement = upsert(model_alias).values(name=name, alias=alias, version=version)
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["name", "alias"], set_={"version": statement.excluded.version})
    )
    return [Change(Subject.ALIAS, alias, str(before) if before else None, str(version))]


async def delete_alias(connection: AsyncConnection, command: DeleteAlias) -> list[Change]:
    """See ``DeleteAlias``."""
    name, alias = command.name, command.alias
    await require_model(connection, name)
    before = await _expect(connection, name, alias, command.expected)
    if before == ABSENT:
        return []
    await connection.execute(delete(model_alias).where(model_alias.c.name == name, model_alias.c.alias == alias))
    return [Change(Subject.ALIAS, alias, str(before), None)]


async def _expect(connection: AsyncConnection, name: str, alias: str, expected: int | None) -> int:
    """The version that the alias points at, which is the expected one if there is such."""
    query = select(model_alias.c.version).where(model_alias.c.name == name, model_alias.c.alias == alias)
    found = int((await connection.execute(query)).scalar() or ABSENT)
    if expected is not None and found != expected:
        raise Conflict(
            f"Registered Model (name={name}): alias {alias} {_points_at(found)}; expected was that it "
            f"{_points_at(expected)}."
        )
    return found


def _points_at(version: int) -> str:
    return "is not set" if version == ABSENT else f"points at version {version}"
