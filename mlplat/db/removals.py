"""Who may remove things for good: one at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import Overloaded

#: Key of the advisory lock, in Postgres, of whatever removes points or artifacts that rows may refer to. A backup holds
#: it, too: what its rows refer to must still be there when it comes to the artifacts.
REMOVALS = 0x70757267


@asynccontextmanager
async def removing(engine: AsyncEngine) -> AsyncIterator[None]:
    """Nobody else removes anything during the block, and no backup is taken. A crash ends it.

    The lock belongs to a session without a transaction: servers end transactions that idle for long.

    Raises:
        Overloaded: somebody else is at it.
    """
    async with engine.connect() as pooled:
        connection = await pooled.execution_options(isolation_level="AUTOCOMMIT")
        if not (await connection.execute(select(func.pg_try_advisory_lock(REMOVALS)))).scalar_one():
            raise Overloaded("a purge, a collection or a backup is under way; retry when it is done")
        try:
            yield
        finally:
            await connection.execute(select(func.pg_advisory_unlock(REMOVALS)))
