"""Who has how much in the artifact store, as of the last collection."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.manifest import size_of
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.tables import experiment, experiment_tag, model_version
from mlplat.errors import Corrupted, NotFound

#: Models that are told of, those with the most bytes.
MAX_MODELS = 1_000
#: Versions of one statement whose files are added up.
BATCH = 500
#: The tag of an experiment that names the team it belongs to.
TEAM_TAG = "team"


@dataclass(frozen=True)
class ExperimentUse:
    """Files of an experiment and their bytes, before anything is shared or compressed."""

    experiment_id: str
    name: str | None
    team: str | None
    files: int
    bytes: int


@dataclass(frozen=True)
class ModelUse:
    """Versions of a registered model, and the bytes of their files; those of equal versions count once.

    They lie with the experiments of their runs, and are in what these have.
    """

    name: str
    versions: int
    bytes: int


@dataclass(frozen=True)
class StorageUse:
    """All of it, the largest first. ``stored_bytes``: what blobs take up, shared and compressed."""

    measured_at: datetime
    experiments: list[ExperimentUse]
    teams: dict[str, int]
    models: list[ModelUse]
    other_bytes: int
    blobs: int
    stored_bytes: int


async def storage_use(engine: AsyncEngine, measured_at: datetime, report: dict[str, Any]) -> StorageUse:
    """What a collection's report says, with the names of experiments and teams. Any: JSON of the report."""
    query = select(experiment.c.experiment_id, experiment.c.name, experiment_tag.c.value).outerjoin(
        experiment_tag,
        and_(experiment_tag.c.experiment_id == experiment.c.experiment_id, experiment_tag.c.key == TEAM_TAG),
    )
    async with engine.connect() as connection:
        known = {str(row.experiment_id): (row.name, row.value) for row in await connection.execute(query)}
    usage: dict[str, dict[str, int]] = report["usage"]
    found = [
        ExperimentUse(name, *known.get(name, (None, None)), used["files"], used["size"])
        for name, used in usage.items()
        if name.isascii() and name.isdecimal()
    ]
    teams = Counter[str]()
    for each in found:
        if each.team is not None:
            teams[each.team] += each.bytes
    return StorageUse(
        measured_at,
        sorted(found, key=lambda each: each.bytes, reverse=True),
        dict(teams.most_common()),
        await _models(engine),
        sum(used["size"] for name, used in usage.items() if not (name.isascii() and name.isdecimal())),
        report["blobs"] - report["freed"],
        report["blob_bytes"] - report["freed_bytes"],
    )


async def measure_versions(engine: AsyncEngine, store: ArtifactStore) -> None:
    """Adds up the files of versions that were registered before that was noted. One whose manifest is gone has none."""
    unknown = select(model_version.c.manifest).where(
        model_version.c.manifest.is_not(None), model_version.c.size_bytes.is_(None)
    )
    while True:
        async with engine.connect() as connection:
            manifests = set((await connection.execute(unknown.limit(BATCH))).scalars())
        if not manifests:
            return
        for manifest in manifests:
            try:
                size = await asyncio.to_thread(size_of, store, manifest)
            except (NotFound, Corrupted):
                size = 0
            async with engine.begin() as connection:
                is_it = (model_version.c.manifest == manifest) & model_version.c.size_bytes.is_(None)
                await connection.execute(update(model_version).where(is_it).values(size_bytes=size))


async def _models(engine: AsyncEngine) -> list[ModelUse]:
    each = (
        select(
            model_version.c.name,
            func.count().label("versions"),
            func.coalesce(func.max(model_version.c.size_bytes), 0).label("size"),
        )
        .group_by(model_version.c.name, model_version.c.manifest)
        .subquery()
    )
    size = func.sum(each.c.size)
    query = (
        select(each.c.name, func.sum(each.c.versions), size)
        .group_by(each.c.name)
        .order_by(size.desc(), each.c.name)
        .limit(MAX_MODELS)
    )
    async with engine.connect() as connection:
        return [ModelUse(name, int(versions), int(size)) for name, versions, size in await connection.execute(query)]
