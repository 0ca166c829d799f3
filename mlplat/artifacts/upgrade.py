"""Stores from before files were entries: their files become entries, once."""

from __future__ import annotations

from collections.abc import Iterator

from mlplat.artifacts.entry import HEADER_BYTES, decode_header
from mlplat.artifacts.layout import FORMAT_KEY, files
from mlplat.artifacts.objects import Objects
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput

FORMAT = b"2\n"
PIECE_BYTES = 8 * 1024 * 1024


def adopt_plain_files(store: ArtifactStore) -> int:
    """Makes entries of plain files, unless that was done; how many. It can be cut short and run again; blocks.

    Raises:
        StorageFull, Unavailable: it was cut short.
    """
    objects = store.objects
    if objects.info(FORMAT_KEY) is not None:
        return 0
    adopted = 0
    for info in list(files(objects)):
        if not _is_entry(objects, info.key):
            store.write(info.key, _pieces(objects, info.key, info.size))
            adopted += 1
    objects.write(FORMAT_KEY, FORMAT)
    return adopted


def _is_entry(objects: Objects, key: str) -> bool:
    try:
        decode_header(objects.read(key, 0, HEADER_BYTES) or b"")
    except InvalidInput:
        return False
    return True


def _pieces(objects: Objects, key: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, PIECE_BYTES):
        yield objects.read(key, start, min(size, start + PIECE_BYTES)) or b""
