"""Runs, params and tags in Postgres.

Contract: params are written once (the same value again is fine). A run's name and its
``mlflow.runName`` tag are one fact in two places and move together. Deleted runs stay readable by id
and refuse writes. One call is one transaction: all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import experiment, run, run_param, run_tag
from mlplat.errors import InvalidInput, NotFound
from mlplat.keys import check_key
from mlplat.tracking.filters import Order
from mlplat.tracking.model import (
    ATTEMPT_TAG,
    REAPED_TAG,
    RUN_NAME_TAG,
    Run,
    RunStatus,
    RunUpdate,
    cut_tag,
    random_run_name,
)


@dataclass(frozen=True)
class RunRef:
    """What a write needs to know of its run."""

    run_id: str
    experiment_id: int


class RunStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(
        self,
        run_id: str,
        experiment_id: int,
        name: str | None,
        user_id: str,
        started_at: datetime,
        tags: Mapping[str, str],
        *,
        beating: bool = False,
    ) -> Run:
        """A new running run; creating it again under the same id gives the run that is there.

        A ``beating`` run counts as dead when its heartbeats stop, see ``HeartbeatStore``.

        Raises:
            NotFound: no such experiment.
            InvalidInput: it is deleted, a tag is malformed, or name and name tag differ.
        """
        for key in tags:
            check_key("tag", key)
        tagged = tags.get(RUN_NAME_TAG)
        if name and tagged and name != tagged:
            raise InvalidInput(
                f"Both 'run_name' argument and 'mlflow.runName' tag are specified, but with different values "
                f"(run_name='{name}', mlflow.runName='{tagged}')."
            )
        name = name or tagged or random_run_name()
        tags = dict(tags) | {RUN_NAME_TAG: name}
        async with self._engine.begin() as connection:
            query = select(experiment.c.artifact_location, experiment.c.deleted).where(
                experiment.c.experiment_id == experiment_id
            )
            parent = (await connection.execute(query.with_for_update(read=True))).first()
            if parent is None:
                raise NotFound(f"No Experiment with id={experiment_id} exists")
            if parent.deleted:
                raise InvalidInput(
                    f"The experiment {experiment_id} must be in the 'active' state. Current state is deleted."
                )
            artifact_uri = f"{parent.artifact_location}/{run_id}/artifacts"
            new = Run(run_id, experiment_id, name, RunStatus.RUNNING, user_id, artifact_uri, False, started_at, None,
                      {}, tags)  # fmt: skip
            row = upsert(run).values(
                run_id=run_id, experiment_id=experiment_id, name=name, status=new.status, user_id=user_id,
                artifact_uri=artifact_uri, started_at=started_at,
                heartbeat_at=func.clock_timestamp() if beating else None,
            )  # fmt: skip
            added = row.on_conflict_do_nothing().returning(run.c.run_id)
            if (await connection.execute(added)).first() is None:
                return (await load_runs(connection, [run_id]))[0]
            await _put_tags(connection, run_id, tags)
        return new

    async def get(self, run_id: str) -> Run:
        """The run, deleted or not."""
        async with self._engine.connect() as connection:
            found = await load_runs(connection, [run_id])
        if not found:
            raise NotFound(f"Run with id={run_id} not found")
        return found[0]

    async def require_active(self, run_id: str) -> RunRef:
        """The run, if it may be written to.

        Raises:
            NotFound: no such run.
            InvalidInput: it is deleted.
        """
        async with self._engine.connect() as connection:
            return await _require_active(connection, run_id, for_write=False)

    async def update(
        self,
        run_id: str,
        status: RunStatus | None,
        ended_at: datetime | None,
        name: str | None,
        *,
        resumed_at: datetime | None = None,
    ) -> Run:
        """Changes what is not None. A run that runs again has no end.

        With ``resumed_at``, a run that has ended since then stays as it is: the news came late.
        """
        values: dict[str, object] = {}
        if status is not None:
            values["status"] = status
        if status is RunStatus.RUNNING:
            values["ended_at"] = None
        if ended_at is not None:
            values["ended_at"] = ended_at
        if name:
            values["name"] = name
        async with self._engine.begin() as connection:
            await _require_active(connection, run_id)
            if values:
                change = update(run).where(run.c.run_id == run_id).values(**values)
                if resumed_at is not None:
                    change = change.where(run.c.ended_at.is_(None) | (run.c.ended_at < resumed_at))
                await connection.execute(change)
            if status is not None:
                await connection.execute(delete(run_tag).where(run_tag.c.run_id == run_id, run_tag.c.key == REAPED_TAG))
            if name:
                await _put_tags(connection, run_id, {RUN_NAME_TAG: name})
            return (await load_runs(connection, [run_id]))[0]

    async def set_deleted(self, run_id: str, deleted: bool) -> None:
        """Deletes or restores a run; repeating it is fine."""
        async with self._engine.begin() as connection:
            result = await connection.execute(update(run).where(run.c.run_id == run_id).values(deleted=deleted))
        if not result.rowcount:
            raise NotFound(f"Run with id={run_id} not found")

    async def log(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> RunRef:
        """Writes params and tags in one transaction; see ``write_update``."""
        async with self._engine.begin() as connection:
            return await write_update(connection, RunUpdate(run_id, dict(params), dict(tags)))

    async def delete_tag(self, run_id: str, key: str) -> None:
        """Removes one tag.

        Raises:
            NotFound: no such run or tag.
        """
        async with self._engine.begin() as connection:
            await _require_active(connection, run_id)
            statement = delete(run_tag).where(run_tag.c.run_id == run_id, run_tag.c.key == key)
            if not (await connection.execute(statement)).rowcount:
                raise NotFound(f"No tag with name: {key} in run with id {run_id}")

    async def search(self, where: ColumnElement[bool], order: Order, limit: int, offset: int) -> list[Run]:
        """Runs that satisfy ``where``, in ``order``, then newest first."""
        source: FromClause = run
        for table, condition in order.joins:
            source = source.outerjoin(table, condition)
        query = (
            select(run.c.run_id)
            .select_from(source)
            .where(where)
            .order_by(*order.terms, run.c.started_at.desc(), run.c.run_id)
            .limit(limit)
            .offset(offset)
        )
        async with self._engine.connect() as connection:
            run_ids = list((await connection.execute(query)).scalars())
            return await load_runs(connection, run_ids)

    async def kill_of_attempt(self, attempt: str) -> int:
        """Marks the runs that a dead attempt left RUNNING as KILLED and returns how many there were."""
        started_by = select(run_tag.c.run_id).where(
            run_tag.c.key == ATTEMPT_TAG, func.left(run_tag.c.value, 256) == attempt
        )
        statement = (
            update(run)
            .where(run.c.run_id.in_(started_by), run.c.status == RunStatus.RUNNING)
            .values(status=RunStatus.KILLED, ended_at=func.clock_timestamp())
        )
        async with self._engine.begin() as connection:
            return (await connection.execute(statement)).rowcount


async def write_update(connection: AsyncConnection, new: RunUpdate) -> RunRef:
    """Writes params and tags inside of a transaction.

    Raises:
        InvalidInput: a param has another value already, or the run is deleted.
        NotFound: no such run.
    """
    ref = await _require_active(connection, new.run_id)
    await _put_params(connection, new.run_id, new.params)
    await _put_tags(connection, new.run_id, new.tags)
    if RUN_NAME_TAG in new.tags:
        name = new.tags[RUN_NAME_TAG]
        await connection.execute(update(run).where(run.c.run_id == new.run_id).values(name=name))
    return ref


async def load_runs(connection: AsyncConnection, run_ids: Sequence[str]) -> list[Run]:
    """The runs with params and tags, in the order of ``run_ids``; unknown ids are left out."""
    if not run_ids:
        return []
    rows = (await connection.execute(select(run).where(run.c.run_id.in_(run_ids)))).all()
    params: dict[str, dict[str, str]] = {}
    tags: dict[str, dict[str, str]] = {}
    for table, into in ((run_param, params), (run_tag, tags)):
        query = select(table).where(table.c.run_id.in_(run_ids)).order_by(table.c.key)
        for entry in (await connection.execute(query)).all():
            into.setdefault(entry.run_id, {})[entry.key] = entry.value
    by_id = {row.run_id: _run(row, params.get(row.run_id, {}), tags.get(row.run_id, {})) for row in rows}
    return [by_id[run_id] for run_id in run_ids if run_id in by_id]


async def _require_active(connection: AsyncConnection, run_id: str, *, for_write: bool = True) -> RunRef:
    query = select(run.c.experiment_id, run.c.deleted).where(run.c.run_id == run_id)
    # Writers of one run take turns, the run's row first: in any other order they could wait for one another.
    row = (await connection.execute(query.with_for_update() if for_write else query)).first()
    if row is None:
        raise NotFound(f"Run with id={run_id} not found")
    if row.deleted:
        raise InvalidInput(f"The run {run_id} must be in the 'active' state. Current state is deleted.")
    return RunRef(run_id, row.experiment_id)


async def _put_params(connection: AsyncConnection, run_id: str, params: Mapping[str, str]) -> None:
    if not params:
        return
    rows = [{"run_id": run_id, "key": key, "value": value} for key, value in params.items()]
    await connection.execute(upsert(run_param).values(rows).on_conflict_do_nothing())
    query = select(run_param).where(run_param.c.run_id == run_id, run_param.c.key.in_(params))
    for row in (await connection.execute(query)).all():
        if row.value != params[row.key]:
            raise InvalidInput(
                f"Changing param values is not allowed. Param with key='{row.key}' was already logged with "
                f"value='{row.value}' for run ID='{run_id}'. Attempted logging new value '{params[row.key]}'."
            )


async def _put_tags(connection: AsyncConnection, run_id: str, tags: Mapping[str, str]) -> None:
    if not tags:
        return
    rows = [{"run_id": run_id, "key": key, "value": cut_tag(value)} for key, value in tags.items()]
    statement = upsert(run_tag).values(rows)
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["run_id", "key"], set_={"value": statement.excluded.value})
    )


def _run(row: Row[Any], params: dict[str, str], tags: dict[str, str]) -> Run:
    return Run(
        row.run_id, row.experiment_id, row.name, RunStatus(row.status), row.user_id, row.artifact_uri, row.deleted,
        row.started_at, row.ended_at, params, tags,
    )  # fmt: skip
