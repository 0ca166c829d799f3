"""Connections to Postgres when the network fails: no call waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS, HeldConnection, open_engine
from mlplat.settings import postgres_socket_dir
from tests.faults.proxy import FaultProxy

ANSWER_TIMEOUT_S = 0.3
#: With a new connection, which is given five seconds.
BOUND_S = 20.0


@pytest.fixture
def proxy(database_url: str, state_dir: Path) -> Iterator[FaultProxy]:
    """A network between the tests and Postgres."""
    proxy = FaultProxy(postgres_socket_dir(state_dir) / ".s.PGSQL.5432")
    yield proxy
    proxy.close()


@pytest.fixture
async def distant(proxy: FaultProxy, database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine that connects through the proxy and has little patience."""
    url = make_url(database_url).set(host="127.0.0.1", port=proxy.port, query={})
    engine = open_engine(
        url.render_as_string(hide_password=False), "tests", pool_size=1, answer_timeout_s=ANSWER_TIMEOUT_S
    )
    yield engine
    await engine.dispose()


async def _one(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT 1"))).scalar_one())


async def test_a_silent_server_counts_as_gone_and_the_next_call_works(proxy: FaultProxy, distant: AsyncEngine) -> None:
    assert await _one(distant) == 1
    proxy.swallow()
    async with asyncio.timeout(BOUND_S):
        with pytest.raises(CONNECTION_ERRORS):
            await _one(distant)
    assert proxy.swallowed > 0
    proxy.heal()
    async with asyncio.timeout(BOUND_S):
        assert await _one(distant) == 1


async def test_a_connection_that_fell_silent_in_the_pool_is_replaced(proxy: FaultProxy, distant: AsyncEngine) -> None:
    assert await _one(distant) == 1
    proxy.swallow()
    asking = asyncio.create_task(_one(distant))  # the pool asks first whether the connection still lives
    while not proxy.swallowed:
        await asyncio.sleep(0.01)
    proxy.heal()
    async with asyncio.timeout(BOUND_S):
        assert await asking == 1


async def test_a_held_connection_that_fell_silent_is_replaced(proxy: FaultProxy, distant: AsyncEngine) -> None:
    held = HeldConnection(distant, timeout_s=60)
    assert (await held.execute("SELECT 1", {}))[0][0] == 1
    proxy.swallow()
    began = time.monotonic()
    with pytest.raises(CONNECTION_ERRORS):
        await held.execute("SELECT 2", {})
    assert time.monotonic() - began < BOUND_S
    proxy.heal()
    assert (await held.execute("SELECT 3", {}))[0][0] == 3
    await held.close()


async def test_a_slow_answer_in_time_is_no_failure(proxy: FaultProxy, distant: AsyncEngine) -> None:
    assert await _one(distant) == 1
    proxy.slow_down(ANSWER_TIMEOUT_S / 10)
    assert await _one(distant) == 1
    assert proxy.delayed > 0
