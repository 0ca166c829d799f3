"""Firings: what a schedule or a trigger decided, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

MAX_REASON = 2_000


class FiringState(StrEnum):
    """PENDING: its run is to be submitted. SUBMITTED: the run is durable. SKIPPED and FAILED: there is no run, and the
    firing says why."""

    PENDING = "PENDING"
    SUBMITTED = "SUBMITTED"
    SKIPPED = "SKIPPED"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Firing:
    """One decision. ``source`` and ``event_id`` identify it: the same event never fires twice.

    Args:
        source: ``schedule:<name>`` or ``trigger:<name>``.
        event_id: the fire time, or the event's own id.
        event_at: the fire time, or when it happened.
        params: the run's parameters, rendered.
        lineage: the triggers that led here, this one included.
    """

    source: str
    event_id: str
    event_at: datetime
    digest: str | None = None
    params: dict[str, Any] | None = None
    submitted_by: str = ""
    lineage: list[str] = field(default_factory=list)
    state: FiringState = FiringState.PENDING
    reason: str = ""

    @property
    def key(self) -> str:
        """The idempotency key of its run."""
        return f"{self.source}:{self.event_id}"


@dataclass(frozen=True)
class Recorded:
    """A firing in the database. ``run_state`` is the state of its run."""

    firing_id: int
    firing: Firing
    run_id: str | None
    run_state: str | None
    tries: int
    created_at: datetime
