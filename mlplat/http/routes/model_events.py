"""/api/v1/models/events"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from mlplat.errors import InvalidInput
from mlplat.events.log import BEGINNING, EventLog
from mlplat.events.model import MAX_CURSOR, Cursor, EventFilter, parse_kinds
from mlplat.http.live.registry_feed import RegistryFeed, RegistryWatcher
from mlplat.http.live.stream import EventResponse
from mlplat.http.routes.pipeline_events import MAX_LASTS_S
from mlplat.registry.model import MAX_NAME_LENGTH

MAX_EVENTS = 1_000
Model = Annotated[str, Query(max_length=MAX_NAME_LENGTH, description="A name, or a pattern with `*`, `?` and `[…]`.")]
Kinds = Annotated[
    str, Query(max_length=1_000, description="Kinds of events with commas between them, such as `alias_set,stage_set`.")
]
After = Annotated[str, Query(max_length=MAX_CURSOR, description="The `id` of the last event that was seen.")]


class EventPage(BaseModel):
    """Events in the order in which they were committed; `next` is where to read on, `more` whether there is more now.

    With a filter, a page may have few events or none, though there are more.
    """

    events: list[dict[str, Any]]
    next: str
    more: bool


def router(log: EventLog, feed: RegistryFeed) -> APIRouter:
    """What happens to registered models. Its paths come before those of a model's name."""
    api = APIRouter(prefix="/api/v1/models/events", tags=["models"])

    @api.get("", response_class=StreamingResponse)
    async def events(
        model: Model = "*",
        kinds: Kinds = "",
        after: After = "",
        since: Annotated[datetime | None, Query(description="What has happened since; with a time zone.")] = None,
        lasts_s: Annotated[
            float | None, Query(gt=0, le=MAX_LASTS_S, description="Ends the stream after so many seconds.")
        ] = None,
        last_event_id: Annotated[str, Header(max_length=MAX_CURSOR)] = "",
    ) -> StreamingResponse:
        """Changes of the registry as Server-Sent Events, from now on, or from where a client was: one that comes back
        with the last `id` misses nothing and gets nothing twice."""
        wanted = EventFilter(_kinds(kinds), model)
        cursor = _cursor(last_event_id or after, "Last-Event-ID" if last_event_id else "after")
        if since is not None and since.tzinfo is None:
            raise InvalidInput("since: has no time zone; write for instance 2026-01-31T12:00:00Z")
        if cursor is None and since is not None:
            cursor = await log.at(since)
        now = await feed.join()
        if cursor is not None and cursor.seen.end > now.end:
            feed.leave()
            raise InvalidInput("after: the cursor is of another database; start without one")
        return EventResponse(RegistryWatcher(feed, now, wanted, cursor).events(lasts_s), feed.leave)

    @api.get("/log")
    async def page(
        model: Model = "*",
        kinds: Kinds = "",
        after: After = "",
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100,
    ) -> EventPage:
        """The registry's log, from its beginning or from a cursor. A page has all events of a request, so it may be
        larger than `limit`."""
        wanted = EventFilter(_kinds(kinds), model)
        found = await log.read(_cursor(after, "after") or BEGINNING, limit)
        events = [dict(event.body) for event in found.events if wanted.accepts(event)]
        return EventPage(events=events, next=str(found.end), more=not found.is_last)

    return api


def _kinds(text: str) -> frozenset[str]:
    return parse_kinds([name.strip() for name in text.split(",") if name.strip()])


def _cursor(text: str, where: str) -> Cursor | None:
    if not text:
        return None
    try:
        return Cursor.parse(text)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from error
