"""States of pipeline runs, step runs and attempts, and what the parts of a run say to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # workers know attempts and nothing of definitions, which take long to import
    from mlplat.pipelines.spec import PipelineSpec

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
    """State of one attempt. QUEUED: it waits for a worker. LOST: its process vanished through no fault of its
    own; it does not count."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    LOST = "LOST"

    @property
    def is_final(self) -> bool:
        """True when it never changes again."""
        return self not in _OPEN_ATTEMPTS


_OPEN_ATTEMPTS = {AttemptState.QUEUED, AttemptState.RUNNING}
Node = tuple[str, int]  # (step, item)


@dataclass(frozen=True)
class Reservation:
    """What an attempt needs of its node; ``env_vars`` and ``packages`` are of its process."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_mb: int | None = None
    accelerator: str | None = None
    custom: tuple[tuple[str, float], ...] = ()
    env_vars: tuple[tuple[str, str], ...] = ()
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttemptRequest:
    """One attempt of one step (or item), complete: a worker needs nothing else.

    ``kind`` and ``target`` say what runs: ``uses`` with a function, ``command`` with a text or a list, ``notebook``
    with the stored notebook. ``checkpoints`` are the folders where a predecessor may have left some, the
    attempt's own first.
    """

    pipeline: str
    run_id: str
    step: str
    item: int
    attempt: int
    kind: str
    target: str | list[str]
    arguments: Mapping[str, Any]
    max_attempts: int
    reservation: Reservation = Reservation()
    working_dir: str | None = None
    timeout_s: float | None = None
    durable: bool = False
    fresh_process: bool = False
    keep_checkpoints: int = 3
    checkpoints: tuple[str, ...] = ()
    submitted_by: str = ""
    priority: int = 0
    best_checkpoints: Literal["max", "min"] | None = None

    @property
    def node(self) -> Node:
        """Its key within the run."""
        return self.step, self.item

    @property
    def label(self) -> str:
        """``run/step/item/attempt``, the attempt's name everywhere."""
        return attempt_label(self.run_id, self.step, self.item, self.attempt)


def attempt_label(run_id: str, step: str, item: int, attempt: int) -> str:
    """``run/step/item/attempt``."""
    return f"{run_id}/{step}/{item}/{attempt}"


@dataclass(frozen=True)
class ChildRequest:
    """One attempt of a step that is a sub-pipeline: a run of its own.

    ``resumed_from`` is the run of the attempt before, whose results the new one starts from.
    """

    run_id: str
    step: str
    item: int
    attempt: int
    child_id: str
    spec: PipelineSpec
    params: dict[str, Any]
    submitted_by: str
    resumed_from: str | None = None

    @property
    def node(self) -> Node:
        """Its key within the parent's run."""
        return self.step, self.item


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended.

    Args:
        output: a stored output (see ``outputs``).
        error: for people: a line that sums it up, then maybe a traceback.
        error_types: the exception's class and its bases, each with its module, for the retry policy's filter.
        started_at: when a worker began with it.
        node: where it ran.
    """

    state: AttemptState
    output: dict[str, Any] | None = None
    error: str | None = None
    error_types: tuple[str, ...] = ()
    started_at: datetime | None = None
    node: str | None = None


@dataclass
class StepRun:
    """One row of a run's state: a step, or one item of its fan-out.

    ``seq`` is the number of the run's transition that wrote it last. A SKIPPED step without an ``error`` is one whose
    ``when`` was not met: what needs it goes on.
    """

    step: str
    item: int
    state: State
    items: int | None = None
    attempt: int = 0
    failures: int = 0
    output: dict[str, Any] | None = None
    error: str | None = None
    retry_at: datetime | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    #: The run whose attempt gave the output, when it was not one of this run.
    reused_from: str | None = None
    seq: int = 0

    @property
    def node(self) -> Node:
        """Its key within the run."""
        return self.step, self.item

    @property
    def is_satisfied(self) -> bool:
        """Whether steps that need it may go on."""
        return self.state is State.SUCCEEDED or (self.state is State.SKIPPED and self.error is None)


@dataclass
class Attempt:
    """One row of the attempts' history. ``progress`` is ``{"done": 0..1 or None, "text": …}``."""

    step: str
    item: int
    attempt: int
    state: AttemptState
    queued_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: str | None = None
    node: str | None = None
    progress: dict[str, Any] | None = None
    child_id: str | None = None
    seq: int = 0


@dataclass
class PipelineRun:
    """One run of a pipeline.

    ``source`` says what submitted it: empty for a person, else ``schedule:<name>``, ``trigger:<name>`` or
    ``step:<parent run>/<step>/<item>/<attempt>``. ``resumed_from`` is the run whose results it starts from.
    """

    run_id: str
    name: str
    digest: str
    params: dict[str, Any]
    state: State
    error: str | None = None
    executor: str | None = None
    epoch: int = 0
    submitted_by: str = ""
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    priority: int = 0
    concurrency_key: str | None = None
    concurrency_limit: int | None = None
    source: str = ""
    resumed_from: str | None = None
    resumed_step: str | None = None
    output: dict[str, Any] | None = None
    #: The state that it will end in, once somebody or its timeout has stopped it.
    stopping: State | None = None
    seq: int = 0


class SignalKind(StrEnum):
    """What people tell a run."""

    CANCEL = "cancel"
    APPROVE = "approve"
    REJECT = "reject"


@dataclass(frozen=True)
class Signal:
    """Something a person told a run. ``step`` is empty for the run as a whole."""

    signal_id: int
    run_id: str
    kind: SignalKind
    step: str
    by: str
    comment: str
    created_at: datetime


@dataclass
class RunSnapshot:
    """A run with its definition and all its rows. Steps that have not been looked at have no row yet."""

    run: PipelineRun
    spec: dict[str, Any]
    step_runs: list[StepRun] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)


@dataclass(frozen=True)
class Submission:
    """A request to run a pipeline. ``spec`` is the JSON text of a definition."""

    spec: bytes
    params: dict[str, Any]
    idempotency_key: str
    submitted_by: str = ""
    priority: int | None = None
    source: str = ""
    resumed_from: str | None = None
    #: With ``resumed_from``: this step and what depends on it run again, whatever became of them.
    from_step: str | None = None


@dataclass(frozen=True)
class Assignment:
    """A run that an executor is to drive under an epoch.

    ``run`` and ``spec`` (JSON) come with a run that is new, which has nothing else in the database.
    """

    run_id: str
    epoch: int
    spec: bytes | None = None
    run: PipelineRun | None = None
