"""States of pipeline runs, step runs and attempts, and what the parts of a run say to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

#: The item number of a step itself, as opposed to one item of its fan-out.
WHOLE_STEP = -1


class State(StrEnum):
    """State of a pipeline run or a step run."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    SKIPPED = "SKIPPED"

    @property
    def is_final(self) -> bool:
        """True when it never changes again."""
        return self in _FINAL


_FINAL = {State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED}


class AttemptState(StrEnum):
    """State of one attempt. LOST: its process vanished through no fault of its own; it does not count."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    LOST = "LOST"


Node = tuple[str, int]  # (step, item)


@dataclass(frozen=True)
class AttemptRequest:
    """One attempt of one step (or item), complete: a worker needs nothing else."""

    pipeline: str
    run_id: str
    step: str
    item: int
    attempt: int
    uses: str
    arguments: Mapping[str, Any]
    max_attempts: int
    cpus: float
    gpus: float
    memory_mb: int | None
    fresh_process: bool = False

    @property
    def label(self) -> str:
        """``run/step/item/attempt``, the attempt's name everywhere."""
        return f"{self.run_id}/{self.step}/{self.item}/{self.attempt}"


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended. ``output`` is a stored output (see ``outputs``); ``error`` is for people: a line
    that sums it up, then maybe a traceback."""

    state: AttemptState
    output: dict[str, Any] | None = None
    error: str | None = None


@dataclass
class StepRun:
    """One row of a run's state: a step, or one item of its fan-out."""

    step: str
    item: int
    state: State
    items: int | None = None
    attempt: int = 0
    failures: int = 0
    output: dict[str, Any] | None = None
    error: str | None = None
    retry_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def node(self) -> Node:
        """Its key within the run."""
        return self.step, self.item


@dataclass
class Attempt:
    """One row of the attempts' history."""

    step: str
    item: int
    attempt: int
    state: AttemptState
    started_at: datetime
    finished_at: datetime | None = None
    error: str | None = None


@dataclass
class PipelineRun:
    """One run of a pipeline."""

    run_id: str
    name: str
    digest: str
    params: dict[str, Any]
    state: State
    error: str | None
    executor: str | None
    epoch: int
    submitted_by: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass
class RunSnapshot:
    """A run with its definition and all its rows."""

    run: PipelineRun
    spec: dict[str, Any]
    step_runs: list[StepRun] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True)
class Submission:
    """A request to run a pipeline. ``spec`` is the JSON form of a definition."""

    spec: dict[str, Any]
    params: dict[str, Any]
    idempotency_key: str
    submitted_by: str = ""
