"""What a stream of events is made of.

``snapshot`` has the whole run, ``change`` the rows that transitions wrote since, ``log`` new text of an attempt and
``end`` how the run ended. Rows come whole, so applying one twice is harmless.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, TypeAdapter

from mlplat.artifacts.segments import Place
from mlplat.http.routes.pipeline_status import (
    AttemptStatus,
    RunStatus,
    SignalStatus,
    StepFields,
    attempt_status,
    json_output,
    signal_status,
    status_of,
)
from mlplat.pipelines.dag import dependencies
from mlplat.pipelines.model import WHOLE_STEP, PipelineRun, RunSnapshot, State, StepRun
from mlplat.pipelines.spec import PipelineSpec

HEARTBEAT = b": still here\n\n"
#: Milliseconds after which a browser that was cut off tries again.
OPENING = b"retry: 1000\n\n"


class DagStep(BaseModel):
    """A step of the graph. ``needs`` are all steps that it waits for, those that its expressions read included."""

    name: str
    kind: str
    needs: list[str]
    is_finally: bool
    is_fan_out: bool
    max_attempts: int
    description: str


class Snapshot(BaseModel):
    """The run as ``GET /api/v1/pipeline-runs/{run_id}`` answers it, and its graph in the order of the definition."""

    run: RunStatus
    dag: list[DagStep]


class StepRow(StepFields):
    """A step (``item`` is None), or one item of its fan-out. ``items`` is the number of a step's items."""

    step: str
    item: int | None
    items: int | None


class Change(BaseModel):
    """What transitions changed. ``run`` has those fields of the run that changed; ``signals`` is the whole list."""

    seq: int
    run: dict[str, Any]
    steps: list[StepRow]
    attempts: list[AttemptStatus]
    signals: list[SignalStatus] | None


class LogPosition(BaseModel):
    """Byte ``offset`` of segment number ``segment`` of an attempt's log."""

    segment: int
    offset: int


class LogText(BaseModel):
    """New text of an attempt's log, from ``start`` to ``next``. ``skipped``: some of it before was left out."""

    step: str
    item: int | None
    attempt: int
    start: LogPosition
    next: LogPosition
    skipped: bool
    text: str


class End(BaseModel):
    """How the run ended. ``state`` is None when the run was deleted meanwhile."""

    seq: int | None
    state: State | None
    error: str | None


def message(event: str, data: BaseModel, number: int | None = None) -> bytes:
    """One Server-Sent Event; with ``number``, a client that comes back says that it has seen this."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {event}\ndata: {data.model_dump_json()}\n\n".encode()


def dag_of(spec: PipelineSpec) -> list[DagStep]:
    """The graph, in the order of the definition."""
    needs, order = dependencies(spec), {name: index for index, name in enumerate(spec.all_steps)}
    return [
        DagStep(
            name=name, kind=step.kind, needs=sorted(needs[name], key=order.__getitem__),
            is_finally=name in spec.finally_, is_fan_out=step.foreach is not None,
            max_attempts=step.retry.max_attempts, description=step.description,
        )
        for name, step in spec.all_steps.items()
    ]  # fmt: skip


def snapshot_message(snapshot: RunSnapshot) -> bytes:
    """The first event of a stream."""
    dag = dag_of(PipelineSpec.model_validate(snapshot.spec))
    return message("snapshot", Snapshot(run=status_of(snapshot), dag=dag), snapshot.run.seq)


def change_message(snapshot: RunSnapshot, run_fields: dict[str, Any], *, with_signals: bool) -> bytes:
    """The rows of a snapshot as a change."""
    change = Change(
        seq=snapshot.run.seq,
        run=run_fields,
        steps=[_step_row(row) for row in snapshot.step_runs],
        attempts=[attempt_status(entry) for entry in snapshot.attempts],
        signals=[signal_status(entry) for entry in snapshot.signals] if with_signals else None,
    )
    return message("change", change, snapshot.run.seq)


def end_message(run: PipelineRun | None) -> bytes:
    """The last event of a stream; None for a run that is no more."""
    if run is None:
        return message("end", End(seq=None, state=None, error="the run was deleted"))
    return message("end", End(seq=run.seq, state=run.state, error=run.error), run.seq)


class _RunFields(BaseModel):
    state: State
    error: str | None
    stopping: State | None
    started_at: datetime | None
    finished_at: datetime | None
    output: Any


_FIELDS = TypeAdapter(_RunFields)


def run_fields(run: PipelineRun) -> dict[str, Any]:
    """What may change about a run, as JSON."""
    fields = _RunFields(
        state=run.state, error=run.error, stopping=run.stopping, started_at=run.started_at,
        finished_at=run.finished_at, output=json_output(run.output),
    )  # fmt: skip
    found: dict[str, Any] = _FIELDS.dump_python(fields, mode="json")
    return found


def position(place: Place) -> LogPosition:
    """A place as events have it."""
    return LogPosition(segment=place.segment, offset=place.offset)


def _step_row(row: StepRun) -> StepRow:
    is_step = row.item == WHOLE_STEP
    return StepRow(
        step=row.step, item=None if is_step else row.item, state=row.state, items=row.items, attempt=row.attempt,
        failures=row.failures, error=row.error, output=None if is_step and row.items is not None else
        json_output(row.output), retry_at=row.retry_at, queued_at=row.queued_at, started_at=row.started_at,
        finished_at=row.finished_at, reused_from=row.reused_from,
    )  # fmt: skip
