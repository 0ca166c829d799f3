"""/api/v1/schedules"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import AwareDatetime, BaseModel, Field

from mlplat.http.routes.automation import (
    AutomationRequest,
    FiringAnswer,
    Limit,
    Name,
    Offset,
    body_schema,
    firing_answer,
    read_request,
    wake,
)
from mlplat.http.services import Services
from mlplat.pipelines.automation.schedules import MAX_CATCH_UP, CatchUp, Schedule, Timing
from mlplat.pipelines.automation.store import NewSchedule

MAX_PREVIEW = 1_000


class ScheduleRequest(AutomationRequest):
    """A pipeline that runs by the clock."""

    cron: str = Field(description="minute hour day-of-month month day-of-week, or @daily and the like.")
    time_zone: str = Field(default="UTC", description="Of the IANA database, such as Europe/Berlin.")
    catch_up: CatchUp = Field(
        default=CatchUp.LATEST,
        description="What becomes of missed fire times. skip: nothing; latest: a run for the newest, unless one is due "
        "in time anyway; all: a run for each.",
    )
    catch_up_limit: int = Field(default=100, ge=1, le=MAX_CATCH_UP, description="Runs that are caught up on at once.")
    misfire_grace_s: float = Field(
        default=60.0, ge=1, le=7 * 86_400, description="Later than this a fire time counts as missed."
    )
    starts_at: AwareDatetime | None = Field(default=None, description="No fire time before this.")
    ends_at: AwareDatetime | None = Field(default=None, description="No fire time after this.")


class ScheduleAnswer(BaseModel):
    """A schedule. `next_at` is null while it is paused, and when it is over."""

    name: str
    pipeline: str
    digest: str
    params: dict[str, Any]
    cron: str
    time_zone: str
    catch_up: CatchUp
    catch_up_limit: int
    misfire_grace_s: float
    starts_at: datetime | None
    ends_at: datetime | None
    paused: bool
    next_at: datetime | None
    last_at: datetime | None
    last_run_id: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime


class Preview(BaseModel):
    """Fire times to come, in the schedule's time zone."""

    time_zone: str
    times: list[datetime]


def router(services: Services) -> APIRouter:
    """Schedules, by name."""
    api = APIRouter(prefix="/api/v1/schedules", tags=["schedules"])
    store = services.automation

    @api.get("")
    async def list_schedules(limit: Limit = 100, offset: Offset = 0) -> list[ScheduleAnswer]:
        """Schedules, by name."""
        return [_answer(found) for found in await store.find_schedules(limit, offset)]

    @api.get("/{name}")
    async def get_schedule(name: Name) -> ScheduleAnswer:
        """One schedule."""
        return _answer(await store.get_schedule(name))

    @api.get("/{name}/definition")
    async def definition(name: Name) -> dict[str, Any]:
        """The definition of what runs."""
        return (await store.get_definition((await store.get_schedule(name)).digest)).to_json()

    @api.put("/{name}", openapi_extra=body_schema(ScheduleRequest))
    async def put_schedule(name: Name, request: Request) -> ScheduleAnswer:
        """Creates or replaces a schedule. It fires from now on; one whose times stay the same misses none."""
        given = await read_request(request, ScheduleRequest)
        timing = Timing(
            given.cron, given.time_zone, given.catch_up, given.catch_up_limit, given.misfire_grace_s, given.starts_at,
            given.ends_at,
        )  # fmt: skip
        new = NewSchedule(name, given.parse(), given.params, timing, given.paused, given.created_by)
        found = await store.put_schedule(new)
        await wake(services)
        return _answer(found)

    @api.delete("/{name}")
    async def delete_schedule(name: Name) -> dict[str, str]:
        """Deletes a schedule. Its runs stay."""
        await store.delete_schedule(name)
        return {"name": name}

    @api.post("/{name}/pause")
    async def pause(name: Name) -> ScheduleAnswer:
        """Nothing fires from now on."""
        return _answer(await store.pause_schedule(name, paused=True))

    @api.post("/{name}/resume")
    async def resume(name: Name) -> ScheduleAnswer:
        """Goes on from now: what it did not do meanwhile is not caught up on."""
        found = await store.pause_schedule(name, paused=False)
        await wake(services)
        return _answer(found)

    @api.get("/{name}/next")
    async def preview(name: Name, count: Annotated[int, Query(ge=1, le=MAX_PREVIEW)] = 5) -> Preview:
        """The next fire times, also of a paused schedule."""
        timing = (await store.get_schedule(name)).timing
        zone = timing.parse().zone
        times = timing.preview(await store.now(), count)
        return Preview(time_zone=timing.time_zone, times=[moment.astimezone(zone) for moment in times])

    @api.get("/{name}/runs")
    async def runs(name: Name, limit: Limit = 50, before: int | None = None) -> list[FiringAnswer]:
        """What became of its fire times, newest first; `before` is the last `firing_id` of the page before."""
        await store.get_schedule(name)
        return [firing_answer(found) for found in await store.find_firings(f"schedule:{name}", limit, before)]

    return api


def _answer(found: Schedule) -> ScheduleAnswer:
    return ScheduleAnswer(
        name=found.name, pipeline=found.pipeline, digest=found.digest, params=found.params, paused=found.paused,
        next_at=found.next_at, last_at=found.last_at, last_run_id=found.last_run_id, created_by=found.created_by,
        created_at=found.created_at, updated_at=found.updated_at, **asdict(found.timing),
    )  # fmt: skip
