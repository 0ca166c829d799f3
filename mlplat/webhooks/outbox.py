"""The outbox of webhooks, for the coordinator: its writes are fenced by its lease."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

import msgspec
from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.lease import Lease, LeaseKeeper
from mlplat.db.snapshots import Snapshot
from mlplat.db.tables import event_cursor, webhook, webhook_delivery
from mlplat.errors import InvalidInput
from mlplat.events.log import PAGE, get_event, read_page
from mlplat.events.model import Cursor, RegistryEvent
from mlplat.webhooks.model import DeliveryState, Status, Webhook
from mlplat.webhooks.store import COLUMNS, webhook_of

ORIGIN = "webhooks"
#: What waits for one webhook. When it is more, its receiver has been away for too long.
MAX_PENDING = 100_000
ROWS_AT_ONCE = 5_000
KEPT = {DeliveryState.DELIVERED: timedelta(days=7), DeliveryState.DEAD: timedelta(days=30)}
PRUNED_AT_ONCE = 10_000


@dataclass(frozen=True)
class Due:
    """A delivery whose time has come."""

    number: int
    webhook_id: str


@dataclass(frozen=True)
class Claim:
    """An attempt that is counted already, with all that is needed to make it."""

    number: int
    attempt: int
    webhook_id: str
    url: str
    secret: str
    event: RegistryEvent

    def __repr__(self) -> str:
        """Without the secret."""
        return f"Claim({self.number}, attempt {self.attempt})"


class Outbox:
    """Every write raises ``Fenced`` when another coordinator is in charge."""

    def __init__(self, engine: AsyncEngine, lease: LeaseKeeper) -> None:
        self._engine = engine
        self._lease = lease

    async def fill(self) -> bool:
        """Notes a page of new events for the webhooks that want them; False: there are no more for now."""
        async with self._engine.connect() as connection:
            found = await _active(connection)
            if not found:
                return False
            cursor = select(event_cursor.c.snapshot).where(event_cursor.c.origin == ORIGIN)
            known = (await connection.execute(cursor)).scalar()
            before = min(item.since for item in found)  # nobody means what was there before
            if known is not None:
                before = max(before, Snapshot.parse(known))
            try:
                page = await read_page(connection, Cursor(before), PAGE)
            except InvalidInput:  # an older state of this database was restored
                await self._start_over()
                return True
            if not page.events:
                return False
            # Read after the events: a webhook that has come meanwhile knows by itself which of them are its own.
            found = await _active(connection)
        await self._note(page.end.seen, _rows(found, page.events))
        return not page.is_last

    async def find_due(
        self, underway: Collection[int], busy: Collection[str], each: int, limit: int
    ) -> tuple[Sequence[Due], float | None]:
        """The first deliveries of their lanes whose time has come, those that never failed first.

        Args:
            underway: those that are being made.
            busy: webhooks that get no more now.
            each: of one webhook.

        Returns:
            Seconds until the next one is due as well; None if there is none.
        """
        values = {"underway": list(underway), "busy": list(busy), "each": each, "limit": limit}
        async with self._engine.connect() as connection:
            rows = (await connection.execute(_DUE, values)).all()
        return [Due(row.number, row.webhook_id) for row in rows if row.number is not None], rows[0].wait_s

    async def claim(self, number: int) -> Claim | None:
        """Counts an attempt, before it is made; None: there is nothing to do any more."""
        held = self._lease.current
        async with self._engine.begin() as connection:
            await held.check(connection)
            row = (await connection.execute(_CLAIM, {"number": number, "epoch": held.epoch})).first()
            if row is None:
                return None
            event = await get_event(connection, row.event_id)
        return Claim(number, row.attempts, row.webhook_id, row.url, row.secret, event)

    async def finish(
        self, claim: Claim, state: DeliveryState, status: int | None, error: str, delay_s: float = 0.0
    ) -> None:
        """Notes what became of an attempt; not if somebody has asked for the delivery again meanwhile."""
        values = {
            "number": claim.number, "attempt": claim.attempt, "state": state, "status": status, "error": error,
            "delay_s": delay_s,
        }  # fmt: skip
        async with self._engine.begin() as connection:
            await self._lease.current.check(connection)
            await connection.execute(_FINISH, values)

    async def prune(self) -> int:
        """Forgets what was delivered a week ago, and what was given up a month ago; returns how much."""
        pruned = 0
        for state, kept in KEPT.items():
            old = (
                select(webhook_delivery.c.number)
                .where(webhook_delivery.c.state == state, webhook_delivery.c.ended_at < func.clock_timestamp() - kept)
                .limit(PRUNED_AT_ONCE)
            )
            async with self._engine.begin() as connection:
                await self._lease.current.check(connection)
                done = await connection.execute(delete(webhook_delivery).where(webhook_delivery.c.number.in_(old)))
                pruned += done.rowcount
        return pruned

    async def _note(self, read_to: Snapshot, rows: Sequence[tuple[str, int, int]]) -> None:
        """Notes deliveries, and that the events are read, at once."""
        held = self._lease.current
        async with self._engine.begin() as connection:
            await _move_cursor(connection, held, str(read_to))
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = msgspec.json.encode(rows[start : start + ROWS_AT_ONCE]).decode()
                await connection.execute(_ADD, {"rows": part})
            full = {"ids": sorted({webhook_id for webhook_id, *_event in rows}), "most": MAX_PENDING}
            full["reason"] = f"more than {MAX_PENDING:,} events waited for it"
            await connection.execute(_DISABLE_FULL, full)

    async def _start_over(self) -> None:
        held = self._lease.current
        async with self._engine.begin() as connection:
            now = (await connection.execute(text("SELECT pg_current_snapshot()::text"))).scalar_one()
            await _move_cursor(connection, held, now)
            await connection.execute(_RESTART, {"now": now})


async def _active(connection: AsyncConnection) -> list[Webhook]:
    query = select(*COLUMNS).where(webhook.c.status == Status.ACTIVE)
    return [webhook_of(row) for row in await connection.execute(query)]


def _rows(webhooks: Sequence[Webhook], events: Sequence[RegistryEvent]) -> list[tuple[str, int, int]]:
    return [
        (item.webhook_id, event.event_id, event.lane or 0)
        for event in events
        for item in webhooks
        if not item.since.sees(event.transaction) and item.filter.accepts(event)
    ]


async def _move_cursor(connection: AsyncConnection, held: Lease, snapshot: str) -> None:
    await held.check(connection)
    cursor = upsert(event_cursor).values(origin=ORIGIN, snapshot=snapshot)
    await connection.execute(
        cursor.on_conflict_do_update(index_elements=["origin"], set_={"snapshot": cursor.excluded.snapshot})
    )


# A webhook may be deleted meanwhile.
_ADD = text("""
    INSERT INTO webhook_delivery (webhook_id, event_id, lane, state)
    SELECT w.webhook_id, (r.row ->> 1)::bigint, (r.row ->> 2)::bigint, 'PENDING'
    FROM json_array_elements(CAST(:rows AS json)) WITH ORDINALITY AS r(row, place)
    JOIN webhook AS w ON w.webhook_id = r.row ->> 0
    ORDER BY r.place FOR KEY SHARE OF w
    ON CONFLICT DO NOTHING
""")

_DISABLE_FULL = text("""
    UPDATE webhook AS w SET status = 'DISABLED', status_reason = :reason, updated_at = clock_timestamp()
    WHERE w.webhook_id = ANY(:ids) AND (SELECT count(*) FROM webhook_delivery AS d
        WHERE d.webhook_id = w.webhook_id AND d.state = 'PENDING') > :most
""")

_RESTART = text("""
    UPDATE webhook SET since = :now
    WHERE pg_snapshot_xmax(CAST(since AS pg_snapshot)) > pg_snapshot_xmax(CAST(CAST(:now AS text) AS pg_snapshot))
""")

# From lane to lane along the index, past all that waits behind the first delivery of each.
_DUE = text("""
    WITH RECURSIVE lane AS (
        (SELECT webhook_id, lane FROM webhook_delivery WHERE state = 'PENDING' ORDER BY webhook_id, lane LIMIT 1)
        UNION ALL
        SELECT following.webhook_id, following.lane FROM lane CROSS JOIN LATERAL (
            SELECT d.webhook_id, d.lane FROM webhook_delivery AS d
            WHERE d.state = 'PENDING' AND (d.webhook_id, d.lane) > (lane.webhook_id, lane.lane)
            ORDER BY d.webhook_id, d.lane LIMIT 1) AS following
    ), head AS (
        SELECT first.* FROM lane JOIN webhook AS w ON w.webhook_id = lane.webhook_id AND w.status = 'ACTIVE'
        CROSS JOIN LATERAL (
            SELECT d.number, d.webhook_id, d.attempts, d.next_attempt_at FROM webhook_delivery AS d
            WHERE d.state = 'PENDING' AND d.webhook_id = lane.webhook_id AND d.lane = lane.lane
            ORDER BY d.number LIMIT 1) AS first
    ), ranked AS (
        SELECT *, row_number() OVER (PARTITION BY webhook_id ORDER BY attempts, number) AS place
        FROM head WHERE next_attempt_at <= clock_timestamp()
        AND number <> ALL(CAST(:underway AS bigint[])) AND webhook_id <> ALL(CAST(:busy AS text[]))
    ), next AS (
        SELECT extract(epoch FROM min(next_attempt_at) - clock_timestamp())::float AS wait_s
        FROM head WHERE next_attempt_at > clock_timestamp()
    )
    SELECT ranked.number, ranked.webhook_id, next.wait_s FROM next LEFT JOIN ranked ON place <= :each
    ORDER BY attempts, next_attempt_at, number LIMIT :limit
""")

_CLAIM = text("""
    UPDATE webhook_delivery AS d SET attempts = attempts + 1, attempted_at = clock_timestamp(), epoch = :epoch
    FROM webhook AS w WHERE d.number = :number AND d.state = 'PENDING'
    AND w.webhook_id = d.webhook_id AND w.status = 'ACTIVE'
    RETURNING d.attempts, d.event_id, d.webhook_id, w.url, w.secret
""")

_FINISH = text("""
    UPDATE webhook_delivery SET state = CAST(:state AS text), last_status = :status, last_error = :error,
        next_attempt_at = clock_timestamp() + make_interval(secs => :delay_s),
        ended_at = CASE WHEN CAST(:state AS text) = 'PENDING' THEN NULL ELSE clock_timestamp() END
    WHERE number = :number AND state = 'PENDING' AND attempts = :attempt
""")
