"""/api/v1/pipeline-runs/{run_id}/events"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from mlplat.errors import InvalidInput
from mlplat.http.live.hub import Hub
from mlplat.http.live.stream import LogChoice, open_events

MAX_LASTS_S = 86_400
MAX_NAMED_STEPS = 100


def router(hub: Hub) -> APIRouter:
    """Watching runs."""
    api = APIRouter(prefix="/api/v1/pipeline-runs", tags=["pipelines"])

    @api.get("/{run_id}/events", response_class=StreamingResponse)
    async def events(
        run_id: str,
        after: Annotated[
            int | None, Query(ge=0, description="The `id` of the last event that was seen; instead of Last-Event-ID.")
        ] = None,
        logs: Annotated[
            Literal["none", "step", "all"],
            Query(description="Whose new text to send: nobody's, that of steps, or that of a fan-out's items too."),
        ] = "step",
        step: Annotated[
            list[str] | None, Query(max_length=MAX_NAMED_STEPS, description="Only these steps' logs.")
        ] = None,
        lasts_s: Annotated[
            float | None, Query(gt=0, le=MAX_LASTS_S, description="Ends the stream after so many seconds.")
        ] = None,
        last_event_id: Annotated[str, Header(max_length=40)] = "",
    ) -> StreamingResponse:
        """The run as Server-Sent Events: a `snapshot`, then a `change` whenever something changed, `log` texts, and an
        `end` when the run is over. A client that comes back with the last `id` gets a `change` with all that it missed
        in place of the snapshot."""
        choice = LogChoice(logs, frozenset(step or ()))
        cursor = _cursor(last_event_id) if after is None else after
        feed = await hub.join(run_id, logs=choice.any)
        return open_events(hub, feed, run_id, cursor, choice, lasts_s)

    return api


def _cursor(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise InvalidInput(f"Last-Event-ID: expected the id of an event, a number, not {text!r}")
    return int(text)
