"""What the registry coordinator does, apart from being an actor: the one writer of the registry.

Each request is one SERIALIZABLE transaction that pins the coordinator's epoch, applies its commands, all or none,
and appends each to the event log under the caller's request id. A repeated request finds its first answers. What is
refused changes nothing, and is noted in a transaction of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from mlplat.db.engine import CONNECTION_ERRORS, is_serialization_failure, why_away
from mlplat.db.lease import Lease, LeaseKeeper
from mlplat.errors import (
    Conflict,
    Fenced,
    InvalidInput,
    NotFound,
    Overloaded,
    PermissionDenied,
    PlatformError,
    Unavailable,
)
from mlplat.metrics.curves import Query
from mlplat.registry.commands import Applied, apply
from mlplat.registry.model import NOBODY, Command, Origin
from mlplat.registry.policy import Measured
from mlplat.registry.record import known_answers, record
from mlplat.registry.refusals import note_refusal
from mlplat.registry.turn import MetricsNeeded, Turn, open_turn
from mlplat.tracking.metric_summaries import read_last_values

MAX_WAITING = 2_000
MAX_TRIES = 8
#: Aliases that gates compare with may move while the metrics of their versions are read.
MAX_READS = 5
#: What somebody did who asked for what cannot be. That somebody else was faster to take a name is no such thing.
_NOTED = (InvalidInput, PermissionDenied, Conflict, NotFound)


@dataclass(frozen=True)
class _Request:
    request_id: str
    commands: Sequence[Command]
    origin: Origin


class RegistryService:
    """One writer. Requests run one after another, in the order of arrival."""

    def __init__(self, engine: AsyncEngine, lease: LeaseKeeper, query: Query) -> None:
        """``query`` reads the metric store, for the gates of policies."""
        self._engine = engine
        self._lease = lease
        self._query = query
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
            PermissionDenied: the model's policy does not allow it.
            Overloaded: too many requests are waiting.
            Unavailable: Postgres or the metric store is away, or another coordinator took over.
        """
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} registry changes are waiting; retry in a second")
        self._waiting += 1
        try:
            return await self._measure_and_transact(_Request(request_id, commands, origin))
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

    async def _measure_and_transact(self, request: _Request) -> list[dict[str, Any]]:
        measured: Measured = {}
        for _read in range(MAX_READS):
            try:
                async with self._turn:
                    return await self._noting_refusals(request, measured)
            except MetricsNeeded as needed:  # read while others have their turn
                measured = {**measured, **await read_last_values(self._query, needed.run_ids)}
        raise Unavailable("the aliases that the policy's gates compare with moved too often meanwhile; retry")

    async def _noting_refusals(self, request: _Request, measured: Measured) -> list[dict[str, Any]]:
        try:
            return await self._with_retries(request, measured)
        except _NOTED as error:
            await self._note(request, error)
            raise

    async def _note(self, request: _Request, error: PlatformError) -> None:
        held = self._lease.current
        async with self._engine.begin() as connection:
            await held.check(connection)
            await note_refusal(connection, request.request_id, request.commands, request.origin, error)

    async def _with_retries(self, request: _Request, measured: Measured) -> list[dict[str, Any]]:
        retries = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, DBAPIError) and is_serialization_failure(error)),
            wait=wait_random_exponential(multiplier=0.005, max=0.2),
            stop=stop_after_attempt(MAX_TRIES),
            reraise=True,
        )
        async for attempt in retries:
            with attempt:
                return await self._transact(request, measured)
        raise AssertionError("tenacity re-raises the last error")

    async def _transact(self, request: _Request, measured: Measured) -> list[dict[str, Any]]:
        held = self._lease.current
        async with self._engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="SERIALIZABLE")
            async with connection.begin():
                await held.check(connection)
                known = await known_answers(connection, request.request_id, request.commands)
                if known is not None:
                    return known
                answers = []
                for part, command in enumerate(request.commands):
                    turn = await open_turn(connection, command.name, request.origin, measured)
                    answers.append(await _execute(turn, held, request.request_id, part, command))
        return answers


async def _execute(turn: Turn, held: Lease, request_id: str, part: int, command: Command) -> dict[str, Any]:
    applied = await apply(turn, command)
    await _record(turn, held, request_id, part, command, applied)
    if applied.then is not None:
        # As if it had been asked for directly: who reads the log need not know of approvals. Before all parts.
        move = replace(turn, origin=applied.then.origin, approved=True)
        made = await apply(move, applied.then.command)
        await _record(move, held, request_id, -1 - part, applied.then.command, made)
    return applied.answer or {}


async def _record(turn: Turn, held: Lease, request_id: str, part: int, command: Command, applied: Applied) -> None:
    model_id = turn.model_id
    if model_id is None:  # the command has just created it
        model_id = (await open_turn(turn.connection, command.name, turn.origin, {})).model_id
    event = {
        "request_id": request_id, "part": part, "kind": type(command).__name__, "name": command.name,
        "model_id": model_id, "command": asdict(command), "answer": applied.answer or {},
        "user_id": turn.origin.user_id, "reason": turn.origin.reason, "epoch": held.epoch,
    }  # fmt: skip
    await record(turn.connection, event, applied.changes)
