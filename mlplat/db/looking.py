"""The loop of whoever holds a lease and looks again and again for what there is to do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Fenced, PlatformError

_log = logging.getLogger(__name__)


async def look_forever(
    look: Callable[[], Awaitable[float]], wake: asyncio.Event, lease: LeaseKeeper, what: str, failed_s: float
) -> None:
    """Looks until the lease is lost.

    Args:
        look: returns the seconds until the next look.
        wake: set when something has happened: the next look is now.
        what: who looks, for the log.
        failed_s: until the next look after one that failed.
    """
    while True:
        wake.clear()
        delay = failed_s
        try:
            delay = await look()
        except Fenced:
            lease.lost.set()
            return
        except (PlatformError, *CONNECTION_ERRORS) as error:
            _log.warning("%s: %s", what, error)
        except Exception:  # a defect in one look must not end all of them
            _log.exception("%s", what)
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await wake.wait()


async def prune_forever(prune: Callable[[], Awaitable[object]], every_s: float) -> None:
    """Forgets now and then what is old; when Postgres is away, later."""
    while True:
        with suppress(PlatformError, *CONNECTION_ERRORS):
            await prune()
        await asyncio.sleep(every_s)
