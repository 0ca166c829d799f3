"""Registered models: created, described, renamed, tagged, protected and deleted."""

from __future__ import annotations

from sqlalchemy import delete, func, null, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import registered_model, registered_model_tag
from mlplat.errors import AlreadyExists
from mlplat.keys import check_key
from mlplat.registry.history import NAME, Change, Subject
from mlplat.registry.model import (
    CreateModel,
    DeleteModel,
    RenameModel,
    SetModelTag,
    SetPolicy,
    UpdateModel,
    check_model_name,
)
from mlplat.registry.policy import policy_from_json, policy_to_json
from mlplat.registry.rows import change_model, model_missing, require, require_model
from mlplat.tracking.model import cut_tag

ModelCommand = CreateModel | UpdateModel | RenameModel | DeleteModel | SetModelTag | SetPolicy


async def apply_to_model(connection: AsyncConnection, command: ModelCommand) -> list[Change]:
    """Applies a command on a model; see ``commands.apply``.

    Raises:
        NotFound: there is no such model.
        AlreadyExists: its name is taken.
        InvalidInput: a malformed name, tag or policy.
    """
    match command:
        case CreateModel():
            return await _create_model(connection, command)
        case RenameModel(name, new_name):
            return await _rename_model(connection, name, new_name)
        case DeleteModel(name):
            return await _delete_model(connection, name)
        case UpdateModel(name, description):
            await change_model(connection, name, description=description)
        case SetModelTag(name, key, value):
            await _set_model_tag(connection, name, key, value)
        case SetPolicy():
            await _set_policy(connection, command)
    return []


async def _create_model(connection: AsyncConnection, command: CreateModel) -> list[Change]:
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
    return [Change(Subject.MODEL, NAME, None, command.name)]


async def _rename_model(connection: AsyncConnection, name: str, new_name: str) -> list[Change]:
    check_model_name(new_name)
    taken = select(registered_model.c.name).where(registered_model.c.name == new_name)
    if (await connection.execute(taken)).first() is not None:
        raise AlreadyExists(f"Registered Model (name={new_name}) already exists.")
    await change_model(connection, name, name=new_name)
    return [Change(Subject.MODEL, NAME, name, new_name)]


async def _delete_model(connection: AsyncConnection, name: str) -> list[Change]:
    statement = delete(registered_model).where(registered_model.c.name == name)
    await require(connection, statement, model_missing(name))
    return [Change(Subject.MODEL, NAME, name, None)]


async def _set_policy(connection: AsyncConnection, command: SetPolicy) -> None:
    policy = policy_from_json(command.policy or {})
    value = null() if policy.is_free and not policy.roles else policy_to_json(policy)
    changed = update(registered_model).where(registered_model.c.name == command.name)
    values = changed.values(policy=value, updated_at=func.clock_timestamp())
    await require(connection, values, model_missing(command.name))


async def _set_model_tag(connection: AsyncConnection, name: str, key: str, value: str | None) -> None:
    await require_model(connection, name)
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
