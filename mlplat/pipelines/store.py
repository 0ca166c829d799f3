"""Pipelines and their runs in Postgres: what everybody may read, and what the scheduler writes."""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Row, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.lease import Lease
from mlplat.db.tables import attempt, pipeline, pipeline_run, step_run
from mlplat.errors import InvalidInput, NotFound
from mlplat.pipelines.model import (
    WHOLE_STEP,
    Attempt,
    AttemptState,
    PipelineRun,
    RunSnapshot,
    State,
    StepRun,
    Submission,
)
from mlplat.pipelines.spec import PipelineSpec

OPEN_STATES = (State.PENDING, State.QUEUED, State.RUNNING)
RUN_ID_BYTES = 6


class PipelineStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def add_run(
        self, held: Lease, spec: PipelineSpec, params: dict[str, Any], submission: Submission
    ) -> tuple[str, bool]:
        """Stores a validated submission; returns the run's id and whether it is new.

        The same idempotency key again gives the first run, so a caller that lost the answer may repeat.

        Raises:
            InvalidInput: the key was used for another pipeline or other parameters.
            Fenced: another scheduler leads.
        """
        run_id = secrets.token_hex(RUN_ID_BYTES)
        async with self._engine.begin() as connection:
            await held.check(connection)
            definition = insert(pipeline).values(digest=spec.digest, name=spec.name, spec=spec.to_json())
            await connection.execute(definition.on_conflict_do_nothing())
            added = insert(pipeline_run).values(
                run_id=run_id, digest=spec.digest, name=spec.name, params=params, state=State.QUEUED,
                idempotency_key=submission.idempotency_key, submitted_by=submission.submitted_by,
            )  # fmt: skip
            added = added.on_conflict_do_nothing(index_elements=["idempotency_key"])
            if (await connection.execute(added.returning(pipeline_run.c.run_id))).first() is None:
                return await self._known_run(connection, spec, params, submission.idempotency_key), False
            rows = [{"run_id": run_id, "step": step, "item": WHOLE_STEP, "state": State.PENDING} for step in spec.steps]
            await connection.execute(insert(step_run), rows)
        return run_id, True

    @staticmethod
    async def _known_run(connection: AsyncConnection, spec: PipelineSpec, params: dict[str, Any], key: str) -> str:
        query = select(pipeline_run).where(pipeline_run.c.idempotency_key == key)
        row = (await connection.execute(query)).one()
        if row.digest != spec.digest or row.params != params:
            raise InvalidInput(f"idempotency key {key!r} belongs to run {row.run_id}, which is a different submission")
        return str(row.run_id)

    async def assign(self, held: Lease, run_id: str, executor: str) -> int | None:
        """Gives an open run to an executor under a new epoch, which fences its earlier owner.

        Returns the epoch, or None when the run is over.

        Raises:
            Fenced: another scheduler leads.
        """
        statement = (
            update(pipeline_run)
            .where(pipeline_run.c.run_id == run_id, pipeline_run.c.state.in_(OPEN_STATES))
            .values(executor=executor, epoch=pipeline_run.c.epoch + 1)
            .returning(pipeline_run.c.epoch)
        )
        async with self._engine.begin() as connection:
            await held.check(connection)
            epoch: int | None = (await connection.execute(statement)).scalar()
        return epoch

    async def find_open(self) -> list[PipelineRun]:
        """Runs that are not over, oldest first."""
        query = (
            select(pipeline_run)
            .where(pipeline_run.c.state.in_([literal(state.value, literal_execute=True) for state in OPEN_STATES]))
            .order_by(pipeline_run.c.created_at)
        )
        async with self._engine.connect() as connection:
            return [_run(row) for row in await connection.execute(query)]

    async def find_runs(self, limit: int, offset: int = 0) -> list[PipelineRun]:
        """Runs, newest first."""
        query = (
            select(pipeline_run)
            .order_by(pipeline_run.c.created_at.desc(), pipeline_run.c.run_id)
            .limit(limit)
            .offset(offset)
        )
        async with self._engine.connect() as connection:
            return [_run(row) for row in await connection.execute(query)]

    async def count_by_state(self) -> dict[str, int]:
        """Number of runs in each state."""
        query = select(pipeline_run.c.state, func.count()).group_by(pipeline_run.c.state)
        async with self._engine.connect() as connection:
            return {row[0]: row[1] for row in await connection.execute(query)}

    async def get_snapshot(self, run_id: str) -> RunSnapshot:
        """The run with definition, steps and attempts, from one moment.

        Raises:
            NotFound: no such run.
        """
        query = (
            select(pipeline_run, pipeline.c.spec)
            .join(pipeline, pipeline.c.digest == pipeline_run.c.digest)
            .where(pipeline_run.c.run_id == run_id)
        )
        async with self._engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="REPEATABLE READ")
            row = (await connection.execute(query)).first()
            if row is None:
                raise NotFound(f"No pipeline run with id={run_id} exists")
            steps = await connection.execute(
                select(step_run).where(step_run.c.run_id == run_id).order_by(step_run.c.step, step_run.c.item)
            )
            attempts = await connection.execute(
                select(attempt).where(attempt.c.run_id == run_id).order_by(attempt.c.started_at)
            )
            return RunSnapshot(
                _run(row), row.spec, [_step_run(step) for step in steps], [_attempt(entry) for entry in attempts]
            )


def _run(row: Row[Any]) -> PipelineRun:
    return PipelineRun(
        row.run_id, row.name, row.digest, row.params, State(row.state), row.error, row.executor, row.epoch,
        row.submitted_by, row.created_at, row.started_at, row.finished_at,
    )  # fmt: skip


def _step_run(row: Row[Any]) -> StepRun:
    return StepRun(
        row.step, row.item, State(row.state), row.items, row.attempt, row.failures, row.output, row.error,
        row.retry_at, row.started_at, row.finished_at,
    )  # fmt: skip


def _attempt(row: Row[Any]) -> Attempt:
    return Attempt(row.step, row.item, row.attempt, AttemptState(row.state), row.started_at, row.finished_at, row.error)
