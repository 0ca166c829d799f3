"""What each registry command does to the tables, inside the coordinator's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import registered_model, registered_model_tag
from mlplat.errors import AlreadyExists
from mlplat.keys import check_key
from mlplat.registry.aliases import change_alias
from mlplat.registry.history import NAME, Change, Subject
from mlplat.registry.model import (
    Command,
    CreateModel,
    CreateVersion,
    DeleteAlias,
    DeleteModel,
    DeleteVersion,
    RenameModel,
    RollBackAlias,
    SetAlias,
    SetModelTag,
    SetStage,
    SetVersionTag,
    Stage,
    UpdateModel,
    UpdateVersion,
    check_model_name,
)
from mlplat.registry.rows import change_model, model_missing, require, require_model
from mlplat.registry.stages import set_stage
from mlplat.registry.versions import create_version, delete_version, set_version_tag, update_version
from mlplat.tracking.model import cut_tag


@dataclass(frozen=True)
class Applied:
    """What a command did: the answer for its caller, and what the history remembers of it."""

    changes: Sequence[Change]
    answer: dict[str, Any]


async def apply(connection: AsyncConnection, command: Command) -> Applied:
    """Applies a command.

    Its answer is ``{"version": n, "semantic_version": "x.y.z"}`` for a new version, ``{"version": n, "was": m}`` for an
    alias that was rolled back, else empty.

    Raises:
        NotFound, AlreadyExists, InvalidInput, Conflict: the command does not fit the registry's state.
    """
    changes: Sequence[Change] = ()
    answer: dict[str, Any] = {}
    match command:
        case CreateModel():
            changes = await _create_model(connection, command)
        case UpdateModel(name, description):
            await change_model(connection, name, description=description)
        case RenameModel(name, new_name):
            changes = await _rename_model(connection, name, new_name)
        case DeleteModel(name):
            statement = delete(registered_model).where(registered_model.c.name == name)
            await require(connection, statement, model_missing(name))
            changes = [Change(Subject.MODEL, NAME, name, None)]
        case SetModelTag(name, key, value):
            await _set_model_tag(connection, name, key, value)
        case CreateVersion():
            answer = await create_version(connection, command)
            changes = [Change(Subject.STAGE, str(answer["version"]), None, Stage.NONE)]
        case UpdateVersion(name, version, description):
            await update_version(connection, name, version, description)
        case DeleteVersion(name, version):
            changes = await delete_version(connection, name, version)
        case SetVersionTag():
            await set_version_tag(connection, command)
        case SetAlias() | DeleteAlias() | RollBackAlias():
            changes, answer = await change_alias(connection, command)
        case SetStage():
            changes = await set_stage(connection, command)
    return Applied(changes, answer)


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
