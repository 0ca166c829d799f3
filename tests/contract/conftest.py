"""Stores shared by the contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.artifacts.store import ArtifactStore
from mlplat.metrics.store import MetricStore
from tests.contract.chdb import abandon, new_service, shared_store, unique
from tests.contract.lifecycle import Shard, World


@pytest.fixture(scope="session")
def metric_store() -> MetricStore:
    """The process' chDB."""
    return shared_store()


@pytest.fixture
async def world(engine: AsyncEngine, tmp_path: Path) -> AsyncIterator[World]:
    """Empty stores of this test's own, but for the metric store, which all share."""
    service = new_service(engine, unique("shard"))
    await service.start()
    yield World(engine, Shard(service), ArtifactStore(f"file://{tmp_path}"), tmp_path)
    await abandon(service)
