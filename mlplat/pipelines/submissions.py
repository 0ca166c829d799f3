"""The leader's writes: submissions, group-committed, and who drives which run. Each is fenced by the leader's lease."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import func, literal_column, select, text, update
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.group_commit import GroupCommit
from mlplat.db.lease import Lease, LeaseKeeper
from mlplat.db.snapshots import TRANSACTION_ID
from mlplat.db.tables import pipeline_run, pipeline_signal
from mlplat.errors import Fenced, InvalidInput
from mlplat.pipelines.model import PipelineRun, SignalKind, State
from mlplat.pipelines.store import IS_OPEN, run_of

MAX_PENDING = 2_000


@dataclass
class NewRun:
    """A validated submission on its way into the database."""

    run_id: str
    digest: str
    name: str
    spec: msgspec.Raw
    params: dict[str, Any]
    idempotency_key: str
    submitted_by: str
    source: str
    priority: int
    concurrency_key: str | None
    concurrency_limit: int | None
    resumed_from: str | None
    resumed_step: str | None
    executor: str | None
    #: Why it was not written, if it was not: set by the writer.
    problem: Exception | None = None
    #: The run that the idempotency key belongs to, if it is another one.
    known_as: str | None = None


class SubmissionStore:
    """Writes of the leading scheduler. Every method raises ``Fenced`` when another one leads."""

    def __init__(self, engine: AsyncEngine, lease: LeaseKeeper) -> None:
        self._engine = engine
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._lease = lease
        self._group: GroupCommit[NewRun] = GroupCommit(self._commit, max_group=200, max_pending=MAX_PENDING)

    async def add(self, run: NewRun) -> tuple[str, bool]:
        """Stores a submission; returns the run's id and whether it is new.

        The same idempotency key again gives the first run, so a caller that lost the answer may repeat.

        Raises:
            InvalidInput: the key was used for another pipeline or other parameters.
            Overloaded: too many submissions wait.
        """
        await self._group.submit(run)
        if run.problem is not None:
            raise run.problem
        return run.known_as or run.run_id, run.known_as is None

    async def is_known(self, idempotency_key: str) -> bool:
        """Whether a run was stored under this key."""
        query = select(pipeline_run.c.run_id).where(pipeline_run.c.idempotency_key == idempotency_key)
        async with self._engine.connect() as connection:
            return (await connection.execute(query)).first() is not None

    async def close(self) -> None:
        """Commits what is queued."""
        await self._group.close()

    async def _commit(self, group: Sequence[NewRun]) -> None:
        """Commits the group; if Postgres refuses its data, commits one by one, so that each answers for itself."""
        try:
            await self._commit_together(group)
        except (DataError, UnicodeError) as error:
            if len(group) == 1:
                group[0].problem = InvalidInput(f"the submission cannot be stored: {str(error).splitlines()[0]}")
                return
            for run in group:
                await self._commit([run])

    async def _commit_together(self, group: Sequence[NewRun]) -> None:
        held = self._lease.current
        definitions = {run.digest: {"digest": run.digest, "name": run.name, "spec": run.spec} for run in group}
        values = {
            "lease": held.name,
            "epoch": held.epoch,
            "definitions": msgspec.json.encode(list(definitions.values())).decode(),
            "items": msgspec.json.encode([_columns(run) for run in group]).decode(),
        }
        async with self._autocommit.connect() as connection:
            row = (await connection.execute(_ADD, values)).one()
            if not row.held:
                raise _over(held)
            added = set(row.added)
            repeated = [run for run in group if run.run_id not in added]
            if repeated:
                keys = [run.idempotency_key for run in repeated]
                found = await connection.execute(select(pipeline_run).where(pipeline_run.c.idempotency_key.in_(keys)))
                _answer_repeats(repeated, {row.idempotency_key: row for row in found})

    async def assign(self, placements: Mapping[str, str]) -> dict[str, int]:
        """Gives open runs to executors under new epochs, which fence their earlier owners.

        Returns the epochs; runs that are over are left out.
        """
        if not placements:
            return {}
        held = self._lease.current
        items = [{"run_id": run_id, "executor": executor} for run_id, executor in placements.items()]
        values = {"lease": held.name, "epoch": held.epoch, "items": msgspec.json.encode(items).decode()}
        async with self._autocommit.connect() as connection:
            row = (await connection.execute(_ASSIGN, values)).one()
        if not row.held:
            raise _over(held)
        return dict(row.epochs or {})

    async def end_waiting(self, run_id: str, state: State, error: str) -> bool:
        """Ends a run that no executor has had yet; False when one has, or it is over."""
        statement = (
            update(pipeline_run)
            .where(pipeline_run.c.run_id == run_id, pipeline_run.c.executor.is_(None), IS_OPEN)
            .values(
                state=state,
                error=error,
                finished_at=func.clock_timestamp(),
                seq=pipeline_run.c.seq + 1,
                ended_txid=literal_column(TRANSACTION_ID),
            )
            .returning(pipeline_run.c.run_id)
        )
        async with self._engine.begin() as connection:
            await self._lease.current.check(connection)
            return (await connection.execute(statement)).first() is not None

    async def find_open(self, *, assigned: bool) -> list[PipelineRun]:
        """Runs that are not over and have an executor, or have none; oldest first."""
        has_one = pipeline_run.c.executor.is_not(None) if assigned else pipeline_run.c.executor.is_(None)
        query = select(pipeline_run).where(IS_OPEN, has_one).order_by(pipeline_run.c.created_at)
        async with self._engine.connect() as connection:
            return [run_of(row) for row in await connection.execute(query)]

    async def find_waiting(self) -> list[str]:
        """Runs that are not over and have no executor."""
        query = select(pipeline_run.c.run_id).where(IS_OPEN, pipeline_run.c.executor.is_(None))
        async with self._engine.connect() as connection:
            return list((await connection.execute(query)).scalars())

    async def find_cancelled_waiting(self) -> list[tuple[str, str]]:
        """Runs without an executor that somebody has cancelled, and who."""
        query = (
            select(pipeline_run.c.run_id, pipeline_signal.c.by)
            .join(pipeline_signal, pipeline_signal.c.run_id == pipeline_run.c.run_id)
            .where(IS_OPEN, pipeline_run.c.executor.is_(None), pipeline_signal.c.kind == SignalKind.CANCEL)
        )
        async with self._engine.connect() as connection:
            return [(row.run_id, row.by) for row in await connection.execute(query)]


def _columns(run: NewRun) -> dict[str, object]:
    return {
        "run_id": run.run_id, "digest": run.digest, "name": run.name, "params": run.params,
        "idempotency_key": run.idempotency_key, "submitted_by": run.submitted_by, "source": run.source,
        "priority": run.priority, "concurrency_key": run.concurrency_key, "concurrency_limit": run.concurrency_limit,
        "resumed_from": run.resumed_from, "resumed_step": run.resumed_step, "executor": run.executor,
    }  # fmt: skip


def _answer_repeats(repeated: Sequence[NewRun], known: Mapping[str, Any]) -> None:
    for run in repeated:
        row = known[run.idempotency_key]
        run.known_as = row.run_id
        if row.digest != run.digest or not _are_same(row.params, run.params):
            run.problem = InvalidInput(
                f"idempotency key {run.idempotency_key!r} belongs to run {row.run_id}, which is a different submission"
            )


def _are_same(stored: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether parameters are equal; jsonb gives a large float back as the integer that it stands for in print."""
    if stored.keys() != given.keys():
        return False
    return all(
        value == stored[name]
        or (isinstance(value, float) and isinstance(stored[name], int) and value == float(stored[name]))
        for name, value in given.items()
    )


def _over(held: Lease) -> Fenced:
    return Fenced(f"lease {held.name!r}: epoch {held.epoch} is over")


_HELD = "held AS MATERIALIZED (SELECT epoch FROM lease WHERE name = :lease AND epoch = :epoch FOR SHARE)"

_ADD = text(f"""
    WITH {_HELD}, definitions AS (
        INSERT INTO pipeline (digest, name, spec)
        SELECT d.* FROM held, json_to_recordset(CAST(:definitions AS json)) AS d(digest text, name text, spec json)
        ON CONFLICT DO NOTHING
    ), added AS (
        INSERT INTO pipeline_run (run_id, digest, name, params, idempotency_key, submitted_by, source, priority,
            concurrency_key, concurrency_limit, resumed_from, resumed_step, executor, state, epoch)
        SELECT t.*, 'QUEUED', CASE WHEN t.executor IS NULL THEN 0 ELSE 1 END
        FROM held, json_to_recordset(CAST(:items AS json)) AS t(run_id text, digest text, name text, params jsonb,
            idempotency_key text, submitted_by text, source text, priority smallint, concurrency_key text,
            concurrency_limit int, resumed_from text, resumed_step text, executor text)
        ON CONFLICT (idempotency_key) DO NOTHING
        RETURNING run_id
    )
    SELECT (SELECT count(*) FROM held) AS held, ARRAY(SELECT run_id FROM added) AS added
""")  # noqa: S608 - built from the constant above

_ASSIGN = text(f"""
    WITH {_HELD}, given AS (
        UPDATE pipeline_run AS r SET executor = t.executor, epoch = r.epoch + 1
        FROM held, json_to_recordset(CAST(:items AS json)) AS t(run_id text, executor text)
        WHERE r.run_id = t.run_id AND r.state IN ('PENDING', 'QUEUED', 'RUNNING')
        RETURNING r.run_id, r.epoch
    )
    SELECT (SELECT count(*) FROM held) AS held, (SELECT json_object_agg(run_id, epoch) FROM given) AS epochs
""")  # noqa: S608 - built from the constant above
