"""Durable attempts that nobody waits for any more, such as those of a run that was ended by another executor."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.tables import attempt, pipeline_run
from mlplat.errors import PlatformError
from mlplat.pipelines.model import AttemptState
from mlplat.pipelines.store import IS_OPEN

EVERY_S = 10.0
_OPEN = (AttemptState.QUEUED, AttemptState.RUNNING)
#: As far as Postgres counts attempts.
MAX_ATTEMPT = 2**15 - 1
_LABEL = re.compile(r"([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,64})/(-1|\d{1,9})/(\d{1,5})", re.ASCII)
_log = logging.getLogger(__name__)
_Key = tuple[str, str, int, int]


class DurableProcesses(Protocol):
    """The processes of durable attempts, by label."""

    async def labels(self) -> Sequence[str]:
        """Those that there are."""
        ...

    def kill(self, label: str) -> None:
        """Ends one."""
        ...


class LeftoverReaper:
    """Ends processes whose attempt is over, or was never written. For the leading scheduler.

    An attempt's row is durable before its process begins, so a process without an open attempt is no newcomer.
    """

    def __init__(self, engine: AsyncEngine, processes: DurableProcesses) -> None:
        self._engine = engine
        self._processes = processes
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks every ``EVERY_S`` in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Looks no more."""
        if self._task is not None:
            self._task.cancel()

    async def reap(self) -> list[str]:
        """Looks once; the labels of the processes that were ended."""
        keys = {label: key for label in await self._processes.labels() if (key := _key(label)) is not None}
        wanted = await self._find_open(list(keys.values())) if keys else set()
        leftovers = [label for label, key in keys.items() if key not in wanted]
        for label in leftovers:
            _log.warning("ending the process of attempt %s, which is over", label)
            self._processes.kill(label)
        return leftovers

    async def _run(self) -> None:
        while True:
            try:
                await self.reap()
            except (PlatformError, *CONNECTION_ERRORS) as error:
                _log.warning("leftover attempts: %s", error)
            except Exception:  # a look that fails must not be the last one
                _log.exception("leftover attempts")
            await asyncio.sleep(EVERY_S)

    async def _find_open(self, keys: Sequence[_Key]) -> set[_Key]:
        query = (
            select(attempt.c.run_id, attempt.c.step, attempt.c.item, attempt.c.attempt)
            .join(pipeline_run, pipeline_run.c.run_id == attempt.c.run_id)
            .where(
                tuple_(attempt.c.run_id, attempt.c.step, attempt.c.item, attempt.c.attempt).in_(keys),
                attempt.c.state.in_(_OPEN),
                IS_OPEN,
            )
        )
        async with self._engine.connect() as connection:
            return {(run_id, step, item, number) for run_id, step, item, number in await connection.execute(query)}


def _key(label: str) -> _Key | None:
    """The attempt's key; None for a name that somebody else has given."""
    found = _LABEL.fullmatch(label)
    if found is None or int(found[4]) > MAX_ATTEMPT:
        return None
    return found[1], found[2], int(found[3]), int(found[4])
