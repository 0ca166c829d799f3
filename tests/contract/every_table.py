"""Rows for every table that there is, whatever its columns are, and all rows of a database to compare."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    text,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSON, JSONB

from mlplat.backup.rows import LEFT_OUT
from mlplat.db.engine import open_sync_engine
from mlplat.db.tables import metadata

TABLES = [table for table in metadata.sorted_tables if table.name not in LEFT_OUT]
#: What text formats get wrong.
AWKWARD = "tab\tnew\nline\rback\\slash \\N \\. quote'\" é 漢 😀 \x01"
NUMBERS = (float("inf"), float("-inf"), 0.1 + 0.2, -0.0, 5e-324, float("nan"))
ROWS = 4


def fill(url: str) -> None:
    """A few rows in each table, with references, nulls and awkward values."""
    engine = open_sync_engine(url, "tests")
    try:
        with engine.begin() as connection:
            known: dict[str, list[dict[str, Any]]] = {}
            for table in TABLES:
                known[table.name] = [_insert(connection, table, number, known) for number in range(ROWS)]
    finally:
        engine.dispose()


def contents(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, as text, in an order of their own."""
    engine = open_sync_engine(url, "tests")
    try:
        with engine.connect() as connection:
            return {
                table.name: sorted(
                    tuple(row) for row in connection.execute(text(f'SELECT "{table.name}"::text FROM "{table.name}"'))
                )
                for table in TABLES
            }
    finally:
        engine.dispose()


def _insert(
    connection: Connection, table: Table, number: int, known: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    values = {
        column.name: _value(column, number, known)
        for column in table.columns
        if column.computed is None and column.identity is None
    }
    returned = connection.execute(table.insert().values(**values).returning(*table.columns))
    return dict(returned.one()._mapping)


def _value(column: Column[Any], number: int, known: dict[str, list[dict[str, Any]]]) -> Any:
    for key in column.foreign_keys:
        if key.column.table.name in known:
            return known[key.column.table.name][number][key.column.name]
    if column.nullable and number == 0:
        return None
    kind = column.type
    if isinstance(kind, (BigInteger, SmallInteger, Integer)):
        return number + 1
    by_kind: list[tuple[type, Any]] = [
        (ARRAY, [number, -1, 3]),
        (Boolean, number % 2 == 0),
        (DateTime, datetime(2026, 1, 1, tzinfo=UTC) + timedelta(microseconds=number)),
        (LargeBinary, bytes([number, 0, 255, 92, 10])),
        (DOUBLE_PRECISION, NUMBERS[number % len(NUMBERS)]),
        (JSONB, [{"a": AWKWARD.replace("\x01", ""), "n": number}]),
        (JSON, {"z": 1, "a": json.dumps(AWKWARD), "n": [1.50, number]}),
    ]
    return next((value for known_kind, value in by_kind if isinstance(kind, known_kind)), f"{number}{AWKWARD}")
