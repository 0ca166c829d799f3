"""The rows of an import: which run has which id, and the runs themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.artifacts.model import served_path
from mlplat.db.tables import metric_outbox, run, run_import, run_param, run_tag
from mlplat.errors import InvalidInput
from mlplat.keys import check_key
from mlplat.tracking.model import RUN_NAME_TAG, RunStatus, cut_param, cut_tag


@dataclass(frozen=True)
class Assigned:
    """The id that a run of the source has here; ``complete`` when all of it has arrived."""

    source_id: str
    run_id: str
    complete: bool


@dataclass(frozen=True)
class ImportedRun:
    """A run under its id here. ``artifact_uri``: only for artifacts that the platform does not serve."""

    run_id: str
    name: str
    status: RunStatus
    user_id: str
    started_at: datetime
    ended_at: datetime | None
    deleted: bool
    artifact_uri: str | None
    params: Mapping[str, str]
    tags: Mapping[str, str]


async def assigned(connection: AsyncConnection, experiment_id: int, source_ids: Sequence[str]) -> dict[str, Assigned]:
    """The ids that were given out before, by the source's ids."""
    query = select(run_import.c.source_id, run_import.c.run_id, run_import.c.complete).where(
        run_import.c.experiment_id == experiment_id, run_import.c.source_id.in_(source_ids)
    )
    return {row.source_id: Assigned(*row) for row in await connection.execute(query)}


async def taken(connection: AsyncConnection, run_ids: Sequence[str]) -> set[str]:
    """Those of the ids that some run has, or another import was given, or whose points are still to be removed."""
    in_use = select(run.c.run_id).where(run.c.run_id.in_(run_ids))
    given_out = select(run_import.c.run_id).where(run_import.c.run_id.in_(run_ids))
    leaving = select(metric_outbox.c.run_id).where(metric_outbox.c.run_id.in_(run_ids))
    return set((await connection.execute(in_use.union(given_out, leaving))).scalars())


async def insert_ids(connection: AsyncConnection, experiment_id: int, ids: Mapping[str, str]) -> None:
    """Gives out ids, but for those that somebody else was given meanwhile."""
    if ids:
        rows = [{"experiment_id": experiment_id, "source_id": old, "run_id": new} for old, new in ids.items()]
        await connection.execute(upsert(run_import).on_conflict_do_nothing(), rows)


def check_run(each: ImportedRun) -> None:
    """Checks what comes from outside.

    Raises:
        InvalidInput: a malformed key, or artifacts that are somebody else's.
    """
    for kind, keys in (("param", each.params), ("tag", each.tags)):
        for key in keys:
            check_key(kind, key)
    if each.artifact_uri is not None and served_path(each.artifact_uri) is not None:
        raise InvalidInput(f"The run {each.run_id} cannot claim artifacts of the platform: {each.artifact_uri}")


async def put_rows(
    connection: AsyncConnection, experiment_id: int, runs: Sequence[ImportedRun], uris: Sequence[str]
) -> None:
    """Writes the runs with their params and tags; they count as deleted along with the experiment.

    Raises:
        InvalidInput: an id is somebody else's by now.
    """
    if not runs:
        return
    statement = upsert(run)
    changing = {name: statement.excluded[name] for name in ("name", "status", "ended_at", "deleted_with_experiment")}
    rows = [
        {
            "run_id": each.run_id, "experiment_id": experiment_id, "name": each.name, "status": each.status,
            "user_id": each.user_id, "artifact_uri": uri, "started_at": each.started_at, "ended_at": each.ended_at,
            "deleted": True, "deleted_with_experiment": not each.deleted, "importing": True,
        }
        for each, uri in zip(runs, uris, strict=True)
    ]  # fmt: skip
    await connection.execute(statement.on_conflict_do_update(index_elements=["run_id"], set_=changing), rows)
    mine = update(run).where(run.c.run_id.in_([each.run_id for each in runs]), run.c.experiment_id == experiment_id)
    if (await connection.execute(mine.values(deleted_at=func.clock_timestamp()))).rowcount != len(runs):
        raise InvalidInput("Somebody else created a run with an id of this import, or a run occurs twice.")
    params = [
        {"run_id": each.run_id, "key": key, "value": cut_param(value)}
        for each in runs
        for key, value in each.params.items()
    ]
    tags = [
        {"run_id": each.run_id, "key": key, "value": cut_tag(value)}
        for each in runs
        for key, value in (dict(each.tags) | {RUN_NAME_TAG: each.name}).items()
    ]
    for table, entries in ((run_param, params), (run_tag, tags)):
        if entries:
            put = upsert(table)
            put = put.on_conflict_do_update(index_elements=["run_id", "key"], set_={"value": put.excluded.value})
            await connection.execute(put, entries)
