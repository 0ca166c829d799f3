"""Metrics: Arrow batches, group commit to a Postgres log, ClickHouse for reading."""
