"""The one chDB path of the test process, and services over it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from functools import cache

from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.metrics.service import MetricService
from mlplat.metrics.store import MetricStore


@cache
def shared_store() -> MetricStore:
    """A store that stays open until the process ends, with its tables. chDB allows one path per process."""
    folder = tempfile.mkdtemp(prefix="mlt-chdb-", dir="/tmp")
    store = MetricStore(f"chdb://{folder}/chdb")
    store.create_tables()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(store.close)
    return store


def another_store() -> MetricStore:
    """A store of its own on the shared path: closing it leaves the others open."""
    return MetricStore(shared_store()._url)


def new_service(engine: AsyncEngine, shard: str, holder: str = "holder", ttl_s: float = 60.0) -> MetricService:
    """A metric shard on the shared store; ``await start()`` it."""
    return MetricService(engine, another_store(), LeaseKeeper(engine, shard, holder, ttl_s), shard)


def unique(prefix: str) -> str:
    """A name that no other test uses."""
    return f"{prefix}-{uuid.uuid4().hex[:10]}"
