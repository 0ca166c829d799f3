"""How this project connects to Postgres."""

from __future__ import annotations

from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 30_000
POOL_TIMEOUT_S = 10

#: Errors that mean "Postgres is away or the connection broke": the same call may succeed later.
CONNECTION_ERRORS = (OperationalError, InterfaceError, PoolTimeoutError)


def _connect_args(application: str) -> dict[str, object]:
    return {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "application_name": f"mlplat {application}",
        "options": f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c timezone=UTC",
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }


def open_engine(url: str, application: str, pool_size: int) -> AsyncEngine:
    """An async engine with bounded connections and timeouts; ``application`` shows in pg_stat_activity."""
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_TIMEOUT_S,
        pool_pre_ping=True,
        connect_args=_connect_args(application),
    )


def open_sync_engine(url: str, application: str) -> Engine:
    """A blocking engine of one connection, for migrations and bring-up."""
    return create_engine(url, pool_size=1, max_overflow=0, connect_args=_connect_args(application))


def is_serialization_failure(error: DBAPIError) -> bool:
    """True for SQLSTATE 40001 and 40P01: the transaction lost a race and may simply run again."""
    return getattr(error.orig, "sqlstate", None) in {"40001", "40P01"}


def is_unique_violation(error: DBAPIError) -> bool:
    """True for SQLSTATE 23505."""
    return getattr(error.orig, "sqlstate", None) == "23505"
