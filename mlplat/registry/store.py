"""Registry reads, straight from the Postgres primary: linearizable, no cache in the way."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.reader import Fixed, Reader
from mlplat.db.tables import model_version, registered_model
from mlplat.errors import InvalidInput, NotFound
from mlplat.registry.loading import BY_ALIAS, BY_NUMBER, NEWEST, VERSIONS, load_models, load_versions, versions_of
from mlplat.registry.model import ModelVersion, RegisteredModel, Stage, parse_stage, parse_version
from mlplat.registry.semver import SemanticVersion, VersionRange, is_range, parse_range


class RegistryStore:
    """All methods are safe to call concurrently. ``get_*`` raises NotFound, ``search_*`` returns lists."""

    def __init__(self, engine: AsyncEngine, reader: Reader | None = None) -> None:
        """``reader`` finds single versions, which many ask for, at less cost."""
        # Each statement sees what is committed: no transaction around it, and no round trips for one.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._reader = reader

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
        found = await self._find(BY_NUMBER, of=name, number=version)
        if not found:
            raise NotFound(f"Model Version (name={name}, version={version}) not found")
        return found[0]

    async def get_by_alias(self, name: str, alias: str) -> ModelVersion:
        """The version an alias points at; ``latest`` is the highest version.

        Raises:
            InvalidInput: no such alias (MLflow answers 400 here).
            NotFound: no such model.
        """
        is_newest = alias.lower() == "latest"
        found = await (self._find(NEWEST, of=name) if is_newest else self._find(BY_ALIAS, of=name, pointing=alias))
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
        query = VERSIONS.where(model_version.c.name == name, semantic >= list(wanted.lower), semantic < list(upper))
        async with self._engine.connect() as connection:
            return await load_versions(connection, query.order_by(semantic.desc()).limit(limit))

    async def search_versions(
        self, name: str | None, run_id: str | None, limit: int, offset: int
    ) -> list[ModelVersion]:
        """Versions of a model, of a run, or all; newest first."""
        query = VERSIONS.order_by(
            model_version.c.updated_at.desc(), model_version.c.name, model_version.c.version.desc()
        )
        if name is not None:
            query = query.where(model_version.c.name == name)
        if run_id is not None:
            query = query.where(model_version.c.run_id == run_id)
        async with self._engine.connect() as connection:
            return await load_versions(connection, query.limit(limit).offset(offset))

    async def _find(self, statement: Fixed, **parameters: Any) -> list[ModelVersion]:
        if self._reader is not None:
            return versions_of(await self._reader.rows(statement, parameters))
        async with self._engine.connect() as connection:
            return await load_versions(connection, statement.query, parameters)
