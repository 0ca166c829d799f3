"""The registry's record of what was asked, answered and changed, written in the transaction of the change itself.

Its statements are built once: building one takes longer than Postgres takes for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Text, bindparam, column, func, insert, select, true
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import registry_change, registry_event
from mlplat.errors import InvalidInput
from mlplat.registry.history import Change
from mlplat.registry.model import Command

_KNOWN = (
    select(registry_event.c.kind, registry_event.c.command, registry_event.c.answer)
    .where(registry_event.c.request_id == bindparam("request_id"), registry_event.c.part >= 0)
    .order_by(registry_event.c.part)
)
_EVENT_COLUMNS = ("request_id", "part", "kind", "name", "model_id", "command", "answer", "user_id", "reason", "epoch")
_CHANGE_COLUMNS = ("subject", "key", "before", "after")
_EVENT = (
    insert(registry_event)
    .values({name: bindparam(name) for name in _EVENT_COLUMNS})
    .returning(registry_event.c.event_id, registry_event.c.model_id)
    .cte("event")
)
_CHANGES = (
    func.jsonb_to_recordset(bindparam("changes", type_=JSONB))
    .table_valued(*(column(name, Text) for name in _CHANGE_COLUMNS), name="change")
    .render_derived(with_types=True)
)
_RECORD = insert(registry_change).from_select(
    ["event_id", "model_id", *_CHANGE_COLUMNS],
    select(_EVENT.c.event_id, _EVENT.c.model_id, *(_CHANGES.c[name] for name in _CHANGE_COLUMNS)).select_from(
        _EVENT.join(_CHANGES, true())
    ),
)


async def known_answers(
    connection: AsyncConnection, request_id: str, commands: Sequence[Command]
) -> list[dict[str, Any]] | None:
    """What the request was answered before; None if it is new.

    Raises:
        InvalidInput: it asked for something else then.
    """
    rows = (await connection.execute(_KNOWN, {"request_id": request_id})).all()
    if not rows:
        return None
    if [(row.kind, row.command) for row in rows] != [(type(command).__name__, asdict(command)) for command in commands]:
        raise InvalidInput(f"the idempotency key {request_id!r} was used for another request")
    return [dict(row.answer) for row in rows]


async def record(connection: AsyncConnection, event: dict[str, Any], changes: Sequence[Change]) -> None:
    """Appends an event, whose keys are columns of ``registry_event``, and its changes, in their order."""
    await connection.execute(_RECORD, event | {"changes": [asdict(change) for change in changes]})
