"""Starts the embedded Postgres again when it dies, and keeps it from dying of a full disk.

Ray starts actors again; Postgres is no actor. A server that finds no room for its own log ends itself, and with it all
reads: so writes end a little earlier, and begin again when there is room.
"""

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
WATCH_S = 0.25
#: With less room than the first, the server takes no more writes; with more than the second it does again. Between two
#: looks nobody writes as much as the first, and what still may write gets by with it for days.
MIN_FREE_BYTES, ENOUGH_FREE_BYTES = 128 * 1024 * 1024, 192 * 1024 * 1024


class PostgresKeeper:
    """A detached actor on the machine of the server. ``down`` ends it before it stops the server."""

    def __init__(self, state_dir: str) -> None:
        self._server = EmbeddedPostgres(Path(state_dir))
        self._restarts = 0
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep()), loop.create_task(self._watch_disk())]

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

    async def _watch_disk(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._guard)
            except Exception as error:  # the next look may see more
                _log.warning("cannot see to the disk of Postgres: %s", error)
            await asyncio.sleep(WATCH_S)

    def _guard(self) -> None:
        free, allowed = self._server.free_bytes(), self._server.takes_writes
        allow = may_write(free, allowed)
        if allow != allowed:
            self._server.allow_writes(allow)
            _log.warning("Postgres takes %s writes: %d MiB are free", "all" if allow else "no", free >> 20)

    async def _one_life(self) -> bool:
        """Waits for the server's end and starts the next; False when the dead one is still in the way."""
        before = await asyncio.to_thread(self._server.pid)
        if before is not None:
            await _end_of(before)
        await asyncio.to_thread(self._server.start)
        return await asyncio.to_thread(self._server.pid) not in {None, before}


def may_write(free_bytes: int, allowed: bool) -> bool:
    """Whether the server may write with so much room, if it may or may not now."""
    return free_bytes >= (MIN_FREE_BYTES if allowed else ENOUGH_FREE_BYTES)


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
