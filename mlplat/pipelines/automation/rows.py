"""Rows of schedules, triggers and firings, and the definitions that they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Row, Select, Text, cast, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.snapshots import Snapshot
from mlplat.db.tables import firing, pipeline, pipeline_run, schedule, trigger
from mlplat.pipelines.automation.firings import Firing, FiringState, Recorded
from mlplat.pipelines.automation.schedules import CatchUp, Schedule, Timing
from mlplat.pipelines.automation.triggers import FILTERS, Kind, Trigger

SCHEDULES = select(schedule, pipeline.c.name.label("pipeline")).join(pipeline, pipeline.c.digest == schedule.c.digest)
TRIGGERS = select(trigger, pipeline.c.name.label("pipeline")).join(pipeline, pipeline.c.digest == trigger.c.digest)
FIRINGS = select(firing, pipeline_run.c.state.label("run_state")).outerjoin(
    pipeline_run, pipeline_run.c.run_id == firing.c.run_id
)


def schedule_of(row: Row[Any]) -> Schedule:
    """A row of ``SCHEDULES``."""
    timing = Timing(
        row.cron, row.time_zone, CatchUp(row.catch_up), row.catch_up_limit, row.misfire_grace_s, row.starts_at,
        row.ends_at,
    )  # fmt: skip
    return Schedule(
        row.name, row.pipeline, row.digest, row.params, timing, row.paused, row.next_at, row.last_at, row.last_run_id,
        row.created_by, row.created_at, row.updated_at,
    )  # fmt: skip


def trigger_of(row: Row[Any]) -> Trigger:
    """A row of ``TRIGGERS``."""
    kind = Kind(row.kind)
    return Trigger(
        row.name, kind, row.pipeline, row.digest, row.params, FILTERS[kind].model_validate(row.filter),
        row.max_per_hour, row.paused, Snapshot.parse(row.since), row.auth, row.last_at, row.last_run_id,
        row.created_by, row.created_at, row.updated_at,
    )  # fmt: skip


def recorded_of(row: Row[Any]) -> Recorded:
    """A row of ``FIRINGS``."""
    found = Firing(
        row.source, row.event_id, row.event_at, row.digest, row.params, row.submitted_by, row.lineage,
        FiringState(row.state), row.reason,
    )  # fmt: skip
    return Recorded(row.firing_id, found, row.run_id, row.run_state, row.tries, row.created_at)


def columns_of(item: Firing) -> dict[str, object]:
    """A new row of ``firing``."""
    return {
        "source": item.source, "event_id": item.event_id, "event_at": item.event_at, "digest": item.digest,
        "params": item.params, "submitted_by": item.submitted_by, "lineage": item.lineage, "state": item.state,
        "reason": item.reason,
    }  # fmt: skip


async def load_definitions(connection: AsyncConnection, digests: Iterable[str]) -> Mapping[str, bytes]:
    """The JSON texts of definitions, by digest."""
    query: Select[tuple[str, str]] = select(pipeline.c.digest, cast(pipeline.c.spec, Text).label("spec")).where(
        pipeline.c.digest.in_(list(digests))
    )
    return {row.digest: row.spec.encode() for row in await connection.execute(query)}
