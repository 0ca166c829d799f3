"""/api/v1/pipeline-runs"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from mlplat.errors import NotFound
from mlplat.execution.capture import read_log
from mlplat.http.services import Services
from mlplat.pipelines.expressions import OutputRef
from mlplat.pipelines.model import WHOLE_STEP, PipelineRun, RunSnapshot, State, StepRun, Submission
from mlplat.pipelines.outputs import open_for_expressions

MAX_OFFSET = 1_000_000_000


class SubmitRequest(BaseModel):
    """A pipeline definition and the values of its parameters."""

    spec: dict[str, Any] = Field(description="A definition, as YAML files and Python pipelines compile to.")
    params: dict[str, Any] = {}
    idempotency_key: str = Field(min_length=1, max_length=200, description="The same key again gives the same run.")
    submitted_by: str = Field(default="", max_length=200)


class SubmitAnswer(BaseModel):
    """The durable run."""

    run_id: str


class RunSummary(BaseModel):
    """A pipeline run without its steps."""

    run_id: str
    pipeline: str
    state: State
    error: str | None
    params: dict[str, Any]
    submitted_by: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class ItemStatus(BaseModel):
    """One item of a fan-out."""

    state: State
    attempt: int
    error: str | None


class StepStatus(BaseModel):
    """A step of a run. ``output`` is None when it is not JSON."""

    state: State
    attempt: int
    failures: int
    error: str | None
    output: Any
    started_at: datetime | None
    finished_at: datetime | None
    items: list[ItemStatus] | None


class AttemptStatus(BaseModel):
    """One attempt, in the order of their starts."""

    step: str
    item: int | None
    attempt: int
    state: str
    error: str | None
    started_at: datetime
    finished_at: datetime | None


class RunStatus(RunSummary):
    """A pipeline run with its steps, in the order of the definition."""

    steps: dict[str, StepStatus]
    attempts: list[AttemptStatus]


def router(services: Services) -> APIRouter:
    """Submitting, listing and reading runs."""
    api = APIRouter(prefix="/api/v1/pipeline-runs", tags=["pipelines"])

    @api.post("")
    async def submit(request: SubmitRequest) -> SubmitAnswer:
        """Validates and stores a run. The run is durable when this answers."""
        submission = Submission(request.spec, request.params, request.idempotency_key, request.submitted_by)
        return SubmitAnswer(run_id=await services.scheduler.submit(submission))

    @api.get("")
    async def list_runs(
        limit: Annotated[int, Query(ge=1, le=1000)] = 50, offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0
    ) -> list[RunSummary]:
        """Runs, newest first."""
        return [RunSummary(**_summary(run)) for run in await services.pipelines.find_runs(limit, offset)]

    @api.get("/{run_id}")
    async def get_run(run_id: str) -> RunStatus:
        """One run with its steps and attempts."""
        return _status(await services.pipelines.get_snapshot(run_id))

    @api.get("/{run_id}/logs", response_class=PlainTextResponse)
    async def logs(run_id: str, step: str | None = None) -> PlainTextResponse:
        """What the attempts printed so far, each under a heading."""
        snapshot = await services.pipelines.get_snapshot(run_id)
        if step is not None and step not in snapshot.spec["steps"]:
            raise NotFound(f"pipeline run {run_id} has no step {step!r}")
        return PlainTextResponse(await asyncio.to_thread(_collect_logs, services, snapshot, step))

    return api


def _collect_logs(services: Services, snapshot: RunSnapshot, step: str | None) -> str:
    parts: list[str] = []
    for attempt in snapshot.attempts:
        if step is not None and attempt.step != step:
            continue
        item = "" if attempt.item == WHOLE_STEP else f"[{attempt.item}]"
        parts.append(f"── {attempt.step}{item} · attempt {attempt.attempt} · {attempt.state}\n")
        body = read_log(services.artifacts, snapshot.run.run_id, attempt.step, attempt.item, attempt.attempt)
        text = body.decode(errors="replace")
        parts.append(text if not text or text.endswith("\n") else f"{text}\n")
    return "".join(parts)


def _summary(run: PipelineRun) -> dict[str, Any]:
    return {
        "run_id": run.run_id, "pipeline": run.name, "state": run.state, "error": run.error, "params": run.params,
        "submitted_by": run.submitted_by, "created_at": run.created_at, "started_at": run.started_at,
        "finished_at": run.finished_at,
    }  # fmt: skip


def _status(snapshot: RunSnapshot) -> RunStatus:
    rows = {row.node: row for row in snapshot.step_runs}
    attempts = [
        AttemptStatus(
            step=entry.step, item=None if entry.item == WHOLE_STEP else entry.item, attempt=entry.attempt,
            state=entry.state, error=entry.error, started_at=entry.started_at, finished_at=entry.finished_at,
        )
        for entry in snapshot.attempts
    ]  # fmt: skip
    steps = {name: _step(rows, rows[name, WHOLE_STEP]) for name in snapshot.spec["steps"]}
    return RunStatus(**_summary(snapshot.run), steps=steps, attempts=attempts)


def _step(rows: dict[tuple[str, int], StepRun], row: StepRun) -> StepStatus:
    items: list[StepRun] | None = None
    output: Any = _json_output(row)
    if row.items is not None:
        items = [rows[row.step, index] for index in range(row.items)]
        output = [_json_output(item) for item in items] if row.state is State.SUCCEEDED else None
    return StepStatus(
        state=row.state, attempt=row.attempt, failures=row.failures, error=row.error, output=output,
        started_at=row.started_at, finished_at=row.finished_at,
        items=None
        if items is None
        else [ItemStatus(state=item.state, attempt=item.attempt, error=item.error) for item in items],
    )  # fmt: skip


def _json_output(row: StepRun) -> Any:
    value = open_for_expressions(row.output)
    return None if isinstance(value, OutputRef) else value
