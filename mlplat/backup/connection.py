"""The Postgres connection of a backup or a restore: its statements may take hours, and text means the same anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from mlplat.db.engine import psycopg_arguments
from mlplat.errors import Unavailable

#: Bounds for one table, and for a lock that somebody else holds.
STATEMENT_TIMEOUT_MS, LOCK_TIMEOUT_MS = 12 * 3600 * 1000, 60_000
_SETTINGS = {
    "statement_timeout": STATEMENT_TIMEOUT_MS,
    "idle_in_transaction_session_timeout": STATEMENT_TIMEOUT_MS,
    "lock_timeout": LOCK_TIMEOUT_MS,
    "timezone": "UTC",
    "datestyle": "ISO",
    "extra_float_digits": 1,
    "bytea_output": "hex",
}
Connection = psycopg.Connection[Any]


@contextmanager
def connected(url: str, application: str) -> Iterator[Connection]:
    """A connection in autocommit mode, closed at the end.

    Raises:
        Unavailable: Postgres is away, refuses, or went away meanwhile.
    """
    options = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
    try:
        connection = psycopg.connect(
            **psycopg_arguments(url, application) | {"options": options, "client_encoding": "utf8"}, autocommit=True
        )
        try:
            yield connection
        finally:
            connection.close()
    except psycopg.Error as error:
        raise Unavailable(f"Postgres: {(str(error) or type(error).__name__).splitlines()[0]}") from error
