"""What the HTTP layer calls. The ports are actors in production; the layer does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from mlplat.artifacts.store import ArtifactStore
from mlplat.events.log import EventLog
from mlplat.lineage.store import LineageStore
from mlplat.metrics.model import Archived
from mlplat.metrics.queries import Statement
from mlplat.pipelines.automation.store import AutomationStore
from mlplat.pipelines.model import Submission
from mlplat.pipelines.store import PipelineStore
from mlplat.registry.frozen import FrozenFiles
from mlplat.registry.history_store import RegistryHistory
from mlplat.registry.model import NOBODY, Command, Origin
from mlplat.registry.move_store import MoveStore
from mlplat.registry.store import RegistryStore
from mlplat.storage.guard import StorageGuard
from mlplat.storage.upkeep import Upkeep
from mlplat.tracking.datasets import DatasetStore
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.heartbeats import HeartbeatStore
from mlplat.tracking.lifecycle import Lifecycle
from mlplat.tracking.logged_models import LoggedModelStore
from mlplat.tracking.model import RunUpdate
from mlplat.tracking.runs import RunStore
from mlplat.webhooks.service import Webhooks


class MetricsPort(Protocol):
    """The metric shards."""

    async def append(self, batch: bytes, update: RunUpdate | None = None) -> int:
        """Makes an Arrow IPC batch durable, together with ``update``; returns its number of points."""
        ...

    async def query(self, statement: Statement) -> pa.Table:
        """Rows of a read that sees every acknowledged point."""
        ...

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """Makes the metric store agree with Postgres about purged or moved runs; returns the bytes freed there."""
        ...

    async def archive(self, run_ids: Sequence[str]) -> Archived:
        """Moves the points of runs from the metric store into the archive."""
        ...


class RegistryPort(Protocol):
    """The registry's single writer."""

    async def execute(
        self, request_id: str, commands: Sequence[Command], origin: Origin = NOBODY
    ) -> list[dict[str, Any]]:
        """Applies commands on one model once, all or none."""
        ...


class SchedulerPort(Protocol):
    """The pipeline scheduler."""

    async def submit(self, submission: Submission) -> str:
        """Validates and stores a run; returns its id."""
        ...

    async def cancel(self, run_id: str, by: str) -> None:
        """Somebody has asked for the run's end, durably."""
        ...

    async def poke(self, run_id: str) -> None:
        """People told the run something, durably."""
        ...

    async def wake(self) -> None:
        """Schedules or triggers were changed or fired, durably."""
        ...


class StatusPort(Protocol):
    """The platform's actors."""

    async def actors(self) -> list[dict[str, Any]]:
        """One row per actor: name, node, pid, restarts, health, lag."""
        ...


@dataclass(frozen=True)
class Services:
    """Everything the routes need."""

    experiments: ExperimentStore
    runs: RunStore
    heartbeats: HeartbeatStore
    datasets: DatasetStore
    logged_models: LoggedModelStore
    lifecycle: Lifecycle
    lineage: LineageStore
    metrics: MetricsPort
    registry: RegistryStore
    registry_history: RegistryHistory
    moves: MoveStore
    frozen: FrozenFiles
    events: EventLog
    webhooks: Webhooks
    registry_writer: RegistryPort
    pipelines: PipelineStore
    automation: AutomationStore
    scheduler: SchedulerPort
    artifacts: ArtifactStore
    #: Whether clients reach the bucket themselves.
    direct_artifacts: bool
    guard: StorageGuard
    upkeep: Upkeep
    status: StatusPort
