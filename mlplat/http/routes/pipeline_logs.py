"""/api/v1/pipeline-runs/{run_id}/logs"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from mlplat.artifacts.segments import Place
from mlplat.errors import NotFound
from mlplat.execution.attempt_logs import (
    MAX_CURSOR,
    LogCursor,
    LogFilter,
    LogPage,
    LogReader,
    cursor_in,
    decode_cursor,
    encode_cursor,
)
from mlplat.http.live.hub import Hub
from mlplat.http.live.stream import EventResponse
from mlplat.http.live.wire import LogPosition, position
from mlplat.http.services import Services
from mlplat.pipelines.headings import Headings
from mlplat.pipelines.model import WHOLE_STEP, AttemptState

MAX_BYTES = 4 * 1024 * 1024
PAGE_BYTES = 256 * 1024
#: How often a followed log is looked at.
FOLLOW_EVERY_S = 0.5
_PLACE = re.compile(r"(\d{1,9}):(\d{1,12})", re.ASCII)


class LogPartText(BaseModel):
    """Some of the log of one attempt."""

    step: str
    item: int | None
    attempt: int
    state: AttemptState
    text: str
    next: LogPosition = Field(description="`segment:offset` as `after` reads on in this attempt's log alone.")


class LogPageText(BaseModel):
    """Parts of the logs, those of attempts that are over first, in the order in which they ended."""

    parts: list[LogPartText]
    cursor: str = Field(description="Give it as `after` to read on.")
    more: bool = Field(description="There is more already: ask again at once.")
    running: bool = Field(description="The run is not at its end, so more may come.")


def router(services: Services, hub: Hub) -> APIRouter:
    """Reading what attempts printed."""
    api = APIRouter(prefix="/api/v1/pipeline-runs", tags=["pipelines"])

    @api.get(
        "/{run_id}/logs",
        response_class=Response,
        responses={200: {"model": LogPageText, "content": {"text/plain": {}}}},
    )
    async def logs(
        run_id: str,
        step: str | None = None,
        item: Annotated[int | None, Query(ge=WHOLE_STEP, lt=2**31, description="-1: the step itself.")] = None,
        attempt: Annotated[int | None, Query(ge=1, lt=2**15)] = None,
        after: Annotated[str, Query(max_length=MAX_CURSOR)] = "",
        limit: Annotated[int, Query(ge=1, le=MAX_BYTES, description="With `format=json`: bytes of text.")] = PAGE_BYTES,
        follow: Annotated[bool, Query(description="With `format=text`: goes on until the run ends.")] = False,
        format: Literal["text", "json"] = "text",
    ) -> Response:
        """What attempts printed so far, from the start or after a cursor: a page with the next cursor as JSON, or all
        of it as text, under a heading for each attempt."""
        wanted = LogFilter(step, item, attempt)
        reader = LogReader(services.pipelines, services.artifacts, run_id, wanted)
        page = await hub.ask(reader.read(_cursor(after, wanted), limit))
        if step is not None and not page.parts and not after:
            await _check_step(services, run_id, step)
        if format == "json":
            return Response(_page_text(page).model_dump_json(), media_type="application/json")
        hub.take_slot()
        return EventResponse(_text(hub, reader, page, follow=follow), hub.free_slot, "text/plain; charset=utf-8")

    return api


def _cursor(text: str, wanted: LogFilter) -> LogCursor:
    place = _PLACE.fullmatch(text)
    return decode_cursor(text) if place is None else cursor_in(wanted, Place(int(place[1]), int(place[2])))


async def _check_step(services: Services, run_id: str, step: str) -> None:
    spec = await services.pipelines.get_definition(run_id)
    if step not in spec["steps"] and step not in spec.get("finally", {}):
        raise NotFound(f"pipeline run {run_id} has no step {step!r}")


async def _text(hub: Hub, reader: LogReader, page: LogPage, *, follow: bool) -> AsyncIterator[bytes]:
    """The page and what follows it; never more in memory than a page."""
    headings = Headings()
    while True:
        texts = [
            headings.add(
                part.attempt.step, _item(part.attempt.item), part.attempt.attempt, part.attempt.state, part.text
            )
            for part in page.parts
        ]
        yield "".join(texts).encode()
        if not page.more:
            if not (follow and page.is_running):
                yield headings.close().encode()
                return
            await asyncio.sleep(FOLLOW_EVERY_S)
        page = await hub.ask(reader.read(page.cursor, PAGE_BYTES))


def _page_text(page: LogPage) -> LogPageText:
    return LogPageText(
        parts=[
            LogPartText(
                step=part.attempt.step, item=_item(part.attempt.item), attempt=part.attempt.attempt,
                state=part.attempt.state, text=part.text, next=position(part.next),
            )
            for part in page.parts
        ],
        cursor=encode_cursor(page.cursor), more=page.more, running=page.is_running,
    )  # fmt: skip


def _item(item: int) -> int | None:
    return None if item == WHOLE_STEP else item
