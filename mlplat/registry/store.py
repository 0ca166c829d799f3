"""Registry reads, straight from the Postgres primary: linearizable, no cache in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, Select, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import SEARCH_SETTINGS
from mlplat.db.group_read import GroupRead
from mlplat.db.reader import Fixed, Reader
from mlplat.db.tables import model_version, registered_model
from mlplat.errors import InvalidInput, NotFound
from mlplat.registry.loading import (
    BY_ALIAS,
    BY_NUMBER,
    LISTED,
    NEWEST,
    VERSIONS,
    load_models,
    load_versions,
    versions_of,
)
from mlplat.registry.model import ModelVersion, RegisteredModel, Stage, parse_stage, parse_version
from mlplat.registry.semver import SemanticVersion, VersionRange, is_range, parse_range

_ROW_BY_ROW_SETTINGS = text(
    f"{SEARCH_SETTINGS.text}, set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)"
)


class RegistryStore:
    """All methods are safe to call concurrently. ``get_*`` raises NotFound, ``list_*`` and ``load_*`` return lists."""

    def __init__(self, engine: AsyncEngine, reader: Reader | None = None) -> None:
        """``reader`` finds single versions, which many ask for, at less cost."""
        self._transactions = engine
        # Each statement sees what is committed: no transaction around it, and no round trips for one.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._reader = reader
        self._numbers = GroupRead(self._read_numbers)
        self._pointers = GroupRead(self._read_aliases)

    async def get_model(self, name: str) -> RegisteredModel:
        """The model with its newest versions."""
        async with self._engine.connect() as connection:
            found = await load_models(connection, select(registered_model).where(registered_model.c.name == name))
        if not found:
            raise NotFound(f"Registered Model with name={name} not found")
        return found[0]

    async def load_models(self, names: Sequence[str]) -> list[RegisteredModel]:
        """Models in the order of ``names``; unknown ones are left out."""
        async with self._engine.connect() as connection:
            found = await load_models(connection, select(registered_model).where(registered_model.c.name.in_(names)))
        models = {model.name: model for model in found}
        return [models[name] for name in names if name in models]

    async def get_version(self, name: str, version: int) -> ModelVersion:
        """One version."""
        found = await self._numbers.find((name, version))
        if found is None:
            raise NotFound(f"Model Version (name={name}, version={version}) not found")
        return found

    async def get_by_alias(self, name: str, alias: str) -> ModelVersion:
        """The version an alias points at; ``latest`` is the highest version.

        Raises:
            InvalidInput: no such alias (MLflow answers 400 here).
            NotFound: no such model.
        """
        if alias.lower() == "latest":
            found = next(iter(versions_of(await self._rows(NEWEST, of=name))), None)
        else:
            found = await self._pointers.find((name, alias))
        if found is None:
            await self.get_model(name)
            raise InvalidInput(f"Registered model alias {alias} not found.")
        return found

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

    async def load_versions(self, numbers: Sequence[tuple[str, int]]) -> list[ModelVersion]:
        """Versions in the order of these names and numbers; unknown ones are left out."""
        names, versions = [name for name, _number in numbers], [number for _name, number in numbers]
        async with self._engine.connect() as connection:
            return await load_versions(connection, LISTED, {"names": names, "numbers": versions})

    async def select(self, query: Select[Any], *, row_by_row: bool = False) -> Sequence[Row[Any]]:
        """The rows of a search's query, planned for its very values.

        ``row_by_row``: joined tables are looked up for each row; the planner's guess at how many there are does not
        count.
        """
        async with self._transactions.connect() as connection:
            await connection.execute(_ROW_BY_ROW_SETTINGS if row_by_row else SEARCH_SETTINGS)
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
        return rows

    async def _read_numbers(self, keys: Sequence[tuple[str, int]]) -> dict[tuple[str, int], ModelVersion]:
        names, numbers = [name for name, _number in keys], [number for _name, number in keys]
        found = versions_of(await self._rows(BY_NUMBER, names=names, numbers=numbers))
        return {(version.name, version.version): version for version in found}

    async def _read_aliases(self, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], ModelVersion]:
        names, aliases = [name for name, _alias in keys], [alias for _name, alias in keys]
        rows = await self._rows(BY_ALIAS, names=names, pointing=aliases)
        found = zip(rows, versions_of(rows), strict=True)
        return {(version.name, row.wanted): version for row, version in found}

    async def _rows(self, statement: Fixed, **parameters: Any) -> Sequence[Any]:
        """Any: rows of whatever the statement selects, and values that it takes."""
        if self._reader is not None:
            return await self._reader.rows(statement, parameters)
        async with self._engine.connect() as connection:
            return (await connection.execute(statement.query, parameters)).all()
