"""Purge, move and import as one object, for whoever serves them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.store import ArtifactStore
from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.errors import PlatformError
from mlplat.storage.guard import StorageGuard
from mlplat.tracking.import_rows import ImportRows
from mlplat.tracking.imports import ImportStore
from mlplat.tracking.metric_outbox import MetricOutbox, MetricStorePort
from mlplat.tracking.moves import RunMover
from mlplat.tracking.purger import LineagePort, Purger

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lifecycle:
    """What happens to experiments and runs beyond logging."""

    purger: Purger
    mover: RunMover
    imports: ImportStore
    import_rows: ImportRows
    outbox: MetricOutbox

    @classmethod
    def build(
        cls,
        engine: AsyncEngine,
        artifacts: ArtifactStore,
        metrics: MetricStorePort,
        lineage: LineagePort,
        guard: StorageGuard,
        artifact_root: str,
    ) -> Lifecycle:
        """All of it over the same stores."""
        outbox = MetricOutbox(engine, metrics)
        return cls(
            Purger(engine, artifacts, metrics, outbox, lineage, guard),
            RunMover(engine, outbox),
            ImportStore(engine, artifact_root),
            ImportRows(engine),
            outbox,
        )

    async def catch_up(self) -> None:
        """Lets the metric store follow purges and moves that a crash cut short; when it is away, later."""
        try:
            await self.outbox.settle()
        except (PlatformError, *CONNECTION_ERRORS) as error:
            _log.warning("purged or moved runs are still to be settled in the metric store: %s", error)
