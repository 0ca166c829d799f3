"""Heartbeats: a run whose process is gone does not stay RUNNING for ever.

Contract: only runs that have sent a heartbeat are ever touched. All times are the database's. A run
that beats again after it was reaped (its network was cut, not its life) is RUNNING again. Beats and
reaping of one run take turns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from sqlalchemy import Select, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.lease import Lease, LeaseKeeper
from mlplat.db.tables import run, run_tag
from mlplat.errors import Fenced
from mlplat.tracking.model import REAPED_TAG, RunStatus

MAX_REAPED_AT_ONCE = 1_000
#: How often the reaper looks, as a part of the timeout.
LOOKS_PER_TIMEOUT = 6
_log = logging.getLogger(__name__)


class HeartbeatStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def beat(self, run_ids: Sequence[str]) -> Mapping[str, RunStatus]:
        """Notes that the processes of these runs live.

        Returns:
            The state of each run that there is; ended runs stay as they are, unless they were reaped.
        """
        revived = (
            select(run_tag.c.run_id)
            .join(run, run.c.run_id == run_tag.c.run_id)
            .where(run_tag.c.run_id.in_(run_ids), run_tag.c.key == REAPED_TAG, run.c.status == RunStatus.KILLED)
        )
        async with self._engine.begin() as connection:
            rows = (await connection.execute(_locked(run_ids))).all()
            statuses = {row.run_id: RunStatus(row.status) for row in rows}
            running = [run_id for run_id, status in statuses.items() if status is RunStatus.RUNNING]
            if len(running) < len(statuses):
                reaped = list((await connection.execute(revived)).scalars())
                if reaped:
                    await connection.execute(
                        delete(run_tag).where(run_tag.c.run_id.in_(reaped), run_tag.c.key == REAPED_TAG)
                    )
                    await connection.execute(
                        update(run).where(run.c.run_id.in_(reaped)).values(status=RunStatus.RUNNING, ended_at=None)
                    )
                    running += reaped
            if running:
                await connection.execute(
                    update(run).where(run.c.run_id.in_(running)).values(heartbeat_at=func.clock_timestamp())
                )
        return statuses | dict.fromkeys(running, RunStatus.RUNNING)

    async def reap(self, lease: Lease, timeout_s: float) -> list[str]:
        """Marks runs as KILLED whose last heartbeat is older than ``timeout_s``, and says so in a tag.

        A run's end is its last heartbeat. At most ``MAX_REAPED_AT_ONCE`` runs a call.

        Raises:
            Fenced: another leader reaps.
        """
        oldest = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, literal(timeout_s))
        silent = (
            select(run.c.run_id, run.c.heartbeat_at)
            .where(run.c.status == RunStatus.RUNNING, run.c.heartbeat_at < oldest)
            .order_by(run.c.run_id)
            .limit(MAX_REAPED_AT_ONCE)
            .with_for_update(skip_locked=True)  # somebody writes to it right now: it lives, or is seen next time
        )
        async with self._engine.begin() as connection:
            await lease.check(connection)
            rows = (await connection.execute(silent)).all()
            if not rows:
                return []
            run_ids = [row.run_id for row in rows]
            await connection.execute(
                update(run)
                .where(run.c.run_id.in_(run_ids))
                .values(status=RunStatus.KILLED, ended_at=run.c.heartbeat_at)
            )
            tags = upsert(run_tag).values(
                [
                    {
                        "run_id": row.run_id,
                        "key": REAPED_TAG,
                        "value": f"no heartbeat since {row.heartbeat_at:%F %T} UTC: its process is gone or cut off",
                    }
                    for row in rows
                ]
            )
            await connection.execute(
                tags.on_conflict_do_update(index_elements=["run_id", "key"], set_={"value": tags.excluded.value})
            )
        return run_ids


class Reaper:
    """Reaps for as long as its lease is held. Build it inside a running event loop, then ``start()``."""

    def __init__(self, store: HeartbeatStore, lease: LeaseKeeper, timeout_s: float) -> None:
        self._store = store
        self._lease = lease
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks for silent runs in the background, from one timeout after now on."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Stops looking."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        pause = self._timeout_s / LOOKS_PER_TIMEOUT
        while True:
            # While the platform was away nobody could beat: everybody gets a whole timeout after that.
            await asyncio.sleep(self._timeout_s)
            healthy_at = time.monotonic()
            with suppress(*CONNECTION_ERRORS):
                while time.monotonic() - healthy_at < self._timeout_s:
                    healthy_at = time.monotonic()
                    try:
                        reaped = await self._store.reap(self._lease.current, self._timeout_s)
                    except Fenced:
                        return  # the scheduler sees it too, and ends this process
                    if reaped:
                        _log.warning("no heartbeat for %g s: %s", self._timeout_s, ", ".join(reaped))
                    await asyncio.sleep(pause)


def _locked(run_ids: Sequence[str]) -> Select[tuple[str, str]]:
    """The runs' states, locked in one order so that two processes with the same runs do not wait for each other."""
    return select(run.c.run_id, run.c.status).where(run.c.run_id.in_(run_ids)).order_by(run.c.run_id).with_for_update()
