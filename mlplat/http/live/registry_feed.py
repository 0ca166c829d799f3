"""The registry's events for all who watch them: one reader of Postgres per process, and only while somebody watches."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.snapshots import Snapshot
from mlplat.errors import Unavailable
from mlplat.events.log import EventLog
from mlplat.events.model import Cursor, EventFilter, RegistryEvent
from mlplat.http.live.hub import FAILED_PAUSE_S, POLL_S, Hub
from mlplat.http.live.stream import HEARTBEAT_S
from mlplat.http.live.wire import HEARTBEAT, OPENING

#: Bytes of events that are kept for those who are slow; who is slower asks the database.
KEPT_BYTES = 1024 * 1024
FIRST_LOOK_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """An event, ready to be sent, and where a client is who has got it."""

    event: RegistryEvent
    cursor: Cursor
    body: bytes

    @classmethod
    def of(cls, event: RegistryEvent, cursor: Cursor) -> Told:
        """The event as a Server-Sent Event."""
        body = msgspec.json.encode(event.body)
        return cls(event, cursor, b"id: %s\ndata: %s\n\n" % (str(cursor).encode(), body))


class RegistryFeed:
    """What happens in the registry. It keeps the last events, and no list of who needs them: each watcher asks for what
    follows the number that it has reached. For one event loop.

    Args:
        hub: counts the streams of this process.
        pause: waits for so many seconds between two looks, or until somebody joins.
    """

    def __init__(self, log: EventLog, hub: Hub, pause: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self.log = log
        self.hub = hub
        #: Set, and replaced, when there is something new. Take it before looking, wait for it afterwards.
        self.news = asyncio.Event()
        #: All that is committed and was read; the number of the first event that is kept, and of the next one.
        self.seen: Snapshot | None = None
        self.first = self.end = 0
        self._pause = pause
        self._kept: deque[Told] = deque()
        self._bytes = 0
        self._watchers = 0
        self._begun = self._done = 0
        self._joined, self._looked = asyncio.Event(), asyncio.Event()
        self._is_stale = True
        #: A look that outlives its task, because the last watcher went away, comes before the next one.
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> Snapshot:
        """Begins to watch, for somebody who ``leave``s again; returns what is committed now.

        Raises:
            Overloaded: too many watch already.
            Unavailable: Postgres is away.
        """
        self.hub.take_slot()
        self._watchers += 1
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.get_running_loop().create_task(self._run())
            return await self._look_of_its_own()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """One watcher less; without any nobody looks."""
        self.hub.free_slot()
        self._watchers -= 1
        if not self._watchers:
            self.close()

    def close(self) -> None:
        """Looks no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._is_stale = True

    def get(self, number: int) -> Told | None:
        """An event that is kept."""
        return self._kept[number - self.first] if self.first <= number < self.end else None

    async def look(self) -> None:
        """Reads what is new."""
        async with self._turn:
            before = self.end
            if self._is_stale:
                self._is_stale, self.first, self._bytes = False, self.end, 0
                self._kept.clear()
                self.seen = await self.log.now()
            while True:
                assert self.seen is not None, "it was read when the feed was stale"
                page = await self.log.read(Cursor(self.seen))
                for event, cursor in zip(page.events, page.cursors, strict=True):
                    self._keep(Told.of(event, cursor))
                self.seen = page.end.seen
                if page.is_last:
                    break
            if self.end > before:
                self.news.set()
                self.news = asyncio.Event()

    def _keep(self, told: Told) -> None:
        self._kept.append(told)
        self._bytes += len(told.body)
        self.end += 1
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= len(self._kept.popleft().body)
            self.first += 1

    async def _look_of_its_own(self) -> Snapshot:
        """A look that begins after this: its snapshot has all that any client could have seen elsewhere."""
        wanted = self._begun + 1
        self._joined.set()
        try:
            async with asyncio.timeout(FIRST_LOOK_TIMEOUT_S):
                while self._done < wanted or self.seen is None:
                    await self._looked.wait()
        except TimeoutError as error:
            raise Unavailable("the registry's events cannot be read now; retry") from error
        return self.seen

    async def _run(self) -> None:
        while True:
            self._joined.clear()
            self._begun += 1
            pause_s = FAILED_PAUSE_S
            try:
                await self.hub.ask(self.look())
                self._done = self._begun
                pause_s = POLL_S
            except CONNECTION_ERRORS as error:
                _log.warning("the registry's events: %s", error)
            except Exception:  # a defect must not end everybody's stream
                _log.exception("the registry's events")
            self._looked.set()
            self._looked = asyncio.Event()
            await self._until_next(pause_s)

    async def _until_next(self, pause_s: float) -> None:
        waits = [asyncio.ensure_future(self._pause(pause_s)), asyncio.ensure_future(self._joined.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class RegistryWatcher:
    """What one client has seen of the registry. It has joined the feed already.

    Args:
        after: where it was; None: it wants what happens from now on.
    """

    def __init__(self, feed: RegistryFeed, now: Snapshot, wanted: EventFilter, after: Cursor | None) -> None:
        self._feed = feed
        self._wanted = wanted
        self._cursor = after or Cursor(now)
        #: The next event of the feed; before the first one that is kept: the database has to be asked.
        self._number = -1

    async def events(self, lasts_s: float | None) -> AsyncGenerator[bytes, None]:
        """Events for ever, or until ``lasts_s`` have passed.

        It ends when Postgres is away: the client comes back with its cursor.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + lasts_s if lasts_s is not None else math.inf
        with suppress(*CONNECTION_ERRORS):
            yield OPENING
            while True:
                async for body in self._new():
                    yield body
                # Without it, a client of rare events would have to read all others again when it comes back.
                yield b"id: %s\n" % str(self._cursor).encode() + HEARTBEAT
                heartbeat_at = loop.time() + HEARTBEAT_S
                while await self._has_news(min(heartbeat_at, ends_at)):
                    async for body in self._new():
                        yield body
                if loop.time() >= ends_at:
                    return

    async def _has_news(self, until: float) -> bool:
        """Waits for something new; False: it took too long."""
        try:
            async with asyncio.timeout_at(until):
                while self._number == self._feed.end:
                    await self._feed.news.wait()
        except TimeoutError:
            return False
        return True

    async def _new(self) -> AsyncIterator[bytes]:
        if self._number < self._feed.first:
            async for told in self._catch_up():
                if self._wanted.accepts(told.event):
                    yield told.body
        while (found := self._feed.get(self._number)) is not None:
            self._number, self._cursor = self._number + 1, found.cursor
            if self._wanted.accepts(found.event):
                yield found.body
        if self._number == self._feed.end and self._feed.seen is not None:
            self._cursor = Cursor(self._feed.seen)

    async def _catch_up(self) -> AsyncIterator[Told]:
        """From the database, for a client that comes back or has become too slow: up to where the feed is."""
        until, number = self._feed.seen, self._feed.end
        assert until is not None, "somebody watches"
        while self._cursor != Cursor(until):
            page = await self._feed.hub.ask(self._feed.log.read(self._cursor, until=until))
            for event, cursor in zip(page.events, page.cursors, strict=True):
                self._cursor = cursor
                yield Told.of(event, cursor)
            self._cursor = page.end
            if page.is_last:
                break
        self._number = number
