"""Databases for fixtures that outlive one test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import open_engine, open_sync_engine
from mlplat.settings import embedded_postgres_url


@asynccontextmanager
async def own_database(template_url: str, state_dir: Path) -> AsyncIterator[AsyncEngine]:
    """An engine on a fresh copy of the migrated template."""
    admin, name = embedded_postgres_url(state_dir), f"own_{uuid.uuid4().hex[:12]}"
    template = template_url.partition("?")[0].rpartition("/")[2]
    _execute(admin, f"CREATE DATABASE {name} TEMPLATE {template}")
    engine = open_engine(admin.replace("/mlplat?", f"/{name}?"), "tests", pool_size=12)
    try:
        yield engine
    finally:
        await engine.dispose()
        _execute(admin, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(url: str, statement: str) -> None:
    engine = open_sync_engine(url, "tests")
    try:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(statement))
    finally:
        engine.dispose()
