"""Aliases: set and deleted, also by compare-and-set."""

from __future__ import annotations

from sqlalchemy import and_, bindparam, delete, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import model_alias, model_version, registered_model, registry_change
from mlplat.errors import Conflict, InvalidInput
from mlplat.registry.history import Change, Subject
from mlplat.registry.model import ABSENT, DeleteAlias, RollBackAlias, SetAlias, check_alias
from mlplat.registry.rows import require_model, version_missing

#: Built once: building a statement takes longer than Postgres takes for it. Of a version that is there, one row.
_BEFORE = (
    select(model_alias.c.version.label("before"))
    .select_from(model_version)
    .outerjoin(model_alias, and_(model_alias.c.name == model_version.c.name, model_alias.c.alias == bindparam("alias")))
    .where(model_version.c.name == bindparam("name"), model_version.c.version == bindparam("version"))
)
_INSERT = upsert(model_alias).values({key: bindparam(key) for key in ("name", "alias", "version")})
_SET = _INSERT.on_conflict_do_update(index_elements=["name", "alias"], set_={"version": _INSERT.excluded.version})


async def change_alias(
    connection: AsyncConnection, command: SetAlias | DeleteAlias | RollBackAlias
) -> tuple[list[Change], dict[str, int]]:
    """Applies a command on an alias; see ``commands.apply``.

    Raises:
        NotFound: there is no such model or version.
        Conflict: the alias does not point at the expected version.
        InvalidInput: a malformed alias, or nothing to roll back to.
    """
    match command:
        case SetAlias():
            return await _set_alias(connection, command), {}
        case DeleteAlias():
            return await _delete_alias(connection, command), {}
        case RollBackAlias():
            return await _roll_back_alias(connection, command)


async def _set_alias(connection: AsyncConnection, command: SetAlias) -> list[Change]:
    name, alias, version = command.name, command.alias, command.version
    check_alias(alias)
    given = {"name": name, "alias": alias, "version": version}
    row = (await connection.execute(_BEFORE, given)).first()
    if row is None:
        raise version_missing(name, version)
    before = _as_expected(name, alias, row.before or ABSENT, command.expected)
    if before == version:
        return []
    await connection.execute(_SET, given)
    return [Change(Subject.ALIAS, alias, str(before) if before else None, str(version))]


async def _delete_alias(connection: AsyncConnection, command: DeleteAlias) -> list[Change]:
    name, alias = command.name, command.alias
    await require_model(connection, name)
    before = await _expect(connection, name, alias, command.expected)
    if before == ABSENT:
        return []
    await connection.execute(delete(model_alias).where(model_alias.c.name == name, model_alias.c.alias == alias))
    return [Change(Subject.ALIAS, alias, str(before), None)]


async def _roll_back_alias(connection: AsyncConnection, command: RollBackAlias) -> tuple[list[Change], dict[str, int]]:
    name, alias = command.name, command.alias
    await require_model(connection, name)
    current = await _expect(connection, name, alias, None)
    if current == ABSENT:
        raise InvalidInput(f"Registered model alias {alias} not found.")
    model = select(registered_model.c.model_id).where(registered_model.c.name == name).scalar_subquery()
    last = (
        select(registry_change.c.before)
        .where(registry_change.c.model_id == model, registry_change.c.key == alias)
        .where(registry_change.c.subject == Subject.ALIAS)
        .order_by(registry_change.c.change_id.desc())
        .limit(1)
    )
    before = (await connection.execute(last)).scalar()
    if before is None:
        raise InvalidInput(f"Alias {alias} of {name} points at version {current}, and did not exist before.")
    changes = await _set_alias(connection, SetAlias(name, alias, int(before), current))
    return changes, {"version": int(before), "was": current}


async def _expect(connection: AsyncConnection, name: str, alias: str, expected: int | None) -> int:
    """The version that the alias points at, which is the expected one if there is such."""
    query = select(model_alias.c.version).where(model_alias.c.name == name, model_alias.c.alias == alias)
    return _as_expected(name, alias, (await connection.execute(query)).scalar() or ABSENT, expected)


def _as_expected(name: str, alias: str, found: int, expected: int | None) -> int:
    if expected is not None and found != expected:
        raise Conflict(
            f"Registered Model (name={name}): alias {alias} {_points_at(found)}; expected was that it "
            f"{_points_at(expected)}."
        )
    return found


def _points_at(version: int) -> str:
    return "is not set" if version == ABSENT else f"points at version {version}"
