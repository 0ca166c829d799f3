"""The statements that read models and versions, made once: to build one costs more than to execute it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Executable, Select, Text, and_, bindparam, cast, column, func, select
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by, distinct_on
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.reader import Fixed
from mlplat.db.tables import model_alias, model_version, model_version_tag, registered_model, registered_model_tag
from mlplat.registry.model import ModelVersion, RegisteredModel, Stage
from mlplat.registry.semver import SemanticVersion

# Beside each row, so that a read is one statement.
_MODEL_TAGS = (
    select(func.json_object_agg(registered_model_tag.c.key, registered_model_tag.c.value))
    .where(registered_model_tag.c.name == registered_model.c.name)
    .scalar_subquery()
    .label("tags")
)
_MODEL_ALIASES = (
    select(func.json_object_agg(model_alias.c.alias, model_alias.c.version))
    .where(model_alias.c.name == registered_model.c.name)
    .scalar_subquery()
    .label("aliases")
)
_TAGS = (
    select(func.json_object_agg(model_version_tag.c.key, model_version_tag.c.value))
    .where(model_version_tag.c.name == model_version.c.name, model_version_tag.c.version == model_version.c.version)
    .scalar_subquery()
    .label("tags")
)
_ALIASES = (
    select(func.array_agg(aggregate_order_by(model_alias.c.alias, model_alias.c.alias)))
    .where(model_alias.c.name == model_version.c.name, model_alias.c.version == model_version.c.version)
    .correlate(model_version)
    .scalar_subquery()
    .label("aliases")
)

#: All versions. Without their facts, which can be large, and are for the coordinator only.
VERSIONS = select(*(column for column in model_version.c if column is not model_version.c.facts), _TAGS, _ALIASES)
_OF_MODEL = VERSIONS.where(model_version.c.name == bindparam("of"))
#: With the parameter ``of``, a model's name.
NEWEST = Fixed.of(_OF_MODEL.order_by(model_version.c.version.desc()).limit(1))
_LIST = func.unnest(cast(bindparam("names"), ARRAY(Text)), cast(bindparam("numbers"), ARRAY(BigInteger))).table_valued(
    column("name", Text), column("number", BigInteger), with_ordinality="place", name="listed"
)
_LISTED = _LIST.render_derived()
#: In the order of ``names`` and ``numbers``.
LISTED = VERSIONS.join(
    _LISTED, and_(_LISTED.c.name == model_version.c.name, _LISTED.c.number == model_version.c.version)
).order_by(_LISTED.c.place)
#: The same in no order.
BY_NUMBER = Fixed.of(LISTED.order_by(None))
_ALIAS_LIST = (
    func.unnest(cast(bindparam("names"), ARRAY(Text)), cast(bindparam("pointing"), ARRAY(Text)))
    .table_valued(column("name", Text), column("alias", Text), name="listed")
    .render_derived()
)
#: With ``names`` and ``pointing``, an alias of each; ``wanted`` is that of a row.
BY_ALIAS = Fixed.of(
    VERSIONS.join(
        model_alias,
        and_(model_alias.c.name == model_version.c.name, model_alias.c.version == model_version.c.version),
    )
    .join(
        _ALIAS_LIST,
        and_(_ALIAS_LIST.c.name == model_alias.c.name, _ALIAS_LIST.c.alias == model_alias.c.alias),
    )
    .add_columns(_ALIAS_LIST.c.alias.label("wanted"))
)


async def load_models(connection: AsyncConnection, query: Select[Any]) -> list[RegisteredModel]:
    """The models that ``query`` (on registered_model) finds, with tags, aliases and newest versions."""
    rows = (await connection.execute(query.add_columns(_MODEL_TAGS, _MODEL_ALIASES))).all()
    if not rows:
        return []
    newest = (
        select(model_version.c.name, model_version.c.version)
        .ext(distinct_on(model_version.c.name, model_version.c.stage))
        .where(model_version.c.name.in_([row.name for row in rows]))
        .order_by(model_version.c.name, model_version.c.stage, model_version.c.version.desc())
        .subquery()
    )
    versions = VERSIONS.join(
        newest, and_(newest.c.name == model_version.c.name, newest.c.version == model_version.c.version)
    ).order_by(model_version.c.version.desc())
    latest: dict[str, list[ModelVersion]] = {}
    for version in await load_versions(connection, versions):
        latest.setdefault(version.name, []).append(version)
    return [
        RegisteredModel(
            row.name, row.description, row.created_at, row.updated_at, row.tags or {},
            dict(sorted((row.aliases or {}).items())), latest.get(row.name, []),
        )
        for row in rows
    ]  # fmt: skip


async def load_versions(
    connection: AsyncConnection, query: Executable, parameters: Mapping[str, Any] | None = None
) -> list[ModelVersion]:
    """The versions that ``query``, made from ``VERSIONS``, finds, in its order."""
    return versions_of((await connection.execute(query, parameters)).all())


def versions_of(rows: Sequence[Any]) -> list[ModelVersion]:
    """The versions that rows of ``VERSIONS`` are."""
    return [
        ModelVersion(
            row.name, row.version, row.description, row.source, row.artifact_uri, row.run_id, row.run_link,
            row.user_id, row.created_at, row.updated_at, SemanticVersion(*row.semantic), row.bump, row.bump_reason,
            Stage(row.stage), row.tags or {}, row.aliases or [], row.manifest, row.stamp,
        )
        for row in rows
    ]  # fmt: skip
