"""The tables of outgoing webhooks."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Identity, Index, Integer, Table, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB

from mlplat.db.metadata import metadata
from mlplat.db.metadata import time_column as _time

webhook = Table(
    "webhook",
    metadata,
    Column("webhook_id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("url", Text, nullable=False),
    # The key itself, without which nothing can be signed.
    Column("secret", Text, nullable=False),
    # Kinds of events; none: all.
    Column("kinds", JSONB, nullable=False),
    Column("model", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("status_reason", Text, nullable=False, server_default=""),
    Column("description", Text, nullable=False, server_default=""),
    # A snapshot: what had happened before the webhook was there, or was enabled, is none of its events.
    Column("since", Text, nullable=False),
    _time("created_at", default=True),
    _time("updated_at", default=True),
)

# The outbox: what has to be sent, and what became of it.
webhook_delivery = Table(
    "webhook_delivery",
    metadata,
    # In the order of the events' commits.
    Column("number", BigInteger, Identity(), primary_key=True),
    Column("webhook_id", ForeignKey("webhook.webhook_id", ondelete="CASCADE"), nullable=False),
    Column("event_id", ForeignKey("registry_event.event_id"), nullable=False),
    # A model's id: what is pending of a webhook and a lane goes out one after another.
    Column("lane", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    # The epoch of the last attempt.
    Column("epoch", BigInteger, nullable=True),
    _time("next_attempt_at", default=True),
    Column("last_status", Integer, nullable=True),
    Column("last_error", Text, nullable=False, server_default=""),
    _time("created_at", default=True),
    _time("attempted_at", nullable=True),
    _time("ended_at", nullable=True),
    UniqueConstraint("webhook_id", "event_id"),
    Index("ix_webhook_delivery_pending", "webhook_id", "lane", "number", postgresql_where=text("state = 'PENDING'")),
    Index("ix_webhook_delivery_ended", "ended_at", postgresql_where=text("state <> 'PENDING'")),
    Index(None, "webhook_id", "number"),
)
