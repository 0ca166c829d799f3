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


class RegistryCoordinator:
    """The coordinator; see ``RegistryService``."""

    def __init__(self, config: PlatformConfig, name: str) -> None:
        engine = open_engine(config.postgres_url, name, pool_size=2)
        lease = LeaseKeeper(engine, name, actor_id())
        self._service = RegistryService(engine, lease, MetricShardClient().query)
        self._started = Started(self._service.start, lease)

    async def execute(
        self, request_id: str, commands: Sequence[Command], origin: Origin = NOBODY
    ) -> list[dict[str, Any]]:
        """Applies commands on one model once, all or none."""
        await self._started.wait()
        return await self._service.execute(request_id, commands, origin)

    async def health(self) -> Health:
        """Answers when the coordinator is in charge."""
        await self._started.wait()
        return {"pid": os.getpid(), "lag": self._service.lag()}

    async def stop(self) -> None:
        """Lets go."""
        await self._started.wait()
        self._started.release()
        await self._service.stop()
