"""The registry's log of events, read in the order of commits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.snapshots import Snapshot, seen_values, unseen
from mlplat.errors import InvalidInput
from mlplat.events.model import Cursor, RegistryEvent, describe, steps

#: Events in one read, and as many more as their last transaction has.
PAGE = 200
#: Postgres' first transaction of all.
BEGINNING = Cursor(Snapshot(3, frozenset()))


@dataclass(frozen=True)
class Page:
    """Events in the order of commits.

    Args:
        cursors: where a reader is after each of them.
        end: where to read on.
        is_last: there are no more for now.
    """

    events: Sequence[RegistryEvent]
    cursors: Sequence[Cursor]
    end: Cursor
    is_last: bool


class EventLog:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        # Each statement sees what is committed: no transaction around it, and no round trips for one.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def read(self, after: Cursor, limit: int = PAGE, until: Snapshot | None = None) -> Page:
        """The events that follow; with ``until``, only those that it sees.

        Raises:
            InvalidInput: the cursor is of another database.
        """
        async with self._engine.connect() as connection:
            return await read_page(connection, after, limit, until)

    async def now(self) -> Snapshot:
        """What is committed now."""
        async with self._engine.connect() as connection:
            return Snapshot.parse((await connection.execute(_NOW)).scalar_one())

    async def at(self, moment: datetime) -> Cursor:
        """Where a reader is who wants what has happened since a moment."""
        async with self._engine.connect() as connection:
            row = (await connection.execute(_SINCE, {"moment": moment})).one()
        return Cursor(Snapshot.parse(row.now) if row.first is None else Snapshot(row.first, frozenset()))


async def read_page(connection: AsyncConnection, after: Cursor, limit: int, until: Snapshot | None = None) -> Page:
    """See ``EventLog.read``."""
    values = {
        **seen_values(after.seen), "page": limit, "until": None if until is None else str(until),
        "begun": [transaction for transaction, _last in after.parts], "last": [last for _transaction, last in
        after.parts],
    }  # fmt: skip
    rows = (await connection.execute(_READ, values)).all()
    now = Snapshot.parse(rows[0].snapshot)
    if after.seen.end > now.end:
        raise InvalidInput("the cursor is of another database, or of a later state of this one; start without one")
    events = [_event(row) for row in rows if row.txid is not None]
    cursors = steps(after, until or now, events)
    is_last = len(events) < limit
    return Page(events, cursors, Cursor(after.seen | (until or now)) if is_last else cursors[-1], is_last)


async def get_event(connection: AsyncConnection, event_id: int) -> RegistryEvent:
    """An event that is there: none is ever deleted."""
    return _event((await connection.execute(_FIND, {"event_id": event_id})).one())


def _event(row: Row[Any]) -> RegistryEvent:
    fields = row.fields | ({"omitted": row.omitted} if row.omitted else {})
    body = describe(row.event_id, row.kind, row.name, row.created_at.isoformat(), row.user_id, row.reason, fields)
    return RegistryEvent(row.event_id, row.txid, row.model_id, body)


_NOW = text("SELECT pg_current_snapshot()::text")

# What is beyond the server's own counter comes from another one, see ``unseen``.
_SINCE = text("""
    SELECT pg_current_snapshot()::text AS now,
           (SELECT min(txid) FROM registry_event WHERE created_at >= :moment
            AND txid < pg_snapshot_xmax(pg_current_snapshot())::text::bigint) AS first
""")

# A description or a tag can be large, and so is every signature; who needs them asks for the model.
_TOLD = """
    event_id, txid, model_id, kind, name, user_id, reason, created_at,
    (SELECT coalesce(jsonb_object_agg(key, value), '{}') FROM jsonb_each(fields)
     WHERE octet_length(value::text) <= 8000 AND key <> 'signature') AS fields,
    ARRAY(SELECT key FROM jsonb_each(fields)
          WHERE octet_length(value::text) > 8000 AND key <> 'signature' ORDER BY key) AS omitted
"""

_READ = text(f"""
    WITH found AS (
        SELECT event_id, txid, model_id, kind, name, user_id, reason, created_at, command || answer AS fields
        FROM registry_event WHERE {unseen("txid")}
        AND (CAST(:until AS text) IS NULL
             OR pg_visible_in_snapshot(txid::text::xid8, CAST(CAST(:until AS text) AS pg_snapshot)))
        AND NOT EXISTS (SELECT FROM unnest(CAST(:begun AS bigint[]), CAST(:last AS bigint[])) AS part(txid, last)
                        WHERE part.txid = registry_event.txid AND event_id <= part.last)
        ORDER BY txid FETCH FIRST (:page) ROWS WITH TIES
    )
    SELECT pg_current_snapshot()::text AS snapshot, {_TOLD}
    FROM (VALUES (1)) AS one(n) LEFT JOIN found ON true ORDER BY txid, event_id
""")  # noqa: S608 - of the constants above

_FIND = text(f"""
    SELECT {_TOLD} FROM (SELECT *, command || answer AS fields FROM registry_event WHERE event_id = :event_id) AS found
""")  # noqa: S608 - of the constants above
