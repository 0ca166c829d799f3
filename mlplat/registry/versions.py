"""Versions: created with both their numbers, described, tagged and deleted."""

from __future__ import annotations

import json
import posixpath
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import (
    dataset,
    model_alias,
    model_version,
    model_version_tag,
    registered_model,
    registry_event,
    run_input,
    run_tag,
)
from mlplat.errors import AlreadyExists, InvalidInput
from mlplat.keys import check_key
from mlplat.registry.bumps import Facts, derive_bump, facts_from_json, facts_to_json
from mlplat.registry.history import Change, Subject
from mlplat.registry.model import SEMANTIC_VERSION_TAG, CreateVersion, SetVersionTag
from mlplat.registry.rows import is_version, require, require_model, require_version, version_missing
from mlplat.registry.semver import FIRST, Bump, SemanticVersion, bumped, parse_semantic_version
from mlplat.tracking.model import cut_tag
from mlplat.tracking.run_facts import COMMIT_TAG, DIRTY_TAG, SOURCE_TAG

_BY_HAND = "set by hand"


async def create_version(connection: AsyncConnection, command: CreateVersion) -> dict[str, Any]:
    """See ``CreateVersion``; the answer has ``version`` and ``semantic_version``.

    Raises:
        NotFound: there is no such model.
        AlreadyExists: there is or was a version with one of the numbers that were asked for.
        InvalidInput: it has no source, or a malformed semantic version.
    """
    if not command.source:
        raise InvalidInput("Missing value for required parameter 'source'.")
    version = await _next_number(connection, command)
    facts = await _facts(connection, command)
    semantic, bump, reason = await _next_semantic(connection, command, facts)
    await connection.execute(
        insert(model_version).values(
            name=command.name, version=version, description=command.description, source=command.source,
            artifact_uri=command.artifact_uri, run_id=command.run_id, run_link=command.run_link,
            user_id=command.user_id, semantic=list(semantic), bump=bump, bump_reason=reason,
            facts=facts_to_json(facts), manifest=command.manifest, stamp=command.stamp,
            size_bytes=command.size_bytes,
            created_at=func.clock_timestamp(), updated_at=func.clock_timestamp(),
        )
    )  # fmt: skip
    for key, value in command.tags.items():
        await set_version_tag(connection, SetVersionTag(command.name, version, key, value))
    return {"version": version, "semantic_version": str(semantic)}


async def _next_number(connection: AsyncConnection, command: CreateVersion) -> int:
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
    return int(version)


async def _facts(connection: AsyncConnection, command: CreateVersion) -> Facts:
    """What is known of the version and of the run that it comes from."""
    signature = None if command.signature is None else json.loads(command.signature)
    run_id = command.run_id or command.source_run_id
    if run_id is None:
        return Facts(signature)
    told = select(run_tag.c.key, run_tag.c.value).where(run_tag.c.run_id == run_id)
    rows = await connection.execute(told.where(run_tag.c.key.in_([COMMIT_TAG, DIRTY_TAG, SOURCE_TAG])))
    tags = {row.key: row.value for row in rows}
    inputs = select(dataset.c.name, dataset.c.digest).join(run_input).where(run_input.c.run_id == run_id)
    data = tuple(sorted(f"{row.name} {row.digest}" for row in await connection.execute(inputs)))
    return Facts(
        signature,
        tags.get(COMMIT_TAG),
        tags.get(DIRTY_TAG) == "true",
        # Jobs run in a folder of their own.
        posixpath.basename(tags[SOURCE_TAG].replace("\\", "/")) if SOURCE_TAG in tags else None,
        data or None,
        run_id,
    )


async def _next_semantic(
    connection: AsyncConnection, command: CreateVersion, facts: Facts
) -> tuple[SemanticVersion, str, str]:
    """The semantic version, which number of it grew, and why."""
    query = select(registered_model.c.last_semantic, registered_model.c.model_id)
    row = (await connection.execute(query.where(registered_model.c.name == command.name))).one()
    last = None if row.last_semantic is None else SemanticVersion(*row.last_semantic)
    asked = command.semantic_version
    if asked is not None and asked not in list(Bump):
        semantic, bump, reason = parse_semantic_version(asked), "", _BY_HAND
        await _require_unused(connection, command.name, row.model_id, semantic)
    elif last is None:
        semantic, bump, reason = FIRST, "", "the first version"
    else:
        derived = (Bump(asked), _BY_HAND) if asked else await _derive(connection, command.name, facts)
        semantic, bump, reason = bumped(last, derived[0]), *derived
    if last is None or semantic > last:
        highest = update(registered_model).where(registered_model.c.name == command.name)
        await connection.execute(highest.values(last_semantic=list(semantic)))
    return semantic, bump, reason


async def _derive(connection: AsyncConnection, name: str, facts: Facts) -> tuple[Bump, str]:
    """By comparison with the highest version that there is."""
    highest = select(model_version.c.facts).where(model_version.c.name == name)
    before = (await connection.execute(highest.order_by(model_version.c.semantic.desc()).limit(1))).scalar()
    if before is None:
        return Bump.MAJOR, "no version is left to compare with"
    return derive_bump(facts_from_json(before), facts)


async def _require_unused(connection: AsyncConnection, name: str, model_id: int, semantic: SemanticVersion) -> None:
    existing = select(model_version.c.version).where(model_version.c.name == name)
    used = select(registry_event.c.event_id).where(
        registry_event.c.model_id == model_id,
        registry_event.c.kind == CreateVersion.__name__,
        registry_event.c.answer["semantic_version"].astext == str(semantic),
    )
    for query in (existing.where(model_version.c.semantic == list(semantic)), used.limit(1)):
        if (await connection.execute(query)).first() is not None:
            raise AlreadyExists(f"Registered Model (name={name}) has or had a version {semantic} already.")


async def update_version(connection: AsyncConnection, name: str, version: int, description: str) -> None:
    """Replaces the description.

    Raises:
        NotFound: there is no such version.
    """
    changed = update(model_version).where(*is_version(name, version))
    values = changed.values(description=description, updated_at=func.clock_timestamp())
    await require(connection, values, version_missing(name, version))


async def delete_version(connection: AsyncConnection, name: str, version: int) -> list[Change]:
    """Deletes the version and the aliases that point at it.

    Raises:
        NotFound: there is no such version.
    """
    pointing = select(model_alias.c.alias).where(model_alias.c.name == name, model_alias.c.version == version)
    aliases = (await connection.execute(pointing.order_by(model_alias.c.alias))).scalars().all()
    deleted = delete(model_version).where(*is_version(name, version)).returning(model_version.c.stage)
    stage = (await connection.execute(deleted)).scalar()
    if stage is None:
        raise version_missing(name, version)
    changes = [Change(Subject.ALIAS, alias, str(version), None) for alias in aliases]
    return [*changes, Change(Subject.STAGE, str(version), stage, None)]


async def set_version_tag(connection: AsyncConnection, command: SetVersionTag) -> None:
    """See ``SetVersionTag``.

    Raises:
        NotFound: there is no such version.
        InvalidInput: a malformed key, or that of the semantic version, which stays what it is.
    """
    name, version, key = command.name, command.version, command.key
    await require_version(connection, name, version)
    if key == SEMANTIC_VERSION_TAG:
        raise InvalidInput(f"The tag {key} shows the version's semantic version, which cannot change.")
    if command.value is None:
        tag = model_version_tag.c
        await connection.execute(
            delete(model_version_tag).where(tag.name == name, tag.version == version, tag.key == key)
        )
        return
    check_key("tag", key)
    statement = upsert(model_version_tag).values(name=name, version=version, key=key, value=cut_tag(command.value))
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["name", "version", "key"], set_={"value": statement.excluded.value}
        )
    )
