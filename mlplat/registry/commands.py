"""What each registry command does to the tables, inside the coordinator's transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import model_alias, model_version, model_version_tag, registered_model, registered_model_tag
from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.keys import check_key
from mlplat.registry.model import (
    Command,
    CreateModel,
    CreateVersion,
    DeleteAlias,
    DeleteModel,
    DeleteVersion,
    RenameModel,
    SetAlias,
    SetModelTag,
    SetVersionTag,
    UpdateModel,
    UpdateVersion,
    check_alias,
    check_model_name,
)
from mlplat.tracking.model import cut_tag


async def apply(connection: AsyncConnection, command: Command) -> dict[str, Any]:
    """Applies a command and returns what its caller needs to know (``{"version": n}`` or nothing).

    Raises:
        NotFound, AlreadyExists, InvalidInput: the command does not fit the registry's state.
    """
    match command:
        case CreateModel():
            await _create_model(connection, command)
        case UpdateModel(name, description):
            await _change_model(connection, name, description=description)
        case RenameModel(name, new_name):
            await _rename_model(connection, name, new_name)
        case DeleteModel(name):
            await _require(
                connection, delete(registered_model).where(registered_model.c.name == name), _model_missing(name)
            )
        case SetModelTag(name, key, value):
            await _set_model_tag(connection, name, key, value)
        case CreateVersion():
            return {"version": await _create_version(connection, command)}
        case UpdateVersion(name, version, description):
            changed = update(model_version).where(*_is(name, version))
            values = changed.values(description=description, updated_at=func.clock_timestamp())
            await _require(connection, values, _version_missing(name, version))
        case DeleteVersion(name, version):
            await _require(
                connection, delete(model_version).where(*_is(name, version)), _version_missing(name, version)
            )
        case SetVersionTag(name, version, key, value):
            await _set_version_tag(connection, name, version, key, value)
        case SetAlias(name, alias, version):
            await _set_alias(connection, name, alias, version)
        case DeleteAlias(name, alias):
            await _require_model(connection, name)
            await connection.execute(
                delete(model_alias).where(model_alias.c.name == name, model_alias.c.alias == alias)
            )
    return {}


async def _create_model(connection: AsyncConnection, command: CreateModel) -> None:
    check_model_name(command.name)
    statement = upsert(registered_model).values(
        name=command.name,
        description=command.description,
        created_at=func.clock_timestamp(),
        updated_at=func.clock_timestamp(),
    )
    added = statement.on_conflict_do_nothing().returning(registered_model.c.name)
    if (await connection.execute(added)).first() is None:
        raise AlreadyExists(f"Registered Model (name={command.name}) already exists.")
    for key, value in command.tags.items():
        await _set_model_tag(connection, command.name, key, value)


async def _rename_model(connection: AsyncConnection, name: str, new_name: str) -> None:
    check_model_name(new_name)
    taken = select(registered_model.c.name).where(registered_model.c.name == new_name)
    if (await connection.execute(taken)).first() is not None:
        raise AlreadyExists(f"Registered Model (name={new_name}) already exists.")
    await _change_model(connection, name, name=new_name)


async def _create_version(connection: AsyncConnection, command: CreateVersion) -> int:
    if not command.source:
        raise InvalidInput("Missing value for required parameter 'source'.")
    last = registered_model.c.last_version
    number = update(registered_model).where(registered_model.c.name == command.name)
    if command.version is not None:
        number = number.where(last < command.version)
    number = number.values(last_version=command.version or last + 1, updated_at=func.clock_timestamp())
    version = (await connection.execute(number.returning(last))).scalar()
    if version is None:
        await _require_model(connection, command.name)
        raise AlreadyExists(
            f"Model Version (name={command.name}, version={command.version}): there is or was one with that number, "
            "or a later one."
        )
    await connection.execute(
        insert(model_version).values(
            name=command.name, version=version, description=command.description, source=command.source,
            artifact_uri=command.artifact_uri, run_id=command.run_id, run_link=command.run_link,
            user_id=command.user_id, created_at=func.clock_timestamp(), updated_at=func.clock_timestamp(),
        )
    )  # fmt: skip
    for key, value in command.tags.items():
        await _set_version_tag(connection, command.name, version, key, value)
    return int(version)


async def _set_model_tag(connection: AsyncConnection, name: str, key: str, value: str | None) -> None:
    await _require_model(connection, name)
    if value is None:
        await connection.execute(
            delete(registered_model_tag).where(registered_model_tag.c.name == name, registered_model_tag.c.key == key)
        )
        return
    check_key("tag", key)
    statement = upsert(registered_model_tag).values(name=name, key=key, value=cut_tag(value))
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["name", "key"], set_={"value": statement.excluded.value})
    )


async def _set_version_tag(connection: AsyncConnection, name: str, version: int, key: str, value: str | None) -> None:
    await _require_version(connection, name, version)
    if value is None:
        await connection.execute(
            delete(model_version_tag).where(
                model_version_tag.c.name == name,
                model_version_tag.c.version == version,
                model_version_tag.c.key == key,
            )
        )
        return
    check_key("tag", key)
    statement = upsert(model_version_tag).values(name=name, version=version, key=key, value=cut_tag(value))
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name", "version", "key"], set_={"value": statement.excluded.value}
        )
    )


async def _set_alias(connection: AsyncConnection, name: str, alias: str, version: int) -> None:
    check_alias(alias)
    await _require_version(connection, name, version)
    statement = upsert(model_alias).values(name=name, alias=alias, version=version)
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["name", "alias"], set_={"version": statement.excluded.version})
    )


async def _change_model(connection: AsyncConnection, current_name: str, **values: str) -> None:
    changed = update(registered_model).where(registered_model.c.name == current_name)
    await _require(
        connection, changed.values(**values, updated_at=func.clock_timestamp()), _model_missing(current_name)
    )


async def _require_model(connection: AsyncConnection, name: str) -> None:
    query = select(registered_model.c.name).where(registered_model.c.name == name)
    if (await connection.execute(query)).first() is None:
        raise _model_missing(name)


async def _require_version(connection: AsyncConnection, name: str, version: int) -> None:
    query = select(model_version.c.version).where(*_is(name, version))
    if (await connection.execute(query)).first() is None:
        raise _version_missing(name, version)


async def _require(connection: AsyncConnection, statement: Any, missing: NotFound) -> None:
    if not (await connection.execute(statement)).rowcount:
        raise missing


def _is(name: str, version: int) -> tuple[Any, Any]:
    return model_version.c.name == name, model_version.c.version == version


def _model_missing(name: str) -> NotFound:
    return NotFound(f"Registered Model with name={name} not found")


def _version_missing(name: str, version: int) -> NotFound:
    return NotFound(f"Model Version (name={name}, version={version}) not found")
