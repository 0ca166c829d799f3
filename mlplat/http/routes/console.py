"""/api/v1/runs/{run_id}/console"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from mlplat.artifacts.console import MAX_CURSOR, decode_cursor, encode_cursor, read_console
from mlplat.artifacts.model import proxied_path
from mlplat.execution.capture import log_folder_of
from mlplat.http.services import Services
from mlplat.tracking.model import ATTEMPT_TAG, Run, RunStatus

MAX_BYTES = 4 * 1024 * 1024


class ConsoleText(BaseModel):
    """A part of what a run printed."""

    text: str
    cursor: str = Field(description="Give it as `after` to read on.")
    more: bool = Field(description="There is more already: ask again at once.")
    running: bool = Field(description="The run is not at its end, so more may come.")


def router(services: Services) -> APIRouter:
    """Reading what runs print."""
    api = APIRouter(prefix="/api/v1/runs", tags=["runs"])

    @api.get("/{run_id}/console")
    async def console(
        run_id: str,
        after: Annotated[str, Query(max_length=MAX_CURSOR)] = "",
        limit: Annotated[int, Query(ge=1024, le=MAX_BYTES, description="Bytes of text.")] = 256 * 1024,
        process: Annotated[str, Query(max_length=200, description="Only what this process printed.")] = "",
    ) -> ConsoleText:
        """What the run printed so far, from the start or after a cursor. When several processes wrote to the run,
        a heading names each where its output begins. Of a run that a step of a pipeline started, the log of the step's
        attempt is a part."""
        cursor = decode_cursor(after)
        # The run's state first: of a run that has ended everything is there.
        run = await services.runs.get(run_id)
        part = await asyncio.to_thread(
            read_console, services.artifacts, proxied_path(run.artifact_uri), cursor, limit, process, _attempt_log(run)
        )
        return ConsoleText(
            text=part.text,
            cursor=encode_cursor(part.cursor),
            more=part.more,
            running=run.status in {RunStatus.RUNNING, RunStatus.SCHEDULED},
        )

    return api


def _attempt_log(run: Run) -> dict[str, str]:
    label = run.tags.get(ATTEMPT_TAG, "")
    folder = log_folder_of(label)
    return {} if folder is None else {label: folder}
