"""What the registry coordinator does, apart from being an actor: the one writer of the registry.

Each mutation is one SERIALIZABLE transaction that pins the coordinator's epoch, applies the command
and appends to the event log under the caller's request id. A repeated request finds its first answer.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from mlplat.db.engine import CONNECTION_ERRORS, is_serialization_failure, why_away
from mlplat.db.lease import LeaseKeeper
from mlplat.db.tables import registry_event
from mlplat.errors import Fenced, InvalidInput, Overloaded, Unavailable
from mlplat.registry.commands import apply
from mlplat.registry.model import Command

MAX_WAITING = 2_000
MAX_TRIES = 8


class RegistryService:
    """One writer. Commands run one after another, in the order of arrival."""

    def __init__(self, engine: AsyncEngine, lease: LeaseKeeper) -> None:
        self._engine = engine
        self._lease = lease
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def start(self) -> None:
        """Waits for the coordinator's lease."""
        await self._lease.start()

    async def execute(self, request_id: str, command: Command) -> dict[str, Any]:
        """Applies a command once, however often it is sent under the same ``request_id``.

        Raises:
            NotFound, AlreadyExists, InvalidInput: the command does not fit the registry's state.
            Overloaded: too many commands are waiting.
            Unavailable: Postgres is away, or another coordinator took over.
        """
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} registry changes are waiting; retry in a second")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._with_retries(request_id, command)
        except Fenced:
            self._lease.lost.set()
            raise
        except CONNECTION_ERRORS as error:
            raise Unavailable(why_away(error)) from error
        finally:
            self._waiting -= 1

    def lag(self) -> str:
        """Commands waiting for their turn, for people."""
        return str(self._waiting)

    async def stop(self) -> None:
        """Gives the lease back."""
        await self._lease.stop()

    async def _with_retries(self, request_id: str, command: Command) -> dict[str, Any]:
        retries = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, DBAPIError) and is_serialization_failure(error)),
            wait=wait_random_exponential(multiplier=0.005, max=0.2),
            stop=stop_after_attempt(MAX_TRIES),
            reraise=True,
        )
        async for attempt in retries:
            with attempt:
                return await self._transact(request_id, command)
        raise AssertionError("tenacity re-raises the last error")

    async def _transact(self, request_id: str, command: Command) -> dict[str, Any]:
        held = self._lease.current
        async with self._engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="SERIALIZABLE")
            async with connection.begin():
                await held.check(connection)
                earlier = select(registry_event.c.kind, registry_event.c.command, registry_event.c.answer)
                known = (await connection.execute(earlier.where(registry_event.c.request_id == request_id))).first()
                if known is not None:
                    if (known.kind, known.command) != (type(command).__name__, asdict(command)):
                        raise InvalidInput(f"the idempotency key {request_id!r} was used for another request")
                    return dict(known.answer)
                answer = await apply(connection, command)
                await connection.execute(
                    insert(registry_event).values(
                        request_id=request_id,
                        kind=type(command).__name__,
                        name=command.name,
                        command=asdict(command),
                        answer=answer,
                        epoch=held.epoch,
                    )
                )
        return answer
