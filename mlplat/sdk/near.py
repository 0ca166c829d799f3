"""Chunks straight into the platform's folder of artifacts and from there, for processes that have the same folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlplat.artifacts.blobs import Blobs
from mlplat.artifacts.entry import Chunk
from mlplat.artifacts.folder import Folder
from mlplat.artifacts.layout import PLACE_KEY
from mlplat.errors import Corrupted, Overloaded, StorageFull, Unavailable


def open_near(folder: str, place: str) -> Blobs | None:
    """The blobs in the platform's folder. None: this process does not have it, or runs as another user.

    Args:
        folder: its path where the platform is.
        place: what only that folder has in its ``PLACE_KEY``.
    """
    try:
        if Path(folder, PLACE_KEY).read_text() != place or Path(folder).stat().st_uid != os.geteuid():
            return None
    except (OSError, UnicodeDecodeError):
        return None
    return Blobs(Folder(folder))


def put(blobs: Blobs, chunks: Iterable[memoryview]) -> list[tuple[str, int]] | None:
    """Stores chunks that are not there yet; SHA-256 in hex and size of each. None: the folder cannot be written here.

    Raises:
        Overloaded: the disk is full, for which the platform has the same answer.
    """
    try:
        return [(stored.sha256, stored.size) for stored in map(blobs.put, chunks)]
    except StorageFull as error:
        raise Overloaded(error.message) from error
    except Unavailable:
        return None


def fetch(blobs: Blobs, chunks: Sequence[tuple[str, int]]) -> list[bytes] | None:
    """The bytes of chunks, SHA-256 in hex and size of each, checked. None: one is not there as it should be, about
    which the platform knows more."""
    bodies = list[bytes]()
    try:
        for digest, size in chunks:
            suffix = blobs.find(digest)
            if suffix is None:
                return None
            bodies.append(blobs.read(Chunk(digest, size, suffix)))
    except (Corrupted, Unavailable):
        return None
    return bodies
