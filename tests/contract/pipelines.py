"""Pipeline runs for tests: submitted, given to an executor, and written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.machine import Changes
from mlplat.pipelines.model import (
    WHOLE_STEP,
    Attempt,
    AttemptState,
    ChildRequest,
    PipelineRun,
    RunSnapshot,
    State,
    StepRun,
)
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.submissions import NewRun, SubmissionStore
from mlplat.pipelines.transitions import CachedOutput, Transition, TransitionWriter
from tests.contract.chdb import unique

NOW = datetime(2025, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
TTL_S = 600.0


def spec_of(name: str = "demo", **changes: Any) -> PipelineSpec:
    """A pipeline of two steps."""
    steps = {"train": {"uses": "os:getcwd"}, "check": {"uses": "os:getcwd", "needs": ["train"]}}
    return build_spec({"name": name, "steps": steps} | changes)


def new_run(key: str, spec: PipelineSpec | None = None, params: dict[str, Any] | None = None, **fields: Any) -> NewRun:
    """A submission that is checked."""
    spec = spec or spec_of()
    values: dict[str, Any] = {
        "run_id": unique("run"), "submitted_by": "", "source": "", "priority": 0, "concurrency_key": None,
        "concurrency_limit": None, "resumed_from": None, "resumed_step": None, "executor": None,
    }  # fmt: skip
    raw = msgspec.Raw(msgspec.json.encode(spec.to_json()))
    return NewRun(
        digest=spec.digest, name=spec.name, spec=raw, params=params or {}, idempotency_key=key, **(values | fields)
    )


def transition(
    run_id: str,
    epoch: int,
    step_runs: Sequence[StepRun] = (),
    attempts: Sequence[Attempt] = (),
    run: PipelineRun | None = None,
    *,
    seq: int = 1,
    children: Sequence[ChildRequest] = (),
    cache: Sequence[CachedOutput] = (),
) -> Transition:
    """What an executor writes."""
    for row in step_runs:
        row.seq = seq
    for entry in attempts:
        entry.seq = seq
    return Transition.of(run_id, epoch, Changes(seq, list(step_runs), list(attempts), run), children, cache)


def change(run_id: str, state: State, **fields: Any) -> PipelineRun:
    """The run's own part of a transition."""
    return PipelineRun(run_id, "demo", "", {}, state, **fields)


def full(run_id: str, epoch: int, seq: int = 1) -> Transition:
    """A transition with something of everything."""
    return transition(
        run_id,
        epoch,
        [
            StepRun("train", WHOLE_STEP, State.RUNNING, items=2, started_at=NOW, queued_at=NOW),
            StepRun("train", 0, State.SUCCEEDED, None, 2, 1, {"kind": "json", "value": [1, None, "ü"]}, None, None,
                    NOW, NOW, NOW + timedelta(seconds=1), "run0"),
            StepRun("train", 1, State.PENDING, None, 1, 1, None, "boom\ntraceback", NOW + timedelta(hours=1), NOW),
        ],
        [
            Attempt("train", 0, 1, AttemptState.LOST, NOW, NOW, NOW, "its process vanished"),
            Attempt("train", 0, 2, AttemptState.SUCCEEDED, NOW + timedelta(seconds=1), NOW, NOW, None, "node-1",
                    {"done": 0.5, "text": "ü"}, "child"),
            Attempt("train", 1, 1, AttemptState.FAILED, NOW + timedelta(seconds=2), NOW, NOW, "boom"),
        ],
        change(run_id, State.RUNNING, started_at=NOW),
        seq=seq,
    )  # fmt: skip


@dataclass
class Pipelines:
    """The stores of pipeline runs, with a leader and a writer."""

    engine: AsyncEngine
    leader: LeaseKeeper
    submissions: SubmissionStore
    store: PipelineStore
    writer: TransitionWriter

    @classmethod
    async def open(cls, engine: AsyncEngine) -> Pipelines:
        """With the leader's lease."""
        leader = LeaseKeeper(engine, "scheduler", "holder", TTL_S)
        await leader.start()
        writer = TransitionWriter(engine, "executor")
        return cls(engine, leader, SubmissionStore(engine, leader), PipelineStore(engine), writer)

    async def close(self) -> None:
        """Gives everything back."""
        await self.submissions.close()
        await self.writer.close()
        await self.leader.stop()

    async def add(self, key: str | None = None, spec: PipelineSpec | None = None, **fields: Any) -> str:
        """A new run's id."""
        run_id, _is_new = await self.submissions.add(new_run(key or unique("key"), spec, **fields))
        return run_id

    async def run(self, spec: PipelineSpec | None = None, **fields: Any) -> tuple[str, int]:
        """A new run that has an executor: its id and epoch."""
        run_id = await self.add(None, spec, **fields)
        return run_id, (await self.submissions.assign({run_id: "executor"}))[run_id]

    async def row(self, run_id: str, step: str = "train", item: int = WHOLE_STEP) -> StepRun:
        """A row of a run, as everybody reads it."""
        found = await self.store.get_snapshot(run_id)
        return next(row for row in found.step_runs if row.node == (step, item))

    async def snapshot(self, run_id: str) -> RunSnapshot:
        """See ``PipelineStore.get_snapshot``."""
        return await self.store.get_snapshot(run_id)

    async def count(self, table: str) -> int:
        """Rows of a table."""
        async with self.engine.connect() as connection:
            return int((await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one())
