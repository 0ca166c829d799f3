"""What the leading scheduler reads and writes of schedules and triggers. Its writes are fenced by its lease."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, delete, func, literal, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.db.snapshots import Snapshot
from mlplat.db.tables import event_cursor, firing, schedule, trigger
from mlplat.pipelines.automation.events import PAGE, find_lineages, read_events
from mlplat.pipelines.automation.firings import MAX_REASON, Firing, FiringState, Recorded
from mlplat.pipelines.automation.rows import (
    FIRINGS,
    SCHEDULES,
    TRIGGERS,
    columns_of,
    load_definitions,
    recorded_of,
    schedule_of,
    trigger_of,
)
from mlplat.pipelines.automation.schedules import Schedule
from mlplat.pipelines.automation.triggers import Event, Kind, Trigger

KEPT = timedelta(days=30)
PRUNED_AT_ONCE = 10_000
#: Postgres takes 65,535 values in a statement.
ROWS_AT_ONCE = 1_000
_PENDING = firing.c.state == literal(FiringState.PENDING.value, literal_execute=True)


@dataclass(frozen=True)
class Look:
    """What there is to do. ``next_at`` and ``retry_at`` are the earliest ones; ``kinds`` those of active triggers."""

    now: datetime
    next_at: datetime | None
    retry_at: datetime | None
    kinds: frozenset[Kind]


@dataclass(frozen=True)
class Advance:
    """A schedule that goes on to its next fire time, with what it decided meanwhile."""

    schedule: Schedule
    next_at: datetime | None
    firings: Sequence[Firing]


@dataclass(frozen=True)
class Events:
    """New events of a kind, with all that is needed to decide on them.

    Args:
        after: the snapshot up to which they were read.
        is_last: whether there are no more for now.
        definitions: the JSON texts of what the triggers run, by digest.
        lineages: the triggers that led to pipeline runs.
    """

    after: Snapshot
    events: Sequence[Event]
    is_last: bool
    triggers: Sequence[Trigger]
    definitions: Mapping[str, bytes]
    lineages: Mapping[str, list[str]]


class LeaderStore:
    """Every write raises ``Fenced`` when another scheduler leads.

    Args:
        clock: SQL for the time that it is; the database's.
    """

    def __init__(self, engine: AsyncEngine, lease: LeaseKeeper, clock: ColumnElement[datetime] | None = None) -> None:
        self._engine = engine
        self._lease = lease
        self._clock = func.clock_timestamp() if clock is None else clock

    async def look(self) -> Look:
        """What there is to do, in one statement."""
        active = select(trigger.c.kind).where(~trigger.c.paused).distinct().subquery()
        query = select(
            self._clock.label("now"),
            select(func.min(schedule.c.next_at)).scalar_subquery().label("next_at"),
            select(func.min(firing.c.retry_at)).where(_PENDING).scalar_subquery().label("retry_at"),
            select(func.array_agg(active.c.kind)).scalar_subquery().label("kinds"),
        )
        async with self._engine.connect() as connection:
            row = (await connection.execute(query)).one()
        kinds = frozenset(Kind(kind) for kind in row.kinds or ())
        return Look(row.now, row.next_at, row.retry_at, kinds - {Kind.WEBHOOK})

    async def find_due(self, now: datetime, limit: int) -> tuple[list[Schedule], Mapping[str, bytes]]:
        """Schedules whose fire time has come, with the definitions that they name."""
        query = SCHEDULES.where(schedule.c.next_at <= now).order_by(schedule.c.next_at, schedule.c.name).limit(limit)
        async with self._engine.connect() as connection:
            found = [schedule_of(row) for row in await connection.execute(query)]
            return found, await load_definitions(connection, {item.digest for item in found})

    async def advance(self, advances: Sequence[Advance]) -> None:
        """Notes what schedules decided, and moves them on, at once. A schedule that was changed meanwhile stays."""
        moves = [
            {"name": item.schedule.name, "seen": item.schedule.next_at, "updated_at": item.schedule.updated_at,
             "next_at": item.next_at}
            for item in advances
        ]  # fmt: skip
        async with self._engine.begin() as connection:
            await self._lease.current.check(connection)
            moved = set((await connection.execute(_ADVANCE, {"moves": _json(moves)})).scalars())
            await _add(connection, [one for item in advances if item.schedule.name in moved for one in item.firings])

    async def read(self, kind: Kind) -> Events | None:
        """A page of new events of a kind, with the active triggers that wait for such; None if there are none."""
        async with self._engine.connect() as connection:
            cursor = (
                await connection.execute(select(event_cursor.c.snapshot).where(event_cursor.c.origin == kind))
            ).scalar()
            active = TRIGGERS.where(trigger.c.kind == kind, ~trigger.c.paused)
            starts = [trigger_of(row).since for row in await connection.execute(active)]
            if not starts:
                return None
            before = min(starts)  # nobody means what was there before
            if cursor is not None:
                before = max(before, Snapshot.parse(cursor))
            after, events = await read_events(connection, kind, before)
            # Read after the events: a trigger that has come meanwhile knows by itself which of them are not its own.
            if not events:
                return None
            triggers = [trigger_of(row) for row in await connection.execute(active)]
            run_ids = sorted({event.run_id for event in events if event.run_id is not None})
            lineages = await find_lineages(connection, run_ids)
            definitions = await load_definitions(connection, {item.digest for item in triggers})
        return Events(after, events, len(events) < PAGE, triggers, definitions, lineages)

    async def count_recent(self, sources: Sequence[str]) -> Mapping[str, int]:
        """How many runs each source has asked for within an hour."""
        query = (
            select(firing.c.source, func.count())
            .where(firing.c.source.in_(sources), firing.c.created_at > func.clock_timestamp() - timedelta(hours=1))
            .where(firing.c.state != FiringState.SKIPPED)
            .group_by(firing.c.source)
        )
        async with self._engine.connect() as connection:
            return {row[0]: row[1] for row in await connection.execute(query)}

    async def record(self, kind: Kind, read_to: Snapshot, firings: Sequence[Firing]) -> None:
        """Notes what triggers decided, and that the events are read, at once."""
        async with self._engine.begin() as connection:
            await self._lease.current.check(connection)
            cursor = upsert(event_cursor).values(origin=kind, snapshot=str(read_to))
            await connection.execute(
                cursor.on_conflict_do_update(index_elements=["origin"], set_={"snapshot": cursor.excluded.snapshot})
            )
            await _add(connection, firings)

    async def find_pending(self, now: datetime, but: Sequence[int], limit: int) -> list[Recorded]:
        """Firings whose runs are to be submitted now, oldest first, without those with the ids ``but``."""
        query = (
            FIRINGS.where(_PENDING, firing.c.firing_id.not_in(but))
            .where(firing.c.retry_at.is_(None) | (firing.c.retry_at <= now))
            .order_by(firing.c.firing_id)
            .limit(limit)
        )
        async with self._engine.connect() as connection:
            return [recorded_of(row) for row in await connection.execute(query)]

    async def find_definition(self, digest: str) -> bytes:
        """The JSON text of a definition, which must be there."""
        async with self._engine.connect() as connection:
            return (await load_definitions(connection, [digest]))[digest]

    async def finish(self, item: Recorded, state: FiringState, run_id: str | None, reason: str = "") -> None:
        """Notes what became of a firing."""
        table, name = _origin(item.firing.source)
        values = {"state": state, "run_id": run_id, "reason": reason[:MAX_REASON], "retry_at": None}
        is_newest = table.c.last_at.is_(None) | (table.c.last_at <= item.firing.event_at)
        async with self._engine.begin() as connection:
            await self._lease.current.check(connection)
            await connection.execute(
                update(firing).where(firing.c.firing_id == item.firing_id, _PENDING).values(**values)
            )
            if run_id is not None:
                await connection.execute(
                    update(table)
                    .where(table.c.name == name, is_newest)
                    .values(last_at=item.firing.event_at, last_run_id=run_id)
                )

    async def postpone(self, item: Recorded, delay_s: float, reason: str) -> None:
        """Lets a firing wait."""
        retry_at = self._clock + func.make_interval(0, 0, 0, 0, 0, 0, literal(delay_s))
        values = {"tries": item.tries + 1, "retry_at": retry_at, "reason": reason[:MAX_REASON]}
        async with self._engine.begin() as connection:
            await self._lease.current.check(connection)
            await connection.execute(
                update(firing).where(firing.c.firing_id == item.firing_id, _PENDING).values(**values)
            )

    async def prune(self) -> None:
        """Forgets old firings; their runs stay."""
        old = (
            select(firing.c.firing_id)
            .where(~_PENDING, firing.c.created_at < func.clock_timestamp() - KEPT)
            .limit(PRUNED_AT_ONCE)
        )
        async with self._engine.begin() as connection:
            await self._lease.current.check(connection)
            await connection.execute(delete(firing).where(firing.c.firing_id.in_(old)))


def _origin(source: str) -> tuple[Any, str]:
    kind, _colon, name = source.partition(":")
    return (schedule if kind == "schedule" else trigger), name


async def _add(connection: AsyncConnection, firings: Sequence[Firing]) -> None:
    for start in range(0, len(firings), ROWS_AT_ONCE):
        rows = [columns_of(item) for item in firings[start : start + ROWS_AT_ONCE]]
        await connection.execute(upsert(firing).values(rows).on_conflict_do_nothing())


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


_ADVANCE = text("""
    UPDATE schedule AS s SET next_at = t.next_at
    FROM json_to_recordset(CAST(:moves AS json)) AS t(
        name text, seen timestamptz, updated_at timestamptz, next_at timestamptz)
    WHERE s.name = t.name AND s.next_at = t.seen AND s.updated_at = t.updated_at
    RETURNING s.name
""")
