"""Who may remove things for good: one at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from sqlalchemy import func, select
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.errors import Overloaded

#: Key of the advisory lock, in Postgres, of whatever removes points or artifacts that rows may refer to. A backup holds
#: it, too: what its rows refer to must still be there when it comes to the artifacts.
REMOVALS = 0x70757267


@asynccontextmanager
async def removing(engine: AsyncEngine) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Nobody else removes anything during the block, and no backup is taken. A crash ends it.

    The lock belongs to a session without a transaction: servers end transactions that idle for long. When the session
    breaks, the lock is gone: what is yielded raises then, one of ``CONNECTION_ERRORS``.

    Raises:
        Overloaded: somebody else is at it.
    """
    async with engine.connect() as pooled:
        connection = await pooled.execution_options(isolation_level="AUTOCOMMIT")
        if not (await connection.execute(select(func.pg_try_advisory_lock(REMOVALS)))).scalar_one():
            raise Overloaded("a purge, a collection or a backup is under way; retry when it is done")

        async def require_held() -> None:
            await connection.execute(select(1))

        try:
            yield require_held
        finally:
            try:
                await connection.execute(select(func.pg_advisory_unlock(REMOVALS)))
            except (PendingRollbackError, *CONNECTION_ERRORS):  # the session is gone, or goes now; so is the lock
                await connection.invalidate()
