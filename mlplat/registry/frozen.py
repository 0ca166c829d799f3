"""Versions whose files are not what they were when they were registered are refused on read."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from mlplat.artifacts.manifest import Difference, Frozen, differences, freeze, stamp_of
from mlplat.artifacts.model import served_path
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted, InvalidInput, NotFound
from mlplat.registry.model import ModelVersion

MAX_KNOWN = 10_000
MAX_SHOWN = 5


class FrozenFiles:
    """Freezes the files of versions, and checks them. All methods are safe to call concurrently."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts
        #: Manifests and stamps that were found to agree: files that were not written since need not be read again.
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def freeze(self, artifact_uri: str) -> Frozen | None:
        """What the files are now; None: they are elsewhere, or there are none."""
        folder = _folder(artifact_uri)
        return None if folder is None else await asyncio.to_thread(freeze, self._artifacts, folder)

    async def check(self, version: ModelVersion) -> list[Difference]:
        """Reads all files of a version, and says which are not what they were.

        Raises:
            Corrupted: the manifest itself is gone or corrupt.
        """
        folder = _folder(version.artifact_uri)
        if folder is None or version.manifest is None:
            return []
        try:
            return await asyncio.to_thread(differences, self._artifacts, folder, version.manifest)
        except (NotFound, Corrupted) as error:
            raise Corrupted(f"{_name(version)}: its manifest cannot be read: {error.message}") from error

    async def require_intact(self, version: ModelVersion) -> None:
        """Looks whether files of a version were written since it was registered; if so, reads them all.

        Raises:
            Corrupted: they are not what they were.
        """
        folder = _folder(version.artifact_uri)
        if folder is None or version.manifest is None:
            return
        stamp = await asyncio.to_thread(stamp_of, self._artifacts, folder)
        if stamp == version.stamp or (version.manifest, stamp) in self._known:
            return
        found = await self.check(version)
        if found:
            raise Corrupted(told(version, found))
        self._known[version.manifest, stamp] = None
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def told(version: ModelVersion, found: Sequence[Difference]) -> str:
    """What is wrong with a version, for people."""
    more = [f"and {len(found) - MAX_SHOWN} more"] if len(found) > MAX_SHOWN else []
    differing = "; ".join([*(f"{one.path} {one.what}" for one in found[:MAX_SHOWN]), *more])
    return f"{_name(version)} is not what was registered: {differing}"


def _name(version: ModelVersion) -> str:
    return f"Model Version (name={version.name}, version={version.version})"


def _folder(artifact_uri: str) -> str | None:
    try:
        return served_path(artifact_uri) or None
    except InvalidInput:  # nothing that the platform could have stored
        return None
