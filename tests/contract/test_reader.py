"""Single statements that read: on connections that break, and without a server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Integer, Text, bindparam, cast, func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.reader import Fixed, Reader
from mlplat.errors import InvalidInput, Unavailable

ECHO = Fixed.of(select(cast(bindparam("it"), Text).label("it"), literal(1).label("one")))
WHO = Fixed.of(select(func.pg_backend_pid().label("pid"), func.pg_sleep(0.05).label("slept")))
WRONG = Fixed.of(select(cast(bindparam("it"), Integer).label("it")))


@pytest.fixture
async def reader(database_url: str) -> AsyncIterator[Reader]:
    reader = Reader(database_url, "tests", 3)
    yield reader
    await reader.close()


async def test_rows_have_the_names_of_their_columns(reader: Reader) -> None:
    [row] = await reader.rows(ECHO, {"it": "é'%"})
    assert (row.it, row.one) == ("é'%", 1)


async def test_many_share_a_few_connections(reader: Reader) -> None:
    rows = await asyncio.gather(*(reader.rows(WHO, {}) for _ in range(20)))
    assert 1 <= len({row.pid for [row] in rows}) <= 3


async def test_connections_that_break_are_replaced_and_nobody_notices(reader: Reader, engine: AsyncEngine) -> None:
    await asyncio.gather(*(reader.rows(WHO, {}) for _ in range(6)))
    async with engine.begin() as connection:
        killed = await connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'mlplat tests' AND pid <> pg_backend_pid()"
            )
        )
        assert sum(killed.scalars()) >= 1
    for number in range(10):
        [row] = await reader.rows(ECHO, {"it": str(number)})
        assert row.it == str(number)


async def test_a_value_that_postgres_cannot_take_is_refused_and_breaks_nothing(reader: Reader) -> None:
    for statement, value in ((ECHO, "a\0b"), (WRONG, "x")):
        with pytest.raises(InvalidInput):
            await reader.rows(statement, {"it": value})
    assert len(await reader.rows(ECHO, {"it": "fine"})) == 1


async def test_without_a_server_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlplat.db.reader.WAIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reader = Reader(f"postgresql+psycopg://nobody@127.0.0.1:{port}/nothing", "tests", 2)
    with pytest.raises(Unavailable, match="Postgres is away"):
        await reader.rows(ECHO, {"it": "x"})
    await reader.close()
