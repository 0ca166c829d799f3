"""Durable attempts that nobody waits for any more, such as those of a run that was ended by another executor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.tables import attempt, pipeline_run
from mlplat.errors import PlatformError
from mlplat.pipelines.model import AttemptState, attempt_label
from mlplat.pipelines.store import IS_OPEN

EVERY_S = 10.0
_OPEN = (AttemptState.QUEUED, AttemptState.RUNNING)
_log = logging.getLogger(__name__)


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
        labels = list(await self._processes.labels())
        wanted = await self._open_labels(labels) if labels else set()
        leftovers = [label for label in labels if label not in wanted]
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
            await asyncio.sleep(EVERY_S)

    async def _open_labels(self, labels: Sequence[str]) -> set[str]:
        keys = [
            (run_id, step, int(item), int(number))
            for run_id, step, item, number in (label.rsplit("/", 3) for label in labels)
        ]
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
            return {attempt_label(*row) for row in await connection.execute(query)}
