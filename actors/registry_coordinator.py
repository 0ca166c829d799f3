"""RegistryCoordinator: the single writer of the model registry."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from actors.handles import MetricShardClient
from actors.lifecycle import Health, Started, actor_id
from mlplat.db.engine import open_engine
from mlplat.db.lease import LeaseKeeper
from mlplat.registry.model import NOBODY, Command, Origin
from mlplat.registry.service import RegistryService
from mlplat.settings import PlatformConfig
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.delivery import Deliveries
from mlplat.webhooks.sender import Sender


class RegistryCoordinator:
    """The coordinator; see ``RegistryService``."""

    def __init__(self, config: PlatformConfig, name: str) -> None:
        engine = open_engine(config.postgres_url, name, pool_size=2)
        lease = LeaseKeeper(engine, name, actor_id())
        self._service = RegistryService(engine, lease, MetricShardClient().query)
        # Connections of its own: who waits for a receiver's outcome to be noted keeps no registry change waiting.
        outbox = open_engine(config.postgres_url, f"{name} webhooks", pool_size=2)
        self._deliveries = Deliveries(outbox, lease, Sender(Targets.parse(config.webhook_private_targets)))
        self._started = Started(self._start, lease)

    async def execute(
        self, request_id: str, commands: Sequence[Command], origin: Origin = NOBODY
    ) -> list[dict[str, Any]]:
        """Applies commands on one model once, all or none."""
        await self._started.wait()
        answers = await self._service.execute(request_id, commands, origin)
        self._deliveries.wake()
        return answers

    async def health(self) -> Health:
        """Answers when the coordinator is in charge."""
        await self._started.wait()
        return {"pid": os.getpid(), "lag": self._service.lag()}

    async def stop(self) -> None:
        """Lets go."""
        await self._started.wait()
        self._started.release()
        await self._deliveries.stop()
        await self._service.stop()

    async def _start(self) -> None:
        await self._service.start()
        self._deliveries.start()
