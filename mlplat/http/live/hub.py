"""One watcher of Postgres per process, for all runs that somebody watches, and only while somebody does."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from mlplat.artifacts.store import ArtifactStore
from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.errors import Overloaded
from mlplat.http.live.tails import Tails
from mlplat.http.live.wire import change_message, run_fields
from mlplat.pipelines.model import PipelineRun, RunSnapshot
from mlplat.pipelines.store import PipelineStore

POLL_S = 0.25
LOG_POLL_S = 0.35
FAILED_PAUSE_S = 1.0
#: Streams of one process: each holds one of the requests that it may have under way.
MAX_STREAMS = 200
#: Bytes of changes that are kept for those who are slow; who is slower asks the database.
KEPT_BYTES = 1024 * 1024
MAX_OPEN_ATTEMPTS = 10_000
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """What changed between two transitions, ready to be sent."""

    after: int
    seq: int
    body: bytes


class Feed:
    """What happens to one run, for all who watch it. It keeps the last changes, and no list of who needs them: each
    watcher asks for what follows the number that it has reached."""

    def __init__(self, run: PipelineRun) -> None:
        self.run: PipelineRun | None = run
        self.seq = run.seq
        self.tails = Tails(run.run_id)
        self.watchers = 0
        self.log_readers = 0
        #: Set, and replaced, when there is something new. Take it before looking, wait for it afterwards.
        self.news = asyncio.Event()
        self._fields = run_fields(run)
        self._signals = -1
        self._kept: deque[Message] = deque()
        self._bytes = 0

    async def push(self, snapshot: RunSnapshot) -> None:
        """Takes what changed since ``seq``."""
        fields = run_fields(snapshot.run)
        changed = {name: value for name, value in fields.items() if value != self._fields[name]}
        told = len(snapshot.signals)
        # In a thread, because a step may have ten thousand items.
        body = await asyncio.to_thread(change_message, snapshot, changed, with_signals=told != self._signals)
        self._kept.append(Message(self.seq, snapshot.run.seq, body))
        self._bytes += len(body)
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= len(self._kept.popleft().body)
        self.run, self.seq, self._fields, self._signals = snapshot.run, snapshot.run.seq, fields, told
        self.tails.note(snapshot.attempts)
        self.wake()

    def since(self, seq: int) -> list[Message] | None:
        """The changes after a transition; None when they are not here any more."""
        if seq >= self.seq:
            return []
        if not self._kept or seq < self._kept[0].after:
            return None
        return [message for message in self._kept if message.seq > seq]

    def vanish(self) -> None:
        """The run was deleted."""
        self.run = None
        self.wake()

    def wake(self) -> None:
        """There is something new."""
        self.news.set()
        self.news = asyncio.Event()


class Hub:
    """Feeds of runs, each for as long as somebody watches. For one event loop.

    Args:
        store: the runs.
        artifacts: their logs.
        pause: waits for so many seconds, between two looks.
        max_streams: watchers at once.
    """

    def __init__(
        self,
        store: PipelineStore,
        artifacts: ArtifactStore,
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self.store = store
        self._artifacts = artifacts
        self._pause = pause
        self._max_streams = max_streams
        self._streams = 0
        self._feeds: dict[str, Feed] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._asked: set[asyncio.Task[Any]] = set()

    @property
    def streams(self) -> int:
        """Watchers there are now."""
        return self._streams

    async def join(self, run_id: str, *, logs: bool) -> Feed:
        """The feed of a run, for somebody who ``leave``s it again.

        Raises:
            NotFound: no such run.
            Overloaded: too many watch already.
        """
        self.take_slot()
        try:
            feed = self._feeds.get(run_id)
            if feed is None:
                feed = self._feeds.setdefault(run_id, await self.ask(self._open(run_id)))
        except BaseException:
            self.free_slot()
            raise
        feed.watchers += 1
        feed.log_readers += logs
        if not self._tasks or any(task.done() for task in self._tasks):
            self.close()
            loop = asyncio.get_running_loop()
            self._tasks = [
                loop.create_task(self._repeat(self.look, POLL_S)),
                loop.create_task(self._repeat(self.read_logs, LOG_POLL_S)),
            ]
        return feed

    def leave(self, run_id: str, feed: Feed, *, logs: bool) -> None:
        """One watcher less; without any the feed goes."""
        self.free_slot()
        feed.watchers -= 1
        feed.log_readers -= logs
        if not feed.watchers and self._feeds.get(run_id) is feed:
            del self._feeds[run_id]
        if not self._feeds:
            self.close()

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Asks the stores, to the end even when the client goes away meanwhile: a query that is broken off costs its
        connection, which stays open until it is garbage."""
        task = asyncio.get_running_loop().create_task(work)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)
        return await asyncio.shield(task)

    def take_slot(self) -> None:
        """Counts a long answer.

        Raises:
            Overloaded: there are too many already.
        """
        if self._streams >= self._max_streams:
            raise Overloaded(
                f"{self._streams} streams are open, as many as one gateway has; poll instead, or try later"
            )
        self._streams += 1

    def free_slot(self) -> None:
        """A long answer is over."""
        self._streams -= 1

    def close(self) -> None:
        """Looks no more."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    async def look(self) -> None:
        """Takes what happened to the watched runs: one query, and one more round of them when something did."""
        feeds = dict(self._feeds)
        seqs = await self.store.find_seqs(list(feeds)) if feeds else {}
        for run_id in feeds.keys() - seqs.keys():
            feeds.pop(run_id).vanish()
        behind = {run_id: feed.seq for run_id, feed in feeds.items() if seqs[run_id] != feed.seq}
        if behind:
            for run_id, snapshot in (await self.store.find_changes(behind)).items():
                await feeds[run_id].push(snapshot)

    async def read_logs(self) -> None:
        """Reads what the watched attempts printed."""
        await asyncio.gather(*(self._read_logs(feed) for feed in list(self._feeds.values()) if feed.log_readers))

    async def _read_logs(self, feed: Feed) -> None:
        if await feed.tails.read(self._artifacts):
            feed.wake()

    async def _open(self, run_id: str) -> Feed:
        # The run first: what begins after that arrives as a change.
        run = await self.store.get_run(run_id)
        feed = Feed(run)
        if not run.state.is_final:
            _run, _ended, begun = await self.store.find_attempts(run_id, MAX_OPEN_ATTEMPTS, only_open=True)
            feed.tails.note(begun)
        return feed

    async def _repeat(self, look: Callable[[], Coroutine[Any, Any, None]], every_s: float) -> None:
        while True:
            pause_s = FAILED_PAUSE_S
            try:
                await self.ask(look())
                pause_s = every_s
            except CONNECTION_ERRORS as error:
                _log.warning("watched runs: %s", error)
            except Exception:  # a defect must not end everybody's stream
                _log.exception("watched runs")
            await self._pause(pause_s)
