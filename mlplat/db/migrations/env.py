"""Alembic's entry point: migrations run on the connection that ``migrate`` hands over."""

from __future__ import annotations

from alembic import context

from mlplat.db.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run migrations through mlplat.db.migrate.migrate()")

context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=True)
with context.begin_transaction():
    context.run_migrations()
