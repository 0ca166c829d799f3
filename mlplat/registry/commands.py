"""What each registry command does to the tables, inside the coordinator's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import model_alias, model_version, model_version_tag, registered_model, registered_model_tag
from mlplat.errors import AlreadyExists, InvalidInput
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
from mlplat.registry.rows import (
    change_model,
    is_version,
    model_missing,
    require,
    require_model,
    require_version,
    version_missing,
)
from mlplat.registry.stages import set_stage
from mlplat.tracking.model import cut_tag


@dataclass(frozen=True)
class Applied:
    """What a command did: the answer for its caller, and what the history remembers of it."""

    changes: Sequence[Change]
    answer: dict[str, Any]


async def apply(connection: AsyncConnection, command: Command) -> Applied:
    """Applies a command.

    Its answer is ``{"version": n}`` for a new version, ``{"version": n, "was": m}`` for an alias that was rolled back,
    else empty.

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
            answer = {"version": await _create_version(connection, command)}
            changes = [Change(Subject.STAGE, str(answer["version"]), None, Stage.NONE)]
        case UpdateVersion(name, version, description):
            changed = update(model_version).where(*is_version(name, version))
            values = changed.values(description=description, updated_at=func.clock_timestamp())
            await require(connection, values, version_missing(name, version))
        case DeleteVersion(name, version):
            changes = await _delete_version(connection, name, version)
        case SetVersionTag(name, version, key, value):
            await _set_version_tag(connection, name, version, key, value)
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
        await require_model(connection, command.name)
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


async def _delete_version(connection: AsyncConnection, name: str, version: int) -> list[Change]:
    pointing = select(model_alias.c.alias).where(model_alias.c.name == name, model_alias.c.version == version)
    aliases = (await connection.execute(pointing.order_by(model_alias.c.alias))).scalars().all()
    deleted = delete(model_version).where(*is_version(name, version)).returning(model_version.c.stage)
    stage = (await connection.execute(deleted)).scalar()
    if stage is None:
        raise version_missing(name, version)
    changes = [Change(Subject.ALIAS, alias, str(version), None) for alias in aliases]
    return [*changes, Change(Subject.STAGE, str(version), stage, None)]


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


async def _set_version_tag(connection: AsyncConnection, name: str, version: int, key: str, value: str | None) -> None:
    await require_version(connection, name, version)
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
