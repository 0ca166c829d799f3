"""/api/v1/runs/heartbeat"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from mlplat.http.services import Services
from mlplat.tracking.model import RunStatus

MAX_RUNS = 1_000


class Heartbeat(BaseModel):
    """The runs of a living process."""

    run_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_RUNS)]


class HeartbeatAnswer(BaseModel):
    """The state of each run that there is."""

    runs: dict[str, RunStatus]


def router(services: Services) -> APIRouter:
    """Heartbeats."""
    api = APIRouter(tags=["runs"])

    @api.post("/api/v1/runs/heartbeat")
    async def heartbeat(beat: Heartbeat) -> HeartbeatAnswer:
        """Says that the processes of these runs live. From its first heartbeat on, a run whose heartbeats stop for
        a minute is marked KILLED; it is RUNNING again when they go on."""
        return HeartbeatAnswer(runs=dict(await services.heartbeats.beat(beat.run_ids)))

    return api
