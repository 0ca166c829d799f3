"""Pipeline runs as ``/api/v1`` answers them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel

from mlplat.pipelines.expressions import OutputRef
from mlplat.pipelines.model import WHOLE_STEP, Attempt, AttemptState, PipelineRun, RunSnapshot, Signal, State, StepRun
from mlplat.pipelines.stored import open_for_expressions


class RunSummary(BaseModel):
    """A pipeline run without its steps. From ``created_at`` to ``started_at`` it waited for its turn."""

    run_id: str
    pipeline: str
    state: State
    error: str | None
    params: dict[str, Any]
    submitted_by: str
    source: str
    priority: int
    concurrency_key: str | None
    resumed_from: str | None
    stopping: State | None
    seq: int
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


class StepFields(BaseModel):
    """What is said of a step, or of one item of its fan-out. ``output`` is None when it is not JSON."""

    state: State
    attempt: int
    failures: int
    error: str | None
    output: Any
    retry_at: datetime | None
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    reused_from: str | None


class StepStatus(StepFields):
    """A step of a run with its items, or one of these."""

    items: list[StepStatus] | None


class AttemptStatus(BaseModel):
    """One attempt, in the order in which they were queued."""

    step: str
    item: int | None
    attempt: int
    state: AttemptState
    error: str | None
    node: str | None
    progress: dict[str, Any] | None
    child_id: str | None
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class SignalStatus(BaseModel):
    """Something a person told the run."""

    kind: str
    step: str
    by: str
    comment: str
    created_at: datetime


class RunStatus(RunSummary):
    """A pipeline run with its steps, in the order of the definition."""

    output: Any
    steps: dict[str, StepStatus]
    attempts: list[AttemptStatus]
    signals: list[SignalStatus]


def summary_of(run: PipelineRun) -> RunSummary:
    """The run without its steps."""
    return RunSummary(**_summary(run))


def status_of(snapshot: RunSnapshot) -> RunStatus:
    """The run with its steps and attempts. The snapshot is a whole one."""
    rows = {row.node: row for row in snapshot.step_runs}
    names = [*snapshot.spec["steps"], *snapshot.spec.get("finally", {})]
    return RunStatus(
        **_summary(snapshot.run),
        output=json_output(snapshot.run.output),
        steps={name: step_status(rows, rows[name, WHOLE_STEP]) for name in names},
        attempts=[attempt_status(entry) for entry in snapshot.attempts],
        signals=[signal_status(entry) for entry in snapshot.signals],
    )


def signal_status(entry: Signal) -> SignalStatus:
    """Something a person told the run."""
    return SignalStatus(
        kind=entry.kind, step=entry.step, by=entry.by, comment=entry.comment, created_at=entry.created_at
    )


def attempt_status(entry: Attempt) -> AttemptStatus:
    """An attempt."""
    return AttemptStatus(
        step=entry.step, item=None if entry.item == WHOLE_STEP else entry.item, attempt=entry.attempt,
        state=entry.state, error=entry.error, node=entry.node, progress=entry.progress, child_id=entry.child_id,
        queued_at=entry.queued_at, started_at=entry.started_at, finished_at=entry.finished_at,
    )  # fmt: skip


def step_status(rows: dict[tuple[str, int], StepRun], row: StepRun) -> StepStatus:
    """A step with the items that it has in ``rows``."""
    items: list[StepStatus] | None = None
    output: Any = json_output(row.output)
    if row.items is not None and row.item == WHOLE_STEP:
        items = [step_status(rows, rows[row.step, index]) for index in range(row.items)]
        output = [item.output for item in items] if row.state is State.SUCCEEDED else None
    return StepStatus(
        state=row.state, attempt=row.attempt, failures=row.failures, error=row.error, output=output,
        retry_at=row.retry_at, queued_at=row.queued_at, started_at=row.started_at, finished_at=row.finished_at,
        reused_from=row.reused_from, items=items,
    )  # fmt: skip


def _summary(run: PipelineRun) -> dict[str, Any]:
    return {
        "run_id": run.run_id, "pipeline": run.name, "state": run.state, "error": run.error, "params": run.params,
        "submitted_by": run.submitted_by, "source": run.source, "priority": run.priority,
        "concurrency_key": run.concurrency_key, "resumed_from": run.resumed_from, "stopping": run.stopping,
        "seq": run.seq, "created_at": run.created_at, "started_at": run.started_at, "finished_at": run.finished_at,
    }  # fmt: skip


def json_output(stored: dict[str, Any] | None) -> Any:
    """A stored output, or None when it is not JSON."""
    value = open_for_expressions(stored)
    return None if isinstance(value, OutputRef) else value
