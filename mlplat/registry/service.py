"""What the registry coordinator does, apart from being an actor: the one writer of the registry.

Each request is one SERIALIZABLE transaction that pins the coordinator's epoch, applies its commands, all or none,
and appends each to the event log under the caller's request id. A repeated request finds its first answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from mlplat.db.engine import CONNECTION_ERRORS, is_serialization_failure, why_away
from mlplat.db.lease import LeaseKeeper
from mlplat.db.tables import registered_model, registry_change, registry_event
from mlplat.errors import Fenced, InvalidInput, Overloaded, Unavailable
from mlplat.registry.commands import apply
from mlplat.registry.history import Change
from mlplat.registry.model import NOBODY, Command, Origin

MAX_WAITING = 2_000
MAX_TRIES = 8


@dataclass(frozen=True)
class _Request:
    request_id: str
    commands: Sequence[Command]
    origin: Origin


class RegistryService:
    """One writer. Requests run one after another, in the order of arrival."""

    def __init__(self, engine: AsyncEngine, lease: LeaseKeeper) -> None:
        self._engine = engine
        self._lease = lease
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def start(self) -> None:
        """Waits for the coordinator's lease."""
        await self._lease.start()

    async def execute(
        self, request_id: str, commands: Sequence[Command], origin: Origin = NOBODY
    ) -> list[dict[str, Any]]:
        """Applies commands on one model, all or none, once, however often they are sent under the same ``request_id``.

        Returns:
            The answer of each, see ``commands.apply``.

        Raises:
            NotFound, AlreadyExists, InvalidInput, Conflict: a command does not fit the registry's state.
            Overloaded: too many requests are waiting.
            Unavailable: Postgres is away, or another coordinator took over.
        """
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} registry changes are waiting; retry in a second")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._with_retries(_Request(request_id, commands, origin))
        except Fenced:
            self._lease.lost.set()
            raise
        except CONNECTION_ERRORS as error:
            raise Unavailable(why_away(error)) from error
        finally:
            self._waiting -= 1

    def lag(self) -> str:
        """Requests waiting for their turn, for people."""
        return str(self._waiting)

    async def stop(self) -> None:
        """Gives the lease back."""
        await self._lease.stop()

    async def _with_retries(self, request: _Request) -> list[dict[str, Any]]:
        retries = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, DBAPIError) and is_serialization_failure(error)),
            wait=wait_random_exponential(multiplier=0.005, max=0.2),
            stop=stop_after_attempt(MAX_TRIES),
            reraise=True,
        )
        async for attempt in retries:
            with attempt:
                return await self._transact(request)
        raise AssertionError("tenacity re-raises the last error")

    async def _transact(self, request: _Request) -> list[dict[str, Any]]:
        held = self._lease.current
        async with self._engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="SERIALIZABLE")
            async with connection.begin():
                await held.check(connection)
                known = await _known_answers(connection, request)
                if known is not None:
                    return known
                answers = []
                for part, command in enumerate(request.commands):
                    model_id = await _model_id(connection, command.name)
                    applied = await apply(connection, command)
                    if model_id is None:
                        model_id = await _model_id(connection, command.name)
                    event = _event(request, part, command, applied.answer)
                    await _record(connection, {**event, "model_id": model_id, "epoch": held.epoch}, applied.changes)
                    answers.append(applied.answer)
        return answers


async def _known_answers(connection: AsyncConnection, request: _Request) -> list[dict[str, Any]] | None:
    """What the request was answered before; None if it is new."""
    query = (
        select(registry_event.c.kind, registry_event.c.command, registry_event.c.answer)
        .where(registry_event.c.request_id == request.request_id)
        .order_by(registry_event.c.part)
    )
    rows = (await connection.execute(query)).all()
    if not rows:
        return None
    asked = [(type(command).__name__, asdict(command)) for command in request.commands]
    if [(row.kind, row.command) for row in rows] != asked:
        raise InvalidInput(f"the idempotency key {request.request_id!r} was used for another request")
    return [dict(row.answer) for row in rows]


async def _model_id(connection: AsyncConnection, name: str) -> int | None:
    """What stays the same when a model is renamed, and is never used again: None if there is no such model."""
    query = select(registered_model.c.model_id).where(registered_model.c.name == name)
    return (await connection.execute(query)).scalar()


async def _record(connection: AsyncConnection, event: dict[str, Any], changes: Sequence[Change]) -> None:
    added = insert(registry_event).values(**event).returning(registry_event.c.event_id)
    event_id = (await connection.execute(added)).scalar_one()
    if changes:
        rows = [{"event_id": event_id, "model_id": event["model_id"], **asdict(change)} for change in changes]
        await connection.execute(insert(registry_change), rows)


def _event(request: _Request, part: int, command: Command, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "request_id": request.request_id,
        "part": part,
        "kind": type(command).__name__,
        "name": command.name,
        "command": asdict(command),
        "answer": answer,
        "user_id": request.origin.user_id,
        "reason": request.origin.reason,
    }
