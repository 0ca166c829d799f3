"""The tables of moves in the registry that need approvals, and of what was refused."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Identity, Index, Table, Text, text
from sqlalchemy.dialects.postgresql import JSONB

from mlplat.db.metadata import metadata
from mlplat.db.metadata import time_column as _time

move_request = Table(
    "move_request",
    metadata,
    Column("move_id", BigInteger, Identity(), primary_key=True),
    # No reference: what was asked for and approved stays when the model is deleted.
    Column("model_id", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("subject", Text, nullable=False),
    # The stage or the alias, and what was there when the move was asked for.
    Column("target", Text, nullable=False),
    Column("before", Text, nullable=False),
    Column("archive_others", Boolean, nullable=False),
    Column("state", Text, nullable=False, server_default="OPEN"),
    Column("user_id", Text, nullable=False),
    Column("reason", Text, nullable=False),
    _time("created_at", default=True),
    _time("expires_at"),
    _time("closed_at", nullable=True),
    Index(None, "model_id", "move_id"),
    Index("ix_move_request_open", "model_id", "move_id", postgresql_where=text("state = 'OPEN'")),
)

move_decision = Table(
    "move_decision",
    metadata,
    Column("move_id", ForeignKey("move_request.move_id"), primary_key=True),
    Column("user_id", Text, primary_key=True),
    Column("approve", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    _time("created_at", default=True),
)

registry_refusal = Table(
    "registry_refusal",
    metadata,
    Column("refusal_id", BigInteger, Identity(), primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    # No reference, and none at all if there was no such model.
    Column("model_id", BigInteger, nullable=True),
    Column("commands", JSONB, nullable=False),
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("reason", Text, nullable=False),
    _time("created_at", default=True),
    Index(None, "name", "refusal_id"),
    Index(None, "model_id", "refusal_id"),
)
