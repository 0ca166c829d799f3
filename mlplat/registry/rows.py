"""What the registry's commands have in common: rows that must be there."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import model_version, registered_model
from mlplat.errors import NotFound


async def change_model(connection: AsyncConnection, current_name: str, **values: str) -> None:
    """Changes the model, and notes when.

    Raises:
        NotFound: there is none.
    """
    changed = update(registered_model).where(registered_model.c.name == current_name)
    await require(connection, changed.values(**values, updated_at=func.clock_timestamp()), model_missing(current_name))


async def require_model(connection: AsyncConnection, name: str) -> None:
    """Raises NotFound when there is no such model."""
    query = select(registered_model.c.name).where(registered_model.c.name == name)
    if (await connection.execute(query)).first() is None:
        raise model_missing(name)


async def require_version(connection: AsyncConnection, name: str, version: int) -> None:
    """Raises NotFound when there is no such version."""
    query = select(model_version.c.version).where(*is_version(name, version))
    if (await connection.execute(query)).first() is None:
        raise version_missing(name, version)


async def require(connection: AsyncConnection, statement: Any, missing: NotFound) -> None:
    """Executes a change, and raises ``missing`` when it found no row."""
    if not (await connection.execute(statement)).rowcount:
        raise missing


def is_version(name: str, version: int) -> tuple[Any, Any]:
    """Conditions on ``model_version`` that are true of this version."""
    return model_version.c.name == name, model_version.c.version == version


def model_missing(name: str) -> NotFound:
    """MLflow's words for a model that is not there."""
    return NotFound(f"Registered Model with name={name} not found")


def version_missing(name: str, version: int) -> NotFound:
    """MLflow's words for a version that is not there."""
    return NotFound(f"Model Version (name={name}, version={version}) not found")
