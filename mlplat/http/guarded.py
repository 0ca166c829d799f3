"""Writes to the artifact store that legal holds and quotas have a say in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mlplat.artifacts.model import safe_path
from mlplat.http.services import Services
from mlplat.storage.guard import Written, held


@asynccontextmanager
async def guarded(services: Services, path: str, size: int) -> AsyncIterator[Written]:
    """The block writes a file of about ``size`` bytes, and says how large it is. However the path is spelt.

    Raises:
        InvalidInput: the path is not allowed.
        PermissionDenied: it would replace a file under a legal hold, or is in a folder of the platform's own.
        StorageFull: the experiment has no room for it.
    """
    guard, path = services.guard, safe_path(path)
    hold = await guard.hold_at(path)
    if hold is not None and await asyncio.to_thread(services.artifacts.has, path):
        raise held(path, hold)
    async with guard.writing(path, size) as written:
        yield written
