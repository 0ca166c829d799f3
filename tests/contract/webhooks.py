"""A coordinator for tests of webhooks: a registry, an outbox that moves when it is told to, and its receivers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.registry.model import Command, CreateModel, Origin, SetModelTag
from mlplat.registry.service import RegistryService
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.delivery import Deliveries
from mlplat.webhooks.model import Delivery, Retries, Webhook
from mlplat.webhooks.sender import Sender
from mlplat.webhooks.store import NewWebhook, WebhookStore
from tests.receiver import SECRET
from tests.registry import no_metrics

#: Fast enough for tests, in which every attempt but the first is asked for.
SOON = Retries(max_attempts=3, first_s=0.0)
LOOPBACK = Targets.parse(["127.0.0.0/8"])
TTL_S = 600.0


@dataclass
class Coordinator:
    """The registry's writer with its webhooks. A later one with the same holder takes the lease from an earlier one."""

    engine: AsyncEngine
    lease: LeaseKeeper
    registry: RegistryService
    deliveries: Deliveries
    store: WebhookStore

    async def do(self, *commands: Command) -> None:
        """Changes the registry in one request."""
        await self.registry.execute(uuid.uuid4().hex, commands, Origin("ann", "why"))

    async def model(self, name: str = "m", tags: int = 0) -> str:
        """A model, and some changes of it: the tag ``k`` counts up from 0."""
        await self.do(CreateModel(name))
        for number in range(tags):
            await self.tag(number, name)
        return name

    async def tag(self, value: object, name: str = "m") -> None:
        """One change."""
        await self.do(SetModelTag(name, "k", str(value)))

    async def hook(self, url: str, name: str = "hook", **fields: Any) -> Webhook:
        """A webhook."""
        return await self.store.create(NewWebhook(name, url, SECRET, **fields))

    async def round(self, rounds: int = 1) -> None:
        """Looks, and lets what begins come to its end."""
        for _ in range(rounds):
            await self.deliveries.look()
            await self.deliveries.settle()

    async def all(self, key: str = "hook") -> list[Delivery]:
        """Deliveries of a webhook, oldest first."""
        return (await self.store.find_deliveries(key, None, 1_000, None))[::-1]

    async def states(self, key: str = "hook") -> list[tuple[str, int, int | None]]:
        """State, attempts and last status of each."""
        return [(item.state.value, item.attempts, item.last_status) for item in await self.all(key)]

    async def sql(self, statement: str, **values: object) -> None:
        """Changes what nothing else changes."""
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), values)


@asynccontextmanager
async def coordinating(
    engine: AsyncEngine, sender: Sender | None = None, retries: Retries = SOON
) -> AsyncIterator[Coordinator]:
    """A coordinator in charge."""
    lease = LeaseKeeper(engine, "registry", "the same actor", TTL_S)
    registry = RegistryService(engine, lease, no_metrics)
    await registry.start()
    deliveries = Deliveries(engine, lease, sender or Sender(LOOPBACK, timeout_s=5), retries)
    yield Coordinator(engine, lease, registry, deliveries, WebhookStore(engine))
    await deliveries.stop()
    await registry.stop()
