"""The registry's coordinator owns its webhooks: the actor's class, without Ray."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from actors import registry_coordinator
from actors.registry_coordinator import RegistryCoordinator
from mlplat.registry.model import CreateModel, SetModelTag
from mlplat.settings import PlatformConfig
from mlplat.webhooks.store import NewWebhook, WebhookStore
from tests.contract.waiting import until
from tests.receiver import SECRET, Receiver


async def test_what_the_coordinator_does_is_told_at_once_and_by_the_next_one_too(
    engine: AsyncEngine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_coordinator, "actor_id", lambda: "the same actor")
    config = PlatformConfig("/nowhere", database_url, "", "", "", webhook_private_targets=("127.0.0.1",))
    receiver = await Receiver().start()
    await WebhookStore(engine).create(NewWebhook("hook", receiver.url, SECRET))
    first = RegistryCoordinator(config, "registry")
    await first.execute(uuid.uuid4().hex, [CreateModel("m")])

    async def has_one() -> bool:
        return len(receiver.received) == 1

    await until(has_one, 1.0)
    receiver.answers = [500]
    await first.execute(uuid.uuid4().hex, [SetModelTag("m", "k", "1")])

    async def has_failed() -> bool:
        newest, *older = await WebhookStore(engine).find_deliveries("hook", None, 10, None)
        return len(older) == 1 and newest.last_status == 500

    await until(has_failed)
    await first.stop()
    await WebhookStore(engine).redeliver("hook", receiver.received[-1].delivery)
    second = RegistryCoordinator(config, "registry")

    async def has_it() -> bool:
        return len(receiver.received) == 3

    await until(has_it)
    assert receiver.told("value") == [(None,), ("1",), ("1",)]
    await second.stop()
    await receiver.stop()
