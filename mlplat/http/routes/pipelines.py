"""/api/v1/pipeline-runs"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from mlplat.errors import InvalidInput, Unavailable
from mlplat.http.bodies import read_body
from mlplat.http.routes.pipeline_status import RunStatus, RunSummary, status_of, summary_of
from mlplat.http.services import Services
from mlplat.pipelines.loader import MAX_BYTES
from mlplat.pipelines.model import State, Submission

MAX_OFFSET = 1_000_000_000
#: A definition, its parameters and what else a submission says.
MAX_SUBMISSION_BYTES = 2 * MAX_BYTES


class _Submission(msgspec.Struct, forbid_unknown_fields=True):
    idempotency_key: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    spec: msgspec.Raw
    params: dict[str, Any] = {}
    submitted_by: Annotated[str, msgspec.Meta(max_length=200)] = ""
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)] | None = None
    resumed_from: str | None = None
    from_step: str | None = None


_SUBMISSION = msgspec.json.Decoder(_Submission)


class SubmitRequest(BaseModel):
    """A pipeline definition and the values of its parameters."""

    spec: dict[str, Any] = Field(description="A definition, as YAML files and Python pipelines compile to.")
    params: dict[str, Any] = {}
    idempotency_key: str = Field(min_length=1, max_length=200, description="The same key again gives the same run.")
    submitted_by: str = Field(default="", max_length=200)
    priority: int | None = Field(default=None, ge=-100, le=100, description="Instead of the definition's.")
    resumed_from: str | None = Field(default=None, description="A run whose results the new one starts from.")
    from_step: str | None = Field(default=None, description="With resumed_from: runs again, whatever became of it.")


class SubmitAnswer(BaseModel):
    """The durable run."""

    run_id: str


class Told(BaseModel):
    """What a person says to a run."""

    by: str = Field(default="", max_length=200, description="Who says it.")
    comment: str = Field(default="", max_length=2_000)


def router(services: Services) -> APIRouter:
    """Submitting, listing, reading, and telling runs something."""
    api = APIRouter(prefix="/api/v1/pipeline-runs", tags=["pipelines"])
    body_schema = {"requestBody": {"content": {"application/json": {"schema": SubmitRequest.model_json_schema()}}}}

    @api.post("", openapi_extra=body_schema)
    async def submit(request: Request) -> SubmitAnswer:
        """Validates and stores a run. The run is durable when this answers."""
        submission = _decode(await read_body(request, MAX_SUBMISSION_BYTES))
        return SubmitAnswer(run_id=await services.scheduler.submit(submission))

    @api.get("")
    async def list_runs(
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
        pipeline: str | None = None,
        state: State | None = None,
        submitted_by: str | None = None,
        source: str | None = None,
    ) -> list[RunSummary]:
        """Runs, newest first."""
        runs = await services.pipelines.find_runs(
            limit, offset, name=pipeline, state=state, submitted_by=submitted_by, source=source
        )
        return [summary_of(run) for run in runs]

    @api.get("/{run_id}")
    async def get_run(run_id: str) -> RunStatus:
        """One run with its steps and attempts."""
        return status_of(await services.pipelines.get_snapshot(run_id))

    @api.get("/{run_id}/definition")
    async def definition(run_id: str) -> dict[str, Any]:
        """The definition that the run was made from."""
        return await services.pipelines.get_definition(run_id)

    @api.post("/{run_id}/cancel")
    async def cancel(run_id: str, told: Told) -> RunSummary:
        """Stops the run: its attempts are asked to end, then forced; its finally steps still run."""
        run = await services.pipelines.cancel(run_id, told.by, told.comment)
        with suppress(Unavailable):  # durable already: the executor looks by itself
            await services.scheduler.cancel(run_id, told.by)
        return summary_of(run)

    @api.post("/{run_id}/steps/{step}/approve")
    async def approve(run_id: str, step: str, told: Told) -> RunSummary:
        """Lets the run go on."""
        return await _decide(services, run_id, step, told, approve=True)

    @api.post("/{run_id}/steps/{step}/reject")
    async def reject(run_id: str, step: str, told: Told) -> RunSummary:
        """Fails the step that waits for a decision."""
        return await _decide(services, run_id, step, told, approve=False)

    return api


def _decode(body: bytes) -> Submission:
    try:
        given = _SUBMISSION.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the submission cannot be read: {error}") from error
    return Submission(
        bytes(given.spec), given.params, given.idempotency_key, given.submitted_by, given.priority, "",
        given.resumed_from, given.from_step,
    )  # fmt: skip


async def _decide(services: Services, run_id: str, step: str, told: Told, *, approve: bool) -> RunSummary:
    run = await services.pipelines.decide(run_id, step, approve=approve, by=told.by, comment=told.comment)
    with suppress(Unavailable):  # durable already: the executor looks by itself
        await services.scheduler.poke(run_id)
    return summary_of(run)
