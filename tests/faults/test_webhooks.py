"""Webhooks under faults: whoever delivers is killed, and every event arrives, in the order of its model."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from mlplat.sdk.client import Client
from tests.faults.stage import RECOVERY_S, kill_actor
from tests.platform import Platform, eventually
from tests.receiver import SECRET, Receiver

MOVES = 60
KILLED_AFTER = (15, 40)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver that fails once."""
    receiver = await Receiver(answers=[200, 500]).start()
    yield receiver
    await receiver.stop()


async def test_every_event_arrives_in_order_whoever_delivers_dies(platform: Platform, receiver: Receiver) -> None:
    client, name = Client(platform.url), f"model-{uuid.uuid4().hex[:8]}"
    for path, body in (
        ("/api/2.0/mlflow/registered-models/create", {"name": name}),
        ("/api/2.0/mlflow/model-versions/create", {"name": name, "source": "s3://bucket/m"}),
        ("/api/2.0/mlflow/model-versions/create", {"name": name, "source": "s3://bucket/m"}),
        (
            "/api/v1/webhooks",
            {"name": name, "url": receiver.url, "secret": SECRET, "model": name, "events": ["alias_set"]},
        ),
    ):
        await asyncio.to_thread(client.post, path, body)
    killed = []
    for number in range(MOVES):
        move = {"alias": "champion", "version": number % 2 + 1}
        await asyncio.to_thread(client.post_once, f"/api/v1/models/{name}/aliases", {"moves": [move]})
        if number in KILLED_AFTER:
            killed.append(await asyncio.to_thread(kill_actor, platform, "registry-coordinator"))
    assert len(killed) == len(KILLED_AFTER)
    log = await asyncio.to_thread(client.get, "/api/v1/models/events/log", model=name, kinds="alias_set", limit=1_000)
    expected = [event["id"] for event in log["events"]]
    assert len(expected) == MOVES
    await asyncio.to_thread(
        eventually, lambda: len({item.body["id"] for item in receiver.received}) >= MOVES, RECOVERY_S, "all arrived"
    )
    arrived = list(dict.fromkeys(item.body["id"] for item in receiver.received))
    assert arrived == expected
    deliveries = {(item.body["id"], item.delivery) for item in receiver.received}
    assert len(deliveries) == MOVES
