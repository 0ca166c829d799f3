"""One client's stream of a run's events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.errors import NotFound
from mlplat.http.live.hub import Feed, Hub
from mlplat.http.live.tails import Key
from mlplat.http.live.wire import (
    HEARTBEAT,
    OPENING,
    LogText,
    change_message,
    end_message,
    message,
    position,
    run_fields,
    snapshot_message,
)
from mlplat.pipelines.model import WHOLE_STEP

HEARTBEAT_S = 15.0
#: A client that takes nothing for so long is gone.
SEND_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LogChoice:
    """Whose logs a client wants: nobody's, those of steps without items, or all; of all steps or of some."""

    kind: str = "step"
    steps: Collection[str] = ()

    @property
    def any(self) -> bool:
        """Whether it wants logs at all."""
        return self.kind != "none"

    def has(self, key: Key) -> bool:
        """Whether it wants this attempt's log."""
        return (self.kind == "all" or key[1] == WHOLE_STEP) and (not self.steps or key[0] in self.steps)


class Watcher:
    """What one client has seen of a run."""

    def __init__(self, hub: Hub, feed: Feed, run_id: str, after: int | None, logs: LogChoice) -> None:
        self._hub = hub
        self._feed = feed
        self._run_id = run_id
        self._after = after
        self._is_new = True
        self._logs = logs
        #: The number of the next part of each log.
        self._parts: dict[Key, int] = {}

    async def events(self, lasts_s: float | None) -> AsyncGenerator[bytes, None]:
        """Events until the run is over and told, or until ``lasts_s`` have passed.

        It ends without an ``end`` event when Postgres is away: the client comes back with its cursor.
        """
        loop = asyncio.get_running_loop()
        deadline = None if lasts_s is None else loop.time() + lasts_s
        try:
            yield OPENING
            seq = self._after
            while True:
                news = self._feed.news
                bodies, seq = await self._changes(seq)
                for body in bodies:
                    yield body
                for body in self._log_events():
                    yield body
                if self._is_told(seq):
                    yield end_message(self._feed.run)
                    return
                left = HEARTBEAT_S if deadline is None else min(HEARTBEAT_S, deadline - loop.time())
                if left <= 0:
                    return
                try:
                    async with asyncio.timeout(left):
                        await news.wait()
                except TimeoutError:
                    yield HEARTBEAT
        except NotFound:  # deleted between two looks
            yield end_message(None)
        except CONNECTION_ERRORS:
            return

    async def _changes(self, seq: int | None) -> tuple[list[bytes], int]:
        """What to tell a client that has seen transition ``seq``, and the transition that it has seen then."""
        if seq is not None and not self._is_new:
            kept = self._feed.since(seq)
            if kept is not None:
                return [entry.body for entry in kept], max(seq, self._feed.seq)
        return await self._ask(seq)

    async def _ask(self, seq: int | None) -> tuple[list[bytes], int]:
        """The same from the database: for a client that is new, that comes back, or that has become too slow."""
        is_new, self._is_new = self._is_new, False
        hub, store = self._hub, self._hub.store
        snapshot = await hub.ask(store.get_changes(self._run_id, -1 if seq is None else seq))
        if seq is not None and seq > snapshot.run.seq:  # a number of another run, or of a restored database
            seq, snapshot = None, await hub.ask(store.get_snapshot(self._run_id))
        if seq is None:
            self._parts = {key: tail.end for key, tail in self._feed.tails.open.items() if tail.is_over}
            body = await asyncio.to_thread(snapshot_message, snapshot)
            return [body], snapshot.run.seq
        if is_new:
            self._feed.tails.note(snapshot.attempts)
        if seq == snapshot.run.seq:
            return [], seq
        body = await asyncio.to_thread(change_message, snapshot, run_fields(snapshot.run), with_signals=True)
        return [body], snapshot.run.seq

    def _log_events(self) -> Iterator[bytes]:
        if not self._logs.any:
            return
        for key, tail in list(self._feed.tails.open.items()):
            wanted = self._parts.get(key, 0)
            if wanted >= tail.end or not self._logs.has(key):
                continue
            step, item, attempt = key
            parts, self._parts[key] = list(tail.parts), tail.end
            for number, (part, skipped) in enumerate(parts, start=tail.first):
                if number < wanted:
                    continue
                text = LogText(
                    step=step, item=None if item == WHOLE_STEP else item, attempt=attempt, text=part.text,
                    start=position(part.start), next=position(part.next),
                    skipped=skipped or (number > wanted and number == tail.first),
                )  # fmt: skip
                yield message("log", text)

    def _is_told(self, seq: int) -> bool:
        run, tails = self._feed.run, self._feed.tails
        if run is None:
            return True
        if not run.state.is_final or seq < run.seq:
            return False
        return not self._logs.any or (
            tails.is_quiet
            and all(
                self._parts.get(key, 0) >= tail.end for key, tail in list(tails.open.items()) if self._logs.has(key)
            )
        )


class EventResponse(StreamingResponse):
    """Server-Sent Events. Ends at once when the client goes away or takes nothing for too long.

    Args:
        events: what to send.
        close: called once, however the response ends, even if it never began.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], media_type: str | None = None) -> None:
        super().__init__(
            events, media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def bounded_send(message: Message) -> None:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send(message)

        loop = asyncio.get_running_loop()
        sending = loop.create_task(self.stream_response(bounded_send))
        listening = loop.create_task(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait((sending, listening), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(OSError):  # it takes nothing, or is gone
                    await sending
        finally:
            sending.cancel()
            listening.cancel()
            await asyncio.gather(sending, listening, return_exceptions=True)
            self._close()


def open_events(
    hub: Hub, feed: Feed, run_id: str, after: int | None, logs: LogChoice, lasts_s: float | None
) -> EventResponse:
    """The answer to a client that has joined the hub already; it leaves with the answer's end."""
    events = Watcher(hub, feed, run_id, after, logs).events(lasts_s)
    return EventResponse(events, partial(hub.leave, run_id, feed, logs=logs.any))
