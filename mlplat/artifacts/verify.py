"""Scrubbing: reading all that is stored, and naming what is not what it was."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from mlplat.artifacts.blobs import key_of
from mlplat.artifacts.chunking import unpack_all
from mlplat.artifacts.digests import sha256
from mlplat.artifacts.entry import decode
from mlplat.artifacts.layout import BLOBS, PACKED, files
from mlplat.artifacts.objects import ObjectInfo
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted, InvalidInput, NotFound
from mlplat.parallel import in_order

READERS = 4
AHEAD = 16


@dataclass(frozen=True)
class Checked:
    """A file or blob: what is wrong with it, empty when nothing is. ``size``: bytes that were read."""

    name: str
    size: int
    problem: str = ""


def verify(store: ArtifactStore, *, repair: bool = False) -> Iterator[Checked]:
    """Checks every blob, then every file: the blobs that it needs must be there and be sound.

    With ``repair``, blobs that are damaged are removed, so that whoever stores the same bytes again heals all files
    that have them.
    """
    damaged, present = set[str](), set[str]()
    with ThreadPoolExecutor(READERS, "verify") as pool:
        for blob in _mapped(pool, partial(_check_blob, store, repair=repair), store.objects.walk(BLOBS)):
            (damaged if blob.problem else present).add(blob.name)
            yield blob
        yield from _mapped(pool, partial(_check_file, store, present, damaged), files(store.objects))


def verify_folder(store: ArtifactStore, path: str) -> Iterator[Checked]:
    """Reads every file of a folder."""
    for file in store.files(path):
        name = f"{path}/{file.path}"
        try:
            yield Checked(name, sum(map(len, store.read(name))))
        except Corrupted as error:
            yield Checked(name, 0, error.message)
        except NotFound:  # deleted meanwhile
            yield Checked(name, 0)


def _check_blob(store: ArtifactStore, info: ObjectInfo, *, repair: bool) -> Checked:
    found = _look_at(store, info)
    if found.problem and repair:  # at once: whoever is told takes his time, and somebody else may heal it by then
        store.objects.delete(info.key)
    return found


def _look_at(store: ArtifactStore, info: ObjectInfo) -> Checked:
    stored = store.objects.read(info.key)
    if stored is None:  # collected meanwhile
        return Checked(info.key, 0)
    name = info.key.rpartition("/")[2]
    try:
        body = unpack_all(stored) if PACKED in name else stored
    except InvalidInput as error:
        return Checked(info.key, len(stored), error.message)
    is_sound = sha256(body) == name.partition(".")[0]
    return Checked(info.key, len(stored), "" if is_sound else "its bytes have another SHA-256")


def _check_file(store: ArtifactStore, present: set[str], damaged: set[str], info: ObjectInfo) -> Checked:
    stored = store.objects.read(info.key)
    if stored is None:
        return Checked(info.key, 0)
    try:
        entry = decode(stored)
    except InvalidInput as error:
        return Checked(info.key, len(stored), error.message)
    for chunk in entry.chunks:
        key = key_of(chunk.sha256, chunk.suffix)
        if key in damaged:
            return Checked(info.key, len(stored), f"blob {chunk.sha256} is corrupt")
        if key not in present and store.objects.info(key) is None:
            return Checked(info.key, len(stored), f"blob {chunk.sha256} is gone")
    return Checked(info.key, len(stored))


def _mapped(pool: ThreadPoolExecutor, check: partial[Checked], infos: Iterator[ObjectInfo]) -> Iterator[Checked]:
    return in_order(pool, AHEAD, (partial(check, info) for info in infos))
