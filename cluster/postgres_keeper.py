"""Starts the embedded Postgres again when it dies. Ray does that for actors; Postgres is no actor."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path

from cluster.postgres import EmbeddedPostgres

_log = logging.getLogger(__name__)
POSTGRES_KEEPER = "postgres-keeper"
RETRY_S = 0.25


class PostgresKeeper:
    """A detached actor on the machine of the server. ``down`` ends it before it stops the server."""

    def __init__(self, state_dir: str) -> None:
        self._server = EmbeddedPostgres(Path(state_dir))
        self._restarts = 0
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def restarts(self) -> int:
        """How often it has started the server, since this process began."""
        return self._restarts

    async def _keep(self) -> None:
        while True:
            try:
                restarted = await self._one_life()
            except Exception as error:  # whatever it is, it must not leave the server without a keeper
                _log.warning("Postgres has died and does not start: %s", error)
                restarted = False
            if restarted:
                self._restarts += 1
                _log.warning("Postgres had died and was started again")
            else:
                await asyncio.sleep(RETRY_S)  # what the dead one left behind takes a moment to go

    async def _one_life(self) -> bool:
        """Waits for the server's end and starts the next; False when the dead one is still in the way."""
        before = await asyncio.to_thread(self._server.pid)
        if before is not None:
            await _end_of(before)
        await asyncio.to_thread(self._server.start)
        return await asyncio.to_thread(self._server.pid) not in {None, before}


async def _end_of(pid: int) -> None:
    """Returns when the process is gone; at once when it is already."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
