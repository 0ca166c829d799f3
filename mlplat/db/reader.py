"""Single statements that read, without what transactions and an ORM's layers cost: a third of the CPU time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests
from sqlalchemy import Executable, Select
from sqlalchemy.dialects.postgresql.psycopg import dialect

from mlplat.db.engine import BoundedConnection, psycopg_arguments
from mlplat.errors import InvalidInput, Unavailable

#: Postgres comes back within seconds; callers outwait it.
WAIT_S = 5.0
MAX_WAITING = 2_000
_DIALECT = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects have no types


@dataclass(frozen=True, eq=False)
class Fixed:
    """A statement whose text never changes, with named parameters."""

    query: Executable
    sql: str
    #: Values that are always the same.
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, query: Select[*tuple[Any, ...]]) -> Fixed:
        """Writes the statement down."""
        compiled = query.compile(dialect=_DIALECT)
        return cls(query, str(compiled), {key: value for key, value in compiled.params.items() if value is not None})


class Reader:
    """A few connections in autocommit mode, opened when they are first needed. Each statement sees what is committed.

    Its statements find a few rows by their keys, whatever the planner thinks of tables that are still small.

    A connection that turns out to be broken is replaced, and the statement sent again: it only reads.
    """

    def __init__(self, url: str, application: str, pool_size: int) -> None:
        self._connect = {**psycopg_arguments(url, application), "autocommit": True, "row_factory": namedtuple_row}
        self._pool_size = pool_size
        self._pool: AsyncConnectionPool[BoundedConnection] | None = None
        self._opening = asyncio.Lock()

    async def rows(self, statement: Fixed, parameters: Mapping[str, Any]) -> Sequence[Any]:
        """The statement's rows, as named tuples.

        Raises:
            Unavailable: Postgres is away.
            InvalidInput: a value that Postgres cannot take.
        """
        pool = self._pool or await self._open()
        try:
            try:
                return await _execute(pool, statement, parameters)
            except psycopg.OperationalError:
                await pool.check()  # what broke one connection broke the others, too
                return await _execute(pool, statement, parameters)
        except psycopg.DataError as error:
            raise InvalidInput(f"Invalid value: {str(error).splitlines()[0]}") from error
        except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, TooManyRequests) as error:
            raise Unavailable("Postgres is away; retry") from error

    async def close(self) -> None:
        """Closes the connections."""
        if self._pool is not None:
            await self._pool.close()

    async def _open(self) -> AsyncConnectionPool[BoundedConnection]:
        async with self._opening:
            if self._pool is None:
                pool = AsyncConnectionPool(
                    kwargs=self._connect, connection_class=BoundedConnection, min_size=1, max_size=self._pool_size,
                    max_waiting=MAX_WAITING, timeout=WAIT_S, configure=_look_up, open=False,
                )  # fmt: skip
                await pool.open()
                self._pool = pool
            return self._pool


async def _look_up(connection: BoundedConnection) -> None:
    await connection.execute("SET enable_hashjoin = off")
    await connection.execute("SET enable_mergejoin = off")


async def _execute(
    pool: AsyncConnectionPool[BoundedConnection], statement: Fixed, parameters: Mapping[str, Any]
) -> Sequence[Any]:
    async with pool.connection() as connection:
        cursor = await connection.execute(statement.sql, {**statement.constants, **parameters}, prepare=True)
        return await cursor.fetchall()
