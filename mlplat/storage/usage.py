"""Who has how much in the artifact store, as of the last collection."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import experiment, experiment_tag

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
class StorageUse:
    """All of it, the largest first. ``stored_bytes``: what blobs take up, shared and compressed."""

    measured_at: datetime
    experiments: list[ExperimentUse]
    teams: dict[str, int]
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
        sum(used["size"] for name, used in usage.items() if not (name.isascii() and name.isdecimal())),
        report["blobs"] - report["freed"],
        report["blob_bytes"] - report["freed_bytes"],
    )
