"""Postgres: engine, tables, migrations, leases and group commit."""
