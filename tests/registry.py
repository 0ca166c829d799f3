"""A registry's writer for tests that need no metrics."""

from __future__ import annotations

import pyarrow as pa
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.metrics.queries import Statement
from mlplat.registry.service import RegistryService


async def no_metrics(statement: Statement) -> pa.Table:
    """A metric store that nobody should ask."""
    raise AssertionError(f"metrics were read: {statement.sql}")


def registry_service(engine: AsyncEngine, ttl_s: float = 600.0) -> RegistryService:
    """The registry's writer, not started yet."""
    return RegistryService(engine, LeaseKeeper(engine, "registry", "holder", ttl_s), no_metrics)
