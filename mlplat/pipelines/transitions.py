"""The executor's writes: transitions of many runs, group-committed, each fenced by its run's epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.group_commit import GroupCommit
from mlplat.db.tables import attempt, pipeline_run, step_run
from mlplat.errors import Fenced, Unavailable
from mlplat.pipelines.model import Attempt, State, StepRun

#: How long a commit is retried while Postgres is away. Attempts go on running meanwhile.
COMMIT_PATIENCE_S = 120


@dataclass
class RunChange:
    """The run's own new state."""

    state: State
    error: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass
class Transition:
    """What changes together in one run. Rows are written whole, so writing them again is harmless."""

    run_id: str
    epoch: int
    step_runs: list[StepRun] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    run: RunChange | None = None
    #: Why it was not written, if it was not: set by the writer.
    problem: Exception | None = None

    @property
    def is_empty(self) -> bool:
        """True when there is nothing to write."""
        return not self.step_runs and not self.attempts and self.run is None


class TransitionWriter:
    """One writer connection of one executor."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._group: GroupCommit[Transition] = GroupCommit(self._commit, max_group=500, max_pending=100_000)

    async def write(self, transition: Transition) -> None:
        """Returns when the transition is durable.

        Raises:
            Fenced: the run has another owner by now; nothing was written.
            Unavailable: Postgres stayed away for longer than ``COMMIT_PATIENCE_S``.
        """
        await self._group.submit(transition)
        if transition.problem is not None:
            raise transition.problem

    async def close(self) -> None:
        """Commits what is queued."""
        await self._group.close()

    async def _commit(self, group: Sequence[Transition]) -> None:
        """Commits the group; if it is refused, commits its items one by one, so that each answers for itself."""
        try:
            await self._commit_together(group)
        except Unavailable:
            raise
        except Exception as error:  # data that Postgres does not take, for instance
            if len(group) == 1:
                group[0].problem = error
                return
            for item in group:
                await self._commit([item])

    async def _commit_together(self, group: Sequence[Transition]) -> None:
        retries = AsyncRetrying(
            retry=retry_if_exception_type(CONNECTION_ERRORS),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            stop=stop_after_delay(COMMIT_PATIENCE_S),
            reraise=True,
        )
        try:
            async for attempt_ in retries:
                with attempt_:
                    async with self._engine.begin() as connection:
                        await _write_group(connection, group)
        except CONNECTION_ERRORS as error:
            raise Unavailable("Postgres is away") from error


async def _write_group(connection: AsyncConnection, group: Sequence[Transition]) -> None:
    owned = await _owned(connection, {(item.run_id, item.epoch) for item in group})
    for item in group:
        is_owned = (item.run_id, item.epoch) in owned
        item.problem = None if is_owned else Fenced(f"run {item.run_id}: epoch {item.epoch} is over")
    valid = [item for item in group if item.problem is None]
    # A later row of the same node replaces an earlier one of the group.
    steps = {(item.run_id, row.node): _step_values(item.run_id, row) for item in valid for row in item.step_runs}
    attempts = {
        (item.run_id, row.step, row.item, row.attempt): _attempt_values(item.run_id, row)
        for item in valid
        for row in item.attempts
    }
    if steps:
        await _upsert(connection, step_run, list(steps.values()), ("run_id", "step", "item"))
    if attempts:
        await _upsert(connection, attempt, list(attempts.values()), ("run_id", "step", "item", "attempt"))
    for item in valid:
        if item.run is not None:
            await _write_run(connection, item.run_id, item.run)


async def _owned(connection: AsyncConnection, claims: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """The claims that still hold, pinned for the rest of the transaction."""
    query = (
        select(pipeline_run.c.run_id, pipeline_run.c.epoch)
        .where(tuple_(pipeline_run.c.run_id, pipeline_run.c.epoch).in_(sorted(claims)))
        .order_by(pipeline_run.c.run_id)
        .with_for_update(read=True)
    )
    return {(row.run_id, row.epoch) for row in await connection.execute(query)}


async def _upsert(connection: AsyncConnection, table: Any, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    statement = insert(table)
    changed = {name: statement.excluded[name] for name in rows[0] if name not in key}
    await connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=changed), rows)


async def _write_run(connection: AsyncConnection, run_id: str, change: RunChange) -> None:
    values: dict[str, object] = {"state": change.state, "error": change.error}
    if change.started_at is not None:
        values["started_at"] = change.started_at
    if change.finished_at is not None:
        values["finished_at"] = change.finished_at
    await connection.execute(update(pipeline_run).where(pipeline_run.c.run_id == run_id).values(**values))


def _step_values(run_id: str, row: StepRun) -> dict[str, Any]:
    return {
        "run_id": run_id, "step": row.step, "item": row.item, "state": row.state, "items": row.items,
        "attempt": row.attempt, "failures": row.failures, "output": row.output, "error": row.error,
        "retry_at": row.retry_at, "started_at": row.started_at, "finished_at": row.finished_at,
    }  # fmt: skip


def _attempt_values(run_id: str, row: Attempt) -> dict[str, Any]:
    return {
        "run_id": run_id, "step": row.step, "item": row.item, "attempt": row.attempt, "state": row.state,
        "error": row.error, "started_at": row.started_at, "finished_at": row.finished_at,
    }  # fmt: skip
