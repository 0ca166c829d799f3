"""Registry reads, straight from the Postgres primary: linearizable, no cache in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select, and_, func, select
from sqlalchemy.dialects.postgresql import aggregate_order_by, distinct_on
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import model_alias, model_version, model_version_tag, registered_model, registered_model_tag
from mlplat.errors import InvalidInput, NotFound
from mlplat.registry.model import ModelVersion, RegisteredModel, Stage, parse_stage, parse_version
from mlplat.registry.semver import SemanticVersion, VersionRange, is_range, parse_range

#: What the next version is compared with can be large, and is for the coordinator only.
_VERSIONS = select(*(column for column in model_version.c if column is not model_version.c.facts))


class RegistryStore:
    """All methods are safe to call concurrently. ``get_*`` raises NotFound, ``search_*`` returns lists."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def get_model(self, name: str) -> RegisteredModel:
        """The model with its newest versions."""
        async with self._engine.connect() as connection:
            found = await load_models(connection, select(registered_model).where(registered_model.c.name == name))
        if not found:
            raise NotFound(f"Registered Model with name={name} not found")
        return found[0]

    async def search_models(self, name_like: str | None, limit: int, offset: int) -> list[RegisteredModel]:
        """Models by name; ``name_like`` is an SQL pattern."""
        query = select(registered_model).order_by(registered_model.c.name)
        if name_like is not None:
            query = query.where(registered_model.c.name.like(name_like))
        async with self._engine.connect() as connection:
            return await load_models(connection, query.limit(limit).offset(offset))

    async def get_version(self, name: str, version: int) -> ModelVersion:
        """One version."""
        query = _VERSIONS.where(model_version.c.name == name, model_version.c.version == version)
        async with self._engine.connect() as connection:
            found = await load_versions(connection, query)
        if not found:
            raise NotFound(f"Model Version (name={name}, version={version}) not found")
        return found[0]

    async def get_by_alias(self, name: str, alias: str) -> ModelVersion:
        """The version an alias points at; ``latest`` is the highest version.

        Raises:
            InvalidInput: no such alias (MLflow answers 400 here).
            NotFound: no such model.
        """
        if alias.lower() == "latest":
            query = _VERSIONS.where(model_version.c.name == name).order_by(model_version.c.version.desc()).limit(1)
        else:
            query = _VERSIONS.join(
                model_alias,
                and_(model_alias.c.name == model_version.c.name, model_alias.c.version == model_version.c.version),
            ).where(model_alias.c.name == name, model_alias.c.alias == alias)
        async with self._engine.connect() as connection:
            found = await load_versions(connection, query)
        if not found:
            await self.get_model(name)
            raise InvalidInput(f"Registered model alias {alias} not found.")
        return found[0]

    async def get_in_stage(self, name: str, stage: Stage) -> ModelVersion:
        """The newest version in a stage."""
        for version in (await self.get_model(name)).latest:
            if version.stage == stage:
                return version
        raise NotFound(f"Registered Model (name={name}) has no version in stage {stage}")

    async def get_in_range(self, name: str, wanted: VersionRange) -> ModelVersion:
        """The version with the highest semantic version in a range."""
        found = await self.list_versions(name, wanted, 1)
        if not found:
            await self.get_model(name)
            raise NotFound(
                f"Registered Model (name={name}) has no version from {wanted.lower} up to, and without, {wanted.upper}"
            )
        return found[0]

    async def resolve(self, name: str, spec: str) -> ModelVersion:
        """The version that a text stands for: a number, a range, ``latest``, a stage, or ``@`` and an alias.

        Raises:
            InvalidInput: it is nothing of that.
        """
        if spec.isdecimal():
            return await self.get_version(name, parse_version(spec))
        if spec.startswith("@") or spec.lower() == "latest":
            return await self.get_by_alias(name, spec.removeprefix("@"))
        if is_range(spec):
            return await self.get_in_range(name, parse_range(spec))
        return await self.get_in_stage(name, parse_stage(spec))

    async def list_versions(
        self, name: str, wanted: VersionRange, limit: int, below: SemanticVersion | None = None
    ) -> list[ModelVersion]:
        """A model's versions in a range, the highest semantic version first; only those below one if it is given."""
        semantic = model_version.c.semantic
        upper = wanted.upper if below is None else min(below, wanted.upper)
        query = _VERSIONS.where(model_version.c.name == name, semantic >= list(wanted.lower), semantic < list(upper))
        async with self._engine.connect() as connection:
            return await load_versions(connection, query.order_by(semantic.desc()).limit(limit))

    async def search_versions(
        self, name: str | None, run_id: str | None, limit: int, offset: int
    ) -> list[ModelVersion]:
        """Versions of a model, of a run, or all; newest first."""
        query = _VERSIONS.order_by(
            model_version.c.updated_at.desc(), model_version.c.name, model_version.c.version.desc()
        )
        if name is not None:
            query = query.where(model_version.c.name == name)
        if run_id is not None:
            query = query.where(model_version.c.run_id == run_id)
        async with self._engine.connect() as connection:
            return await load_versions(connection, query.limit(limit).offset(offset))


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
    versions = _VERSIONS.join(
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


async def load_versions(connection: AsyncConnection, query: Select[Any]) -> list[ModelVersion]:
    """The versions that ``query`` (on model_version) finds, in its order, with tags and aliases."""
    rows: Sequence[Row[Any]] = (await connection.execute(query.add_columns(_TAGS, _ALIASES))).all()
    return [
        ModelVersion(
            row.name, row.version, row.description, row.source, row.artifact_uri, row.run_id, row.run_link,
            row.user_id, row.created_at, row.updated_at, SemanticVersion(*row.semantic), row.bump, row.bump_reason,
            Stage(row.stage), row.tags or {}, row.aliases or [],
        )
        for row in rows
    ]  # fmt: skip


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
