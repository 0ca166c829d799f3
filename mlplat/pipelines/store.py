"""Pipelines and their runs in Postgres: what everybody may read, and what people may say to a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Row, Text, column, func, insert, literal, select, tuple_, values
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import attempt, pipeline, pipeline_run, pipeline_signal, step_cache, step_run
from mlplat.errors import InvalidInput, NotFound, PermissionDenied
from mlplat.pipelines.model import (
    WHOLE_STEP,
    Attempt,
    AttemptState,
    PipelineRun,
    RunSnapshot,
    Signal,
    SignalKind,
    State,
    StepRun,
)
from mlplat.pipelines.spec import PipelineSpec

OPEN_STATES = (State.PENDING, State.QUEUED, State.RUNNING)
#: Written out, so that Postgres uses the partial index.
IS_OPEN = pipeline_run.c.state.in_([literal(state.value, literal_execute=True) for state in OPEN_STATES])
_OPEN_ATTEMPT = attempt.c.state.in_([state.value for state in AttemptState if not state.is_final])
#: How an attempt that is over is found again: its row never changes any more, and later ends have greater numbers.
EndedKey = tuple[int, str, int, int]


class PipelineStore:
    """All methods are safe to call concurrently. The executors' writes are in ``transitions``, the leader's in
    ``submissions``."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def find_runs(
        self,
        limit: int,
        offset: int = 0,
        *,
        name: str | None = None,
        state: State | None = None,
        submitted_by: str | None = None,
        source: str | None = None,
    ) -> list[PipelineRun]:
        """Runs, newest first; each given value must be met."""
        wanted = {"name": name, "state": state, "submitted_by": submitted_by, "source": source}
        query = (
            select(pipeline_run)
            .where(*(pipeline_run.c[column] == value for column, value in wanted.items() if value is not None))
            .order_by(pipeline_run.c.created_at.desc(), pipeline_run.c.run_id)
            .limit(limit)
            .offset(offset)
        )
        async with self._engine.connect() as connection:
            return [run_of(row) for row in await connection.execute(query)]

    async def count_by_state(self) -> dict[str, int]:
        """Number of runs in each state."""
        query = select(pipeline_run.c.state, func.count()).group_by(pipeline_run.c.state)
        async with self._engine.connect() as connection:
            return {row[0]: row[1] for row in await connection.execute(query)}

    async def get_run(self, run_id: str) -> PipelineRun:
        """The run without its steps.

        Raises:
            NotFound: no such run.
        """
        async with self._engine.connect() as connection:
            row = (await connection.execute(select(pipeline_run).where(pipeline_run.c.run_id == run_id))).first()
        if row is None:
            raise NotFound(f"No pipeline run with id={run_id} exists")
        return run_of(row)

    async def find_states(self, run_ids: Sequence[str]) -> dict[str, PipelineRun]:
        """The runs of that many ids, without their steps; unknown ids are left out."""
        query = select(pipeline_run).where(pipeline_run.c.run_id.in_(run_ids))
        async with self._engine.connect() as connection:
            return {row.run_id: run_of(row) for row in await connection.execute(query)}

    async def get_snapshot(self, run_id: str) -> RunSnapshot:
        """The run with definition, steps, attempts and signals, from one moment. Every step has a row.

        Raises:
            NotFound: no such run.
        """
        return await self.get_changes(run_id, -1)

    async def get_changes(self, run_id: str, after: int) -> RunSnapshot:
        """The run with those of its steps and attempts that changed after transition number ``after``.

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
            return await _with_rows(connection, row, after)

    async def get_definition(self, run_id: str) -> dict[str, Any]:
        """The definition that the run was made from.

        Raises:
            NotFound: no such run.
        """
        query = select(pipeline.c.spec).join(pipeline_run, pipeline_run.c.digest == pipeline.c.digest)
        async with self._engine.connect() as connection:
            row = (await connection.execute(query.where(pipeline_run.c.run_id == run_id))).first()
        if row is None:
            raise NotFound(f"No pipeline run with id={run_id} exists")
        spec: dict[str, Any] = row.spec
        return spec

    async def find_seqs(self, run_ids: Sequence[str]) -> dict[str, int]:
        """The number of each run's last transition; unknown ids are left out."""
        query = select(pipeline_run.c.run_id, pipeline_run.c.seq).where(pipeline_run.c.run_id.in_(run_ids))
        async with self._engine.connect() as connection:
            return {row.run_id: row.seq for row in await connection.execute(query)}

    async def find_changes(self, after: Mapping[str, int]) -> dict[str, RunSnapshot]:
        """``get_changes`` of many runs together, without their definitions; unknown ids are left out.

        Args:
            after: for each run the number of the last transition that is known already.
        """
        wanted = values(column("run_id", Text), column("after", BigInteger), name="wanted").data(list(after.items()))
        steps = select(step_run).join(wanted, wanted.c.run_id == step_run.c.run_id)
        tries = select(attempt).join(wanted, wanted.c.run_id == attempt.c.run_id)
        runs = select(pipeline_run).where(pipeline_run.c.run_id.in_(list(after)))
        told = select(pipeline_signal).where(pipeline_signal.c.run_id.in_(list(after)))
        async with self._engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="REPEATABLE READ")
            found = {row.run_id: RunSnapshot(run_of(row), {}) for row in await connection.execute(runs)}
            for row in await connection.execute(steps.where(step_run.c.seq > wanted.c.after)):
                found[row.run_id].step_runs.append(_step_run(row))
            for row in await connection.execute(tries.where(attempt.c.seq > wanted.c.after)):
                found[row.run_id].attempts.append(_attempt(row))
            for row in await connection.execute(told.order_by(pipeline_signal.c.signal_id)):
                found[row.run_id].signals.append(_signal(row))
        return found

    async def find_attempts(
        self,
        run_id: str,
        limit: int,
        *,
        step: str | None = None,
        item: int | None = None,
        number: int | None = None,
        after: EndedKey | None = None,
        only_open: bool = False,
    ) -> tuple[PipelineRun, list[Attempt], list[Attempt]]:
        """The run with attempts of it that are over, in the order of their ends, and some that are not, in the order
        of their beginnings; all from one moment. Attempts that are runs of their own are left out.

        Args:
            run_id: the run.
            limit: of either list.
            step: only this step's.
            item: only this item's; ``WHOLE_STEP`` for steps without items.
            number: only the attempt with this number.
            after: only what ended after this one.
            only_open: leaves out those that are over.

        Raises:
            NotFound: no such run.
        """
        wanted = {"run_id": run_id, "step": step, "item": item, "attempt": number}
        query = select(attempt).where(
            attempt.c.child_id.is_(None),
            *(attempt.c[name] == value for name, value in wanted.items() if value is not None),
        )
        key = (attempt.c.seq, attempt.c.step, attempt.c.item, attempt.c.attempt)
        ended = query.where(~_OPEN_ATTEMPT).order_by(*key).limit(limit)
        if after is not None:
            ended = ended.where(tuple_(*key) > tuple_(*(literal(part) for part in after)))
        begun = query.where(_OPEN_ATTEMPT).order_by(attempt.c.queued_at, *key[1:]).limit(limit)
        async with self._engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="REPEATABLE READ")
            row = (await connection.execute(select(pipeline_run).where(pipeline_run.c.run_id == run_id))).first()
            if row is None:
                raise NotFound(f"No pipeline run with id={run_id} exists")
            over = [] if only_open else [_attempt(one) for one in await connection.execute(ended)]
            return run_of(row), over, [_attempt(one) for one in await connection.execute(begun)]

    async def find_signals(self, executor: str) -> list[Signal]:
        """What people told the open runs of an executor."""
        query = (
            select(pipeline_signal)
            .join(pipeline_run, pipeline_run.c.run_id == pipeline_signal.c.run_id)
            .where(IS_OPEN, pipeline_run.c.executor == executor)
            .order_by(pipeline_signal.c.signal_id)
        )
        async with self._engine.connect() as connection:
            return [_signal(row) for row in await connection.execute(query)]

    async def cancel(self, run_id: str, by: str, comment: str = "") -> PipelineRun:
        """Asks for the run's end and returns the run. A run that is over stays as it is.

        Raises:
            NotFound: no such run.
        """
        run = await self.get_run(run_id)
        if not run.state.is_final:
            await self._add_signal(run_id, SignalKind.CANCEL, "", by, comment)
        return run

    async def decide(self, run_id: str, step: str, *, approve: bool, by: str, comment: str = "") -> PipelineRun:
        """Approves or rejects what a run waits for.

        Raises:
            NotFound: no such run, or no such step.
            InvalidInput: the step is no approval, or does not wait for one now.
            PermissionDenied: ``by`` is none of those who may decide.
        """
        snapshot = await self.get_snapshot(run_id)
        definition = PipelineSpec.model_validate(snapshot.spec).all_steps.get(step)
        if definition is None:
            raise NotFound(f"pipeline run {run_id} has no step {step!r}")
        if definition.approval is None:
            raise InvalidInput(f"step {step!r} is no approval")
        state = next(row.state for row in snapshot.step_runs if row.node == (step, WHOLE_STEP))
        if state is not State.QUEUED:
            raise InvalidInput(f"step {step!r} is {state}; only a QUEUED approval can be decided")
        allowed = definition.approval.approvers
        if allowed and by not in allowed:
            raise PermissionDenied(f"{by!r} may not decide on {step!r}; {', '.join(allowed)} may")
        if definition.approval.not_submitter and by == snapshot.run.submitted_by:
            raise PermissionDenied(f"{by!r} submitted the run, and somebody else must decide on {step!r}")
        await self._add_signal(run_id, SignalKind.APPROVE if approve else SignalKind.REJECT, step, by, comment)
        return snapshot.run

    async def find_cached(self, key: str, ttl_s: float | None) -> tuple[dict[str, Any], str] | None:
        """The output under a key, with the run that made it; None when there is none, or it is older than ``ttl_s``."""
        query = select(
            step_cache.c.output, step_cache.c.run_id,
            func.extract("epoch", func.clock_timestamp() - step_cache.c.created_at).label("age_s"),
        ).where(step_cache.c.key == key)  # fmt: skip
        async with self._engine.connect() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None or (ttl_s is not None and row.age_s > ttl_s) else (row.output, row.run_id)

    async def _add_signal(self, run_id: str, kind: SignalKind, step: str, by: str, comment: str) -> None:
        values = {"run_id": run_id, "kind": kind, "step": step, "by": by, "comment": comment}
        async with self._engine.begin() as connection:
            await connection.execute(insert(pipeline_signal).values(**values))


async def _with_rows(connection: AsyncConnection, row: Row[Any], after: int) -> RunSnapshot:
    run_id = row.run_id
    steps = await connection.execute(
        select(step_run)
        .where(step_run.c.run_id == run_id, step_run.c.seq > after)
        .order_by(step_run.c.step, step_run.c.item)
    )
    attempts = await connection.execute(
        select(attempt)
        .where(attempt.c.run_id == run_id, attempt.c.seq > after)
        .order_by(attempt.c.queued_at, attempt.c.step, attempt.c.item, attempt.c.attempt)
    )
    signals = await connection.execute(
        select(pipeline_signal).where(pipeline_signal.c.run_id == run_id).order_by(pipeline_signal.c.signal_id)
    )
    step_runs = [_step_run(step) for step in steps]
    if after < 0:
        known = {entry.node for entry in step_runs}
        names = [*row.spec["steps"], *row.spec.get("finally", {})]
        step_runs += [StepRun(name, WHOLE_STEP, State.PENDING) for name in names if (name, WHOLE_STEP) not in known]
    return RunSnapshot(
        run_of(row), row.spec, step_runs, [_attempt(entry) for entry in attempts], [_signal(entry) for entry in signals]
    )


def run_of(row: Row[Any]) -> PipelineRun:
    """A row of ``pipeline_run`` as a run."""
    return PipelineRun(
        row.run_id, row.name, row.digest, row.params, State(row.state), row.error, row.executor, row.epoch,
        row.submitted_by, row.created_at, row.started_at, row.finished_at, row.priority, row.concurrency_key,
        row.concurrency_limit, row.source, row.resumed_from, row.resumed_step, row.output,
        None if row.stopping is None else State(row.stopping), row.seq,
    )  # fmt: skip


def _step_run(row: Row[Any]) -> StepRun:
    return StepRun(
        row.step, row.item, State(row.state), row.items, row.attempt, row.failures, row.output, row.error,
        row.retry_at, row.queued_at, row.started_at, row.finished_at, row.reused_from, row.seq,
    )  # fmt: skip


def _attempt(row: Row[Any]) -> Attempt:
    return Attempt(
        row.step, row.item, row.attempt, AttemptState(row.state), row.queued_at, row.started_at, row.finished_at,
        row.error, row.node, row.progress, row.child_id, row.seq,
    )  # fmt: skip


def _signal(row: Row[Any]) -> Signal:
    return Signal(row.signal_id, row.run_id, SignalKind(row.kind), row.step, row.by, row.comment, row.created_at)
