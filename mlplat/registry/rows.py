"""What the registry's commands have in common: rows that must be there."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import model_version, registered_model
from mlplat.errors import NotFound


async def change_model(connection: AsyncConnection, current_name: str, **values: str) -> None:
    changed = update(registered_model).where(registered_model.c.name == current_name)
    await require(connection, changed.values(**values, updated_at=func.clock_timestamp()), model_missing(current_name))


async def require_model(connection: AsyncConnection, name: str) -> None:
    query = select(registered_model.c.name).where(registered_model.c.name == name)
    if (await connection.execute(query)).first() is None:
        raise model_missing(name)


async def require_version(connection: AsyncConnection, name: str, version: int) -> None:
    query = select(model_version.c.version).where(*is_version(name, version))
    if (await connection.execute(query)).first() is None:
        raise version_missing(name, version)


async def require(connection: AsyncConnection, statement: Any, missing: NotFound) -> None:
    if not (await connection.execute(statement)).rowcount:
        raise missing


def is_version(name: str, version: int) -> tuple[Any, Any]:
    return model_version.c.name == name, model_version.c.version == version


def model_missing(name: str) -> NotFound:
    return NotFound(f"Registered Model with name={name} not found")


def version_missing(name: str, version: int) -> NotFound:
    return NotFound(f"Model Version (name={name}, version={version}) not found")
