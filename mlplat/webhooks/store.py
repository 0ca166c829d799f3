"""Webhooks and their deliveries in Postgres: what everybody may read and change."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, Text, cast, delete, func, insert, select, text, update
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.snapshots import Snapshot
from mlplat.db.tables import registry_event, webhook, webhook_delivery
from mlplat.errors import AlreadyExists, NotFound, Overloaded
from mlplat.pipelines.automation.triggers import REGISTRY_EVENTS
from mlplat.webhooks.model import Delivery, DeliveryState, Status, Webhook, delivery_id, event_of

MAX_WEBHOOKS = 1_000
#: What is read of a webhook; its secret is read where something is signed, and nowhere else.
COLUMNS = [column for column in webhook.c if column.name != "secret"]
_SNAPSHOT = cast(func.pg_current_snapshot(), Text)


@dataclass(frozen=True)
class NewWebhook:
    """A webhook as somebody wants it, checked already."""

    name: str
    url: str
    secret: str = field(repr=False)
    kinds: frozenset[str] = frozenset()
    model: str = "*"
    description: str = ""
    status: Status = Status.ACTIVE

    @property
    def columns(self) -> dict[str, Any]:
        """As the table has it."""
        return {
            "name": self.name, "url": self.url, "secret": self.secret, "kinds": sorted(self.kinds),
            "model": self.model, "description": self.description, "status": self.status,
        }  # fmt: skip


class WebhookStore:
    """All methods are safe to call concurrently. ``get_*`` raises NotFound, ``find_*`` returns lists.

    A webhook is found by its id or its name.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(self, new: NewWebhook) -> Webhook:
        """Adds a webhook, for what happens from now on. One that is there exactly so is that one.

        Raises:
            AlreadyExists: another one has the name.
            Overloaded: there are too many.
        """
        with _hidden_values():
            async with self._engine.begin() as connection:
                await connection.execute(text("LOCK TABLE webhook IN SHARE ROW EXCLUSIVE MODE"))
                there = (await connection.execute(select(webhook).where(webhook.c.name == new.name))).first()
                if there is not None:
                    if any(there._mapping[name] != value for name, value in new.columns.items()):
                        raise AlreadyExists(f"a webhook with the name {new.name!r} already exists")
                    return webhook_of(there)
                count = (await connection.execute(select(func.count()).select_from(webhook))).scalar_one()
                if count >= MAX_WEBHOOKS:
                    raise Overloaded(f"there are {count} webhooks, as many as there may be; delete one first")
                row = insert(webhook).values(webhook_id=uuid.uuid4().hex, since=_SNAPSHOT, **new.columns)
                return webhook_of((await connection.execute(row.returning(*COLUMNS))).one())

    async def get(self, key: str) -> Webhook:
        """The webhook."""
        async with self._engine.connect() as connection:
            return webhook_of(await _get(connection, select(*COLUMNS).where(_is(key)), key))

    async def get_with_secret(self, key: str) -> tuple[Webhook, str]:
        """The webhook, for somebody who signs something."""
        async with self._engine.connect() as connection:
            row = await _get(connection, select(webhook).where(_is(key)), key)
            return webhook_of(row), row.secret

    async def find(self, limit: int, offset: int) -> list[Webhook]:
        """Webhooks by name."""
        query = select(*COLUMNS).order_by(webhook.c.name).limit(limit).offset(offset)
        async with self._engine.connect() as connection:
            return [webhook_of(row) for row in await connection.execute(query)]

    async def change(self, key: str, values: Mapping[str, Any]) -> Webhook:
        """Replaces columns. One that is enabled gets what happens from now on, and what was noted for it before.

        Raises:
            AlreadyExists: another one has the name.
        """
        with _hidden_values():
            async with self._engine.begin() as connection:
                await connection.execute(text("LOCK TABLE webhook IN SHARE ROW EXCLUSIVE MODE"))
                before = await _get(connection, select(*COLUMNS).where(_is(key)), key)
                taken = select(webhook.c.name).where(
                    webhook.c.name == values.get("name"), webhook.c.webhook_id != before.webhook_id
                )
                if (await connection.execute(taken)).first() is not None:
                    raise AlreadyExists(f"a webhook with the name {values['name']!r} already exists")
                new = {**values, "updated_at": func.clock_timestamp()}
                if "status" in values:
                    new["status_reason"] = ""
                    if values["status"] == Status.ACTIVE and before.status != Status.ACTIVE:
                        new["since"] = _SNAPSHOT
                changed = update(webhook).where(webhook.c.webhook_id == before.webhook_id).values(**new)
                return webhook_of((await connection.execute(changed.returning(*COLUMNS))).one())

    async def delete(self, key: str) -> Webhook:
        """Deletes a webhook with its deliveries; returns what it was."""
        async with self._engine.begin() as connection:
            return webhook_of(await _get(connection, delete(webhook).where(_is(key)).returning(*COLUMNS), key))

    async def find_deliveries(
        self, key: str, state: DeliveryState | None, limit: int, before: int | None
    ) -> list[Delivery]:
        """What became of its events, newest first; ``before`` is the last ``number`` of the page before."""
        webhook_id = (await self.get(key)).webhook_id
        query = _DELIVERIES.where(webhook_delivery.c.webhook_id == webhook_id)
        if state is not None:
            query = query.where(webhook_delivery.c.state == state)
        if before is not None:
            query = query.where(webhook_delivery.c.number < before)
        async with self._engine.connect() as connection:
            rows = await connection.execute(query.order_by(webhook_delivery.c.number.desc()).limit(limit))
            return [_delivery(row) for row in rows]

    async def redeliver(self, key: str, delivery: str) -> Delivery:
        """Sends an event again, with all its attempts: at once, or when it is its turn."""
        webhook_id, event_id = (await self.get(key)).webhook_id, event_of(delivery)
        which = (webhook_delivery.c.webhook_id == webhook_id) & (webhook_delivery.c.event_id == event_id)
        again = update(webhook_delivery).where(which).values(
            state=DeliveryState.PENDING, attempts=0, next_attempt_at=func.clock_timestamp(), ended_at=None
        )  # fmt: skip
        async with self._engine.begin() as connection:
            done = await connection.execute(again)
            if event_id is None or delivery_id(webhook_id, event_id) != delivery or not done.rowcount:
                raise NotFound(f"the webhook {key!r} has no delivery {delivery[:80]!r}")
            return _delivery((await connection.execute(_DELIVERIES.where(which))).one())


def webhook_of(row: Row[Any]) -> Webhook:
    """A row as a webhook."""
    return Webhook(
        row.webhook_id, row.name, row.url, frozenset(row.kinds), row.model, Status(row.status), row.status_reason,
        row.description, Snapshot.parse(row.since), row.created_at, row.updated_at,
    )  # fmt: skip


@contextmanager
def _hidden_values() -> Iterator[None]:
    """An error of a statement says which values it had, wherever it is logged; one of them is a secret."""
    try:
        yield
    except StatementError as error:
        error.hide_parameters = True
        raise


async def _get(connection: AsyncConnection, statement: Any, key: str) -> Row[Any]:
    row: Row[Any] | None = (await connection.execute(statement)).first()
    if row is None:
        raise NotFound(f"No webhook with the id or name {key[:80]!r} exists")
    return row


def _is(key: str) -> ColumnElement[bool]:
    """By id first: a name that is another one's id finds that one."""
    by_id = select(webhook.c.webhook_id).where(webhook.c.webhook_id == key)
    return (webhook.c.webhook_id == key) | ((webhook.c.name == key) & ~by_id.exists())


def _delivery(row: Row[Any]) -> Delivery:
    state = DeliveryState(row.state)
    is_pending, is_delivered = state is DeliveryState.PENDING, state is DeliveryState.DELIVERED
    return Delivery(
        row.number, delivery_id(row.webhook_id, row.event_id), row.event_id, REGISTRY_EVENTS.get(row.kind, row.kind),
        row.name, state, row.attempts, row.next_attempt_at if is_pending else None, row.last_status, row.last_error,
        row.created_at, row.attempted_at, row.ended_at if is_delivered else None,
    )  # fmt: skip


_DELIVERIES: Select[Any] = select(webhook_delivery, registry_event.c.kind, registry_event.c.name).join(registry_event)
