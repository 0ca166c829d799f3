"""How this project connects to Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, LiteralString

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row
from sqlalchemy import Engine, ExceptionContext, create_engine, event, make_url, text
from sqlalchemy.dialects.postgresql.psycopg import dialect
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 30_000
POOL_TIMEOUT_S = 10
#: A little more than the server's own patience: who says nothing for so long is gone, though nobody has hung up.
ANSWER_TIMEOUT_S = STATEMENT_TIMEOUT_MS / 1000 + 5

#: Errors that mean "Postgres is away or the connection broke": the same call may succeed later.
CONNECTION_ERRORS = (OperationalError, InterfaceError, PoolTimeoutError)
#: SQLSTATEs of a server that can be read and takes no writes: its disk is full, or so nearly full that it was told to.
DISK_FULL, READ_ONLY = "53100", "25006"
#: For the transaction of a search. A plan made for any values would not know how many rows these match; the sets of a
#: filter must fit in memory, else they are searched from front to end for every row.
SEARCH_SETTINGS = text(
    "SELECT set_config('plan_cache_mode', 'force_custom_plan', true), set_config('work_mem', '64MB', true)"
)


def connect_args(application: str) -> dict[str, object]:
    """How every connection is made; ``application`` shows in pg_stat_activity."""
    return {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "application_name": f"mlplat {application}",
        "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c timezone=UTC",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,  # milliseconds, for what was sent and never acknowledged
    }


def psycopg_arguments(url: str, application: str) -> dict[str, Any]:
    """What psycopg takes for a URL of SQLAlchemy's; see ``connect_args``."""
    _arguments, where = dialect().create_connect_args(make_url(url))  # type: ignore[no-untyped-call]  # SQLAlchemy's
    return {**where, **connect_args(application)}


class BoundedConnection(psycopg.AsyncConnection[Any]):
    """Gives up on a server that neither answers nor hangs up, such as one behind a network that went away."""

    answer_timeout_s = ANSWER_TIMEOUT_S

    async def wait(
        self,
        gen: PQGen[RV],
        interval: float = 0.1,
        timeout: float | None = None,  # noqa: ASYNC109 - psycopg's signature
    ) -> RV:
        """See psycopg.

        Raises:
            OperationalError: no answer; the connection is closed.
        """
        try:
            return await super().wait(gen, interval, self.answer_timeout_s if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()  # an answer that comes late would be taken for another statement's
            raise


def _connect_bounded(answer_timeout_s: float) -> Callable[..., Awaitable[BoundedConnection]]:
    async def connect(*args: Any, **options: Any) -> BoundedConnection:
        connection = await BoundedConnection.connect(*args, **options)
        connection.answer_timeout_s = answer_timeout_s
        return connection

    return connect


def open_engine(
    url: str, application: str, pool_size: int, *, answer_timeout_s: float = ANSWER_TIMEOUT_S
) -> AsyncEngine:
    """An async engine with bounded connections and timeouts; ``application`` shows in pg_stat_activity.

    No call waits for ever: a server that does not answer for ``answer_timeout_s`` counts as gone.
    """
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_S,
        pool_pre_ping=True,
        connect_args=connect_args(application) | {"async_creator_fn": _connect_bounded(answer_timeout_s)},
    )
    event.listen(engine.sync_engine, "handle_error", _refused_for_now)
    return engine


def _refused_for_now(context: ExceptionContext) -> None:
    """A refusal that has to do with the server, not with the statement, is one of ``CONNECTION_ERRORS``."""
    error = context.original_exception
    if getattr(error, "sqlstate", None) == READ_ONLY:
        raise OperationalError(context.statement, None, error) from error


def why_away(error: BaseException) -> str:
    """What one of ``CONNECTION_ERRORS`` means, for whoever has to try again."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    if state == DISK_FULL:
        return "Postgres' disk is full; retry when there is room"
    if state == READ_ONLY:
        return "Postgres takes no writes while its disk is nearly full; retry when there is room"
    return "Postgres is away; retry"


@asynccontextmanager
async def vital_transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A transaction that may write even while the disk is nearly full: a few bytes that keep the platform alive, or
    what frees space."""
    async with engine.begin() as connection:
        await connection.execute(text("SET TRANSACTION READ WRITE"))
        yield connection


class HeldConnection:
    """One connection in autocommit mode, kept between statements: taking one from the pool costs as much as a commit,
    and so do an ORM's layers, which these statements go without.

    For a single writer; not safe for concurrent use.

    Args:
        timeout_s: a statement that takes longer counts as a broken connection, whose outcome nobody knows.
    """

    def __init__(self, engine: AsyncEngine, timeout_s: float) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._timeout_s = timeout_s
        self._connection: AsyncConnection | None = None
        self._driver: psycopg.AsyncConnection[Any] | None = None

    async def execute(self, statement: LiteralString, values: Mapping[str, object]) -> Sequence[Any]:
        """The rows of a statement with psycopg's placeholders, as named tuples.

        Raises:
            OperationalError, InterfaceError: Postgres is away; whether the statement took effect is unknown.
            IntegrityError: it would break a constraint.
            psycopg.Error: Postgres refuses it for its own sake.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                driver = self._driver or await self._connect()
                cursor = driver.cursor(row_factory=namedtuple_row)
                await cursor.execute(statement, values, prepare=True)
                return await cursor.fetchall()
        except (TimeoutError, psycopg.OperationalError, psycopg.InterfaceError) as error:
            await self.close()
            raise OperationalError(statement, None, error) from error
        except psycopg.IntegrityError as error:
            await self.close()
            raise IntegrityError(statement, None, error) from error
        except psycopg.Error as error:
            await self.close()
            if error.sqlstate == READ_ONLY:
                raise OperationalError(statement, None, error) from error
            raise
        except BaseException:
            await self.close()
            raise

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        self._connection = await self._engine.connect()
        driver = (await self._connection.get_raw_connection()).driver_connection
        assert isinstance(driver, psycopg.AsyncConnection)
        self._driver = driver
        return driver

    async def close(self) -> None:
        """Gives the connection up; the next statement opens another one."""
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            with suppress(*CONNECTION_ERRORS):
                await connection.invalidate()
                await connection.close()


def open_sync_engine(url: str, application: str) -> Engine:
    """A blocking engine of one connection, for migrations and bring-up."""
    return create_engine(url, pool_size=1, max_overflow=0, connect_args=connect_args(application))


def is_serialization_failure(error: DBAPIError) -> bool:
    """True for SQLSTATE 40001 and 40P01: the transaction lost a race and may simply run again."""
    return getattr(error.orig, "sqlstate", None) in {"40001", "40P01"}


def is_unique_violation(error: DBAPIError) -> bool:
    """True for SQLSTATE 23505."""
    return getattr(error.orig, "sqlstate", None) == "23505"
