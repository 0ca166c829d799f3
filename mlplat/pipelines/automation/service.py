"""The part of the leading scheduler that starts runs by itself.

It decides first, durably, and acts then: a decision is a firing in the database, committed together with the
schedule's next fire time or with the position in the events. Whoever leads afterwards finds the firing PENDING and
submits its run under the firing's own idempotency key, so each firing gives one run, whoever dies when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from functools import partial

from sqlalchemy import ColumnElement
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.lease import LeaseKeeper
from mlplat.db.looking import look_forever, prune_forever
from mlplat.errors import Fenced, InvalidInput, Overloaded, PlatformError, Unavailable
from mlplat.pipelines.automation.decisions import decide_all, fire_times
from mlplat.pipelines.automation.firings import Firing, FiringState, Recorded
from mlplat.pipelines.automation.leader import Advance, LeaderStore
from mlplat.pipelines.automation.triggers import Kind
from mlplat.pipelines.model import Submission
from mlplat.pipelines.parsing import ParsedSpec, SpecCache
from mlplat.pipelines.spec import PipelineSpec

#: Between two looks, if no fire time comes before that: with triggers, and without.
LOOK_S = 0.5
IDLE_LOOK_S = 5.0
SCHEDULES_AT_ONCE = 100
MAX_UNDERWAY = 50
#: A submission that finds something away is tried again so often: for a quarter of an hour.
MAX_TRIES = 20
MAX_DELAY_S = 60.0
PRUNE_S = 3_600.0
KNOWN_DEFINITIONS = 500
_log = logging.getLogger(__name__)

#: Submits a run and returns its id; see ``SchedulerService.submit``.
Submit = Callable[[Submission], Awaitable[str]]


class Automation:
    """Fires schedules and triggers for as long as the lease is held. Build it inside a running event loop.

    Args:
        clock: SQL for the time that it is; the database's.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        lease: LeaseKeeper,
        submit: Submit,
        clock: ColumnElement[datetime] | None = None,
    ) -> None:
        self._store = LeaderStore(engine, lease, clock)
        self._lease = lease
        self._submit = submit
        self._specs = SpecCache()
        self._definitions: dict[str, bytes] = {}
        self._underway: dict[int, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Works in the background."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [
                loop.create_task(look_forever(self.look, self._wake, self._lease, "schedules and triggers", LOOK_S)),
                loop.create_task(prune_forever(self._store.prune, PRUNE_S)),
            ]

    def wake(self) -> None:
        """Schedules, triggers or firings have changed: looks now."""
        self._wake.set()

    async def stop(self) -> None:
        """Ends; what is underway is found by whoever leads next."""
        tasks = [*self._tasks, *self._underway.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> float:
        """Decides what is to be decided, begins to submit what was, and returns the seconds until the next look.

        Raises:
            Fenced: another scheduler leads.
        """
        found = await self._store.look()
        is_due = found.next_at is not None and found.next_at <= found.now
        if is_due:
            await self._fire_schedules(found.now)
        for kind in sorted(found.kinds):
            await self._fire_triggers(kind)
        await self._submit_pending(found.now)
        if is_due:
            return 0.0  # for the fire times that come next
        soon = [moment for moment in (found.next_at, found.retry_at) if moment is not None and moment > found.now]
        waits = [(moment - found.now).total_seconds() for moment in soon]
        return min([*waits, LOOK_S if found.kinds else IDLE_LOOK_S])

    async def settle(self) -> None:
        """Returns when every submission that has begun is over."""
        while self._underway:
            await asyncio.wait(self._underway.values())
            await asyncio.sleep(0)

    async def _fire_schedules(self, now: datetime) -> None:
        while True:
            schedules, definitions = await self._store.find_due(now, SCHEDULES_AT_ONCE)
            self._remember(definitions.items())
            advances = []
            for schedule in schedules:
                firings, next_at = fire_times(schedule, now, self._spec)
                advances.append(Advance(schedule, next_at, firings))
            if advances:
                await self._store.advance(advances)
            if len(schedules) < SCHEDULES_AT_ONCE:
                return

    async def _fire_triggers(self, kind: Kind) -> None:
        while (page := await self._store.read(kind)) is not None:
            self._remember(page.definitions.items())
            sources = [trigger.source for trigger in page.triggers]
            recent = await self._store.count_recent(sources)
            firings = decide_all(page.triggers, page.events, page.lineages, recent, self._spec)
            await self._store.record(kind, page.after, firings)
            if page.is_last:
                return

    async def _submit_pending(self, now: datetime) -> None:
        room = MAX_UNDERWAY - len(self._underway)
        if room <= 0:
            return
        for item in await self._store.find_pending(now, list(self._underway), room):
            task = asyncio.get_running_loop().create_task(self._submit_one(item))
            self._underway[item.firing_id] = task
            task.add_done_callback(partial(self._is_over, item.firing_id))

    def _is_over(self, firing_id: int, _task: asyncio.Task[None]) -> None:
        was_full = len(self._underway) >= MAX_UNDERWAY
        del self._underway[firing_id]
        if was_full:
            self.wake()

    async def _submit_one(self, item: Recorded) -> None:
        try:
            await self._try_to_submit(item)
        except Fenced:
            self._lease.lost.set()
        except (PlatformError, *CONNECTION_ERRORS) as error:  # it is still PENDING, and tried again at the next look
            _log.warning("%s: %s", item.firing.key, error)

    async def _try_to_submit(self, item: Recorded) -> None:
        try:
            parsed = await self._parsed(item.firing)
        except InvalidInput as error:
            await self._store.finish(item, FiringState.FAILED, None, str(error))
            return
        try:
            run_id = await self._submit(_submission(item.firing, parsed))
        except Fenced:
            raise
        except (Overloaded, Unavailable) as error:
            await self._give_way(item, parsed.spec, error)
        except PlatformError as error:
            await self._store.finish(item, FiringState.FAILED, None, str(error))
        else:
            await self._store.finish(item, FiringState.SUBMITTED, run_id)

    async def _give_way(self, item: Recorded, spec: PipelineSpec, error: PlatformError) -> None:
        """Something is away, or there are too many runs: later, unless the pipeline says that it would rather not."""
        if isinstance(error, Overloaded) and spec.concurrency is not None and spec.concurrency.when_full == "reject":
            await self._store.finish(item, FiringState.SKIPPED, None, str(error))
        elif item.tries + 1 >= MAX_TRIES:
            await self._store.finish(item, FiringState.FAILED, None, f"given up after {MAX_TRIES} tries: {error}")
        else:
            await self._store.postpone(item, min(2.0**item.tries, MAX_DELAY_S), str(error))

    def _remember(self, definitions: Iterable[tuple[str, bytes]]) -> None:
        if len(self._definitions) > KNOWN_DEFINITIONS:
            self._definitions.clear()
        self._definitions.update(definitions)

    def _spec(self, digest: str) -> PipelineSpec:
        return self._specs.get(self._definitions[digest]).spec

    async def _parsed(self, firing: Firing) -> ParsedSpec:
        assert firing.digest is not None, "only firings without a run have no definition"
        if firing.digest not in self._definitions:
            self._remember([(firing.digest, await self._store.find_definition(firing.digest))])
        return self._specs.get(self._definitions[firing.digest])


def _submission(firing: Firing, parsed: ParsedSpec) -> Submission:
    return Submission(bytes(parsed.raw), firing.params or {}, firing.key, firing.submitted_by, source=firing.source)
