"""Schedules, triggers and their history in Postgres: what everybody may read and change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Table, Text, cast, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import firing, pipeline, schedule, trigger
from mlplat.errors import InvalidInput, NotFound, Overloaded
from mlplat.pipelines.automation.firings import FiringState, Recorded
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
from mlplat.pipelines.automation.schedules import Schedule, Timing
from mlplat.pipelines.automation.templates import check_template, render_params, scope_of
from mlplat.pipelines.automation.triggers import Event, Filter, Kind, Trigger, check_trigger, decide
from mlplat.pipelines.automation.webhooks import Auth, stored_secret, verify
from mlplat.pipelines.parsing import ParsedSpec, parse_json
from mlplat.pipelines.spec import PipelineSpec

MAX_SCHEDULES = 10_000
MAX_TRIGGERS = 1_000
_SNAPSHOT = cast(func.pg_current_snapshot(), Text)


@dataclass(frozen=True)
class NewSchedule:
    """A schedule as somebody wants it. ``paused`` None: as it is, and a new one is not."""

    name: str
    parsed: ParsedSpec
    params: dict[str, Any]
    timing: Timing
    paused: bool | None = None
    created_by: str = ""


@dataclass(frozen=True)
class NewTrigger:
    """A trigger as somebody wants it. ``paused`` None: as it is, and a new one is not.

    Webhooks have ``auth``; without a ``secret`` they keep the one they have.
    """

    name: str
    parsed: ParsedSpec
    params: dict[str, Any]
    filter: Filter
    kind: Kind
    max_per_hour: int = 1_000
    paused: bool | None = None
    created_by: str = ""
    auth: Auth | None = None
    secret: str | None = None


class AutomationStore:
    """All methods are safe to call concurrently. ``get_*`` raises NotFound, ``find_*`` returns lists.

    Args:
        clock: SQL for the time that it is; the database's.
    """

    def __init__(self, engine: AsyncEngine, clock: ColumnElement[datetime] | None = None) -> None:
        self._engine = engine
        self._clock = func.clock_timestamp() if clock is None else clock

    async def now(self) -> datetime:
        """The time that schedules go by."""
        async with self._engine.connect() as connection:
            return await self._now(connection)

    # -- schedules ---------------------------------------------------------------------------

    async def put_schedule(self, new: NewSchedule) -> Schedule:
        """Creates or replaces a schedule. It fires from now on; one whose times stay the same misses none.

        Raises:
            InvalidInput: the expression, the time zone or a parameter is wrong, or it would never fire.
        """
        async with self._engine.begin() as connection:
            now = await self._now(connection)
            next_at = new.timing.next_after(now)
            if next_at is None:
                raise InvalidInput("the schedule would never fire: all of its times are over, or before starts_at")
            zone = new.timing.parse().zone
            check_template(new.parsed.spec, new.params)
            render_params(new.parsed.spec, new.params, scope_of(new.name, next_at.astimezone(zone)))
            await _lock_or_count(connection, schedule, new.name, MAX_SCHEDULES)
            before = await _find_schedule(connection, new.name)
            if before is not None and before.timing == new.timing and not before.paused:
                next_at = before.next_at
            paused = _paused(new.paused, before)
            await _add_definition(connection, new.parsed)
            values = {
                **asdict(new.timing), "digest": new.parsed.spec.digest, "params": new.params, "paused": paused,
                "next_at": None if paused else next_at,
            }  # fmt: skip
            row = upsert(schedule).values(name=new.name, created_by=new.created_by, **values)
            await connection.execute(
                row.on_conflict_do_update(index_elements=["name"], set_=values | {"updated_at": func.clock_timestamp()})
            )
            return await _get_schedule(connection, new.name)

    async def get_schedule(self, name: str) -> Schedule:
        """The schedule."""
        async with self._engine.connect() as connection:
            return await _get_schedule(connection, name)

    async def find_schedules(self, limit: int, offset: int) -> list[Schedule]:
        """Schedules by name."""
        query = SCHEDULES.order_by(schedule.c.name).limit(limit).offset(offset)
        async with self._engine.connect() as connection:
            return [schedule_of(row) for row in await connection.execute(query)]

    async def pause_schedule(self, name: str, *, paused: bool) -> Schedule:
        """Pauses a schedule, or lets it go on from now: what it did not do meanwhile counts as wanted."""
        async with self._engine.begin() as connection:
            await _lock_or_count(connection, schedule, name, MAX_SCHEDULES)
            before = await _get_schedule(connection, name)
            if before.paused == paused:
                return before
            next_at = None if paused else before.timing.next_after(await self._now(connection))
            values = {"paused": paused, "next_at": next_at, "updated_at": func.clock_timestamp()}
            await connection.execute(update(schedule).where(schedule.c.name == name).values(**values))
            return await _get_schedule(connection, name)

    async def delete_schedule(self, name: str) -> None:
        """Deletes a schedule, and what it has decided but not begun."""
        await self._delete(schedule, name, f"schedule:{name}", f"No schedule with name={name} exists")

    # -- triggers ----------------------------------------------------------------------------

    async def put_trigger(self, new: NewTrigger) -> Trigger:
        """Creates or replaces a trigger, for what happens from now on; one that is replaced misses nothing.

        Raises:
            InvalidInput: the filter, a parameter or the secret is wrong, it would start itself, or the name belongs to
                a trigger of another kind.
        """
        check_trigger(new.parsed.spec, new.kind, new.filter, new.params)
        secret = None if new.secret is None or new.auth is None else stored_secret(new.auth, new.secret)
        async with self._engine.begin() as connection:
            await _lock_or_count(connection, trigger, new.name, MAX_TRIGGERS)
            before = await _find_trigger(connection, new.name)
            if before is not None and before.kind is not new.kind:
                raise InvalidInput(f"{new.name!r} is a {before.kind} trigger; delete it first")
            if new.auth is not None and secret is None and (before is None or before.auth != new.auth):
                raise InvalidInput(f"secret: a webhook with {new.auth} authentication needs one")
            await _add_definition(connection, new.parsed)
            paused = _paused(new.paused, before)
            values = {
                "kind": new.kind, "digest": new.parsed.spec.digest, "params": new.params,
                "filter": new.filter.model_dump(mode="json", exclude_defaults=True), "max_per_hour": new.max_per_hour,
                "paused": paused, "auth": new.auth,
            }  # fmt: skip
            changed: dict[str, Any] = values | {"updated_at": func.clock_timestamp()}
            if secret is not None:
                changed["secret"] = secret
            if before is not None and before.paused and not paused:
                changed["since"] = _SNAPSHOT
            row = upsert(trigger).values(
                name=new.name, created_by=new.created_by, since=_SNAPSHOT, secret=secret, **values
            )
            await connection.execute(row.on_conflict_do_update(index_elements=["name"], set_=changed))
            return await _get_trigger(connection, new.name)

    async def get_trigger(self, name: str) -> Trigger:
        """The trigger."""
        async with self._engine.connect() as connection:
            return await _get_trigger(connection, name)

    async def find_triggers(self, limit: int, offset: int) -> list[Trigger]:
        """Triggers by name."""
        query = TRIGGERS.order_by(trigger.c.name).limit(limit).offset(offset)
        async with self._engine.connect() as connection:
            return [trigger_of(row) for row in await connection.execute(query)]

    async def pause_trigger(self, name: str, *, paused: bool) -> Trigger:
        """Pauses a trigger, or lets it go on with what happens from now on."""
        values: dict[str, Any] = {"paused": paused, "updated_at": func.clock_timestamp()}
        if not paused:
            values["since"] = _SNAPSHOT
        async with self._engine.begin() as connection:
            await connection.execute(
                update(trigger).where(trigger.c.name == name, trigger.c.paused != paused).values(**values)
            )
            return await _get_trigger(connection, name)

    async def delete_trigger(self, name: str) -> None:
        """Deletes a trigger, and what it has decided but not begun."""
        await self._delete(trigger, name, f"trigger:{name}", _no_trigger(name))

    async def fire(
        self, name: str, headers: Mapping[str, str], body: bytes, event: dict[str, Any], event_id: str
    ) -> Recorded | None:
        """A request to a webhook: what it decided, durably, or None when the event is not meant.

        The same ``event_id`` again gives the first decision.

        Args:
            body: the request's bytes, which a signature is of.
            event: the JSON in them.

        Raises:
            PermissionDenied: the secret or the signature is missing or wrong.
            InvalidInput: the trigger is no webhook, or it is paused.
            Overloaded: it has fired too often within the last hour.
        """
        async with self._engine.begin() as connection:
            found = await _get_trigger(connection, name)
            secret = (await connection.execute(select(trigger.c.secret).where(trigger.c.name == name))).scalar_one()
            if found.kind is not Kind.WEBHOOK or found.auth is None:
                raise InvalidInput(f"{name!r} is a {found.kind} trigger; only webhook triggers can be fired")
            verify(Auth(found.auth), secret, headers, body)
            if found.paused:
                raise InvalidInput(f"trigger {name!r} is paused")
            known = await _find_firing(connection, found.source, event_id)
            if known is not None:
                return known
            await self._check_rate(connection, found)
            texts = await load_definitions(connection, [found.digest])
            spec = parse_json(texts[found.digest]).spec
            decided = decide(found, Event(event_id, await self._now(connection), event), spec, [])
            if decided is None:
                return None
            await connection.execute(upsert(firing).values(columns_of(decided)).on_conflict_do_nothing())
            return await _find_firing(connection, found.source, event_id)

    async def _check_rate(self, connection: AsyncConnection, found: Trigger) -> None:
        hour = func.make_interval(0, 0, 0, 0, 1)
        query = (
            select(func.count())
            .select_from(firing)
            .where(firing.c.source == found.source, firing.c.created_at > func.clock_timestamp() - hour)
            .where(firing.c.state != FiringState.SKIPPED)
        )
        if (await connection.execute(query)).scalar_one() >= found.max_per_hour:
            raise Overloaded(f"trigger {found.name!r} has fired {found.max_per_hour} times within an hour")

    # -- both --------------------------------------------------------------------------------

    async def find_firings(self, source: str, limit: int, before: int | None) -> list[Recorded]:
        """What a schedule or a trigger decided, newest first; ``before`` is the last ``firing_id`` of a page."""
        query = FIRINGS.where(firing.c.source == source).order_by(firing.c.firing_id.desc()).limit(limit)
        if before is not None:
            query = query.where(firing.c.firing_id < before)
        async with self._engine.connect() as connection:
            return [recorded_of(row) for row in await connection.execute(query)]

    async def get_firing(self, source: str, event_id: str) -> Recorded:
        """One decision.

        Raises:
            NotFound: there is none about this event.
        """
        async with self._engine.connect() as connection:
            found = await _find_firing(connection, source, event_id)
        if found is None:
            raise NotFound(f"{source} decided nothing about {event_id!r}")
        return found

    async def get_definition(self, digest: str) -> PipelineSpec:
        """A definition that a schedule or a trigger names."""
        async with self._engine.connect() as connection:
            return parse_json((await load_definitions(connection, [digest]))[digest]).spec

    async def _delete(self, table: Table, name: str, source: str, missing: str) -> None:
        async with self._engine.begin() as connection:
            gone = await connection.execute(delete(table).where(table.c.name == name).returning(table.c.name))
            if gone.first() is None:
                raise NotFound(missing)
            pending = firing.c.state == FiringState.PENDING
            await connection.execute(delete(firing).where(firing.c.source == source, pending))

    async def _now(self, connection: AsyncConnection) -> datetime:
        now: datetime = (await connection.execute(select(self._clock))).scalar_one()
        return now


async def _lock_or_count(connection: AsyncConnection, table: Table, name: str, limit: int) -> None:
    """Changes of one row take turns; a new row is refused when there are too many."""
    if (await connection.execute(select(table.c.name).where(table.c.name == name).with_for_update())).first() is None:
        count = (await connection.execute(select(func.count()).select_from(table))).scalar_one()
        if count >= limit:
            raise InvalidInput(f"there are {count} {table.name}s, which is as many as there may be")


def _paused(wanted: bool | None, before: Schedule | Trigger | None) -> bool:
    if wanted is not None:
        return wanted
    return before is not None and before.paused


async def _find_schedule(connection: AsyncConnection, name: str) -> Schedule | None:
    row = (await connection.execute(SCHEDULES.where(schedule.c.name == name))).first()
    return None if row is None else schedule_of(row)


async def _get_schedule(connection: AsyncConnection, name: str) -> Schedule:
    found = await _find_schedule(connection, name)
    if found is None:
        raise NotFound(f"No schedule with name={name} exists")
    return found


async def _find_trigger(connection: AsyncConnection, name: str) -> Trigger | None:
    row = (await connection.execute(TRIGGERS.where(trigger.c.name == name))).first()
    return None if row is None else trigger_of(row)


async def _get_trigger(connection: AsyncConnection, name: str) -> Trigger:
    found = await _find_trigger(connection, name)
    if found is None:
        raise NotFound(_no_trigger(name))
    return found


def _no_trigger(name: str) -> str:
    return f"No trigger with name={name} exists"


async def _find_firing(connection: AsyncConnection, source: str, event_id: str) -> Recorded | None:
    query = FIRINGS.where(firing.c.source == source, firing.c.event_id == event_id)
    row = (await connection.execute(query)).first()
    return None if row is None else recorded_of(row)


async def _add_definition(connection: AsyncConnection, parsed: ParsedSpec) -> None:
    spec = parsed.spec
    values = {"digest": spec.digest, "name": spec.name, "spec": spec.to_json()}
    await connection.execute(upsert(pipeline).values(**values).on_conflict_do_nothing())
