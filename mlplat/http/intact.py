"""Keeps versions from being read whose files are not what was registered, and says so in the registry's log."""

from __future__ import annotations

import hashlib
from contextlib import suppress

from mlplat.errors import Corrupted, PlatformError
from mlplat.http.services import Services
from mlplat.registry.model import ModelVersion, ReportTampering


async def require_intact(services: Services, version: ModelVersion) -> None:
    """Looks whether the files of a version are what was registered.

    Raises:
        Corrupted: they are not; it is an event of the registry from then on.
    """
    try:
        await services.frozen.require_intact(version)
    except Corrupted as error:
        await report(services, version, error.message)
        raise


async def report(services: Services, version: ModelVersion, problem: str) -> None:
    """Makes an event of it, once; when that cannot be, the reader has to be answered nevertheless."""
    told = f"{version.name}/{version.version} {version.created_at.isoformat()} {problem}"
    key = f"tampered-{hashlib.sha256(told.encode()).hexdigest()}"
    with suppress(PlatformError):
        await services.registry_writer.execute(key, [ReportTampering(version.name, version.version, problem[:2_000])])
