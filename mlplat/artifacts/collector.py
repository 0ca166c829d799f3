"""Removing blobs that nothing refers to, in two phases (see ``blobs`` for why no reference is ever lost).

A collection marks what is referred to, removes blobs that were condemned a grace period ago and still are not, and
condemns further ones that nobody has referred to or stored for a grace period. What is condemned is one object,
written last: a collection that dies at any point has only to be run again.
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from mlplat.artifacts.blobs import GENERATIONS, Condemned, read_condemned
from mlplat.artifacts.entry import HEADER_BYTES, SURE_BYTES, Entry, decode, decode_header
from mlplat.artifacts.layout import BLOBS, CONDEMNED_KEY, UPLOADS, files
from mlplat.artifacts.objects import ObjectInfo, Objects
from mlplat.errors import InvalidInput, Unavailable

#: Uploads that nobody goes on with are scratch after so long.
SCRATCH_S = 24 * 3_600.0
#: Keys that may be condemned at once, for the size of their list; the next collection goes on.
MAX_CONDEMNED = 500_000
READERS = 16
#: What disks and people leave among the blobs has other names.
_BLOB = re.compile(r".*/[0-9a-f]{64}(\.zst)?(\.\d+)?\Z", re.ASCII)

Hashes = npt.NDArray[np.uint64]


@dataclass
class Usage:
    """Files and their bytes, before anything is shared or compressed."""

    files: int = 0
    size: int = 0


@dataclass
class Collected:
    """What a collection found and did, or in a dry run would have done. Bytes are as stored."""

    blobs: int = 0
    blob_bytes: int = 0
    condemned: int = 0
    condemned_bytes: int = 0
    freed: int = 0
    freed_bytes: int = 0
    scratch: int = 0
    scratch_bytes: int = 0
    #: Objects that cannot be read as what they should be. Nothing is removed while there are some.
    damaged: list[str] = field(default_factory=list)
    #: By the first part of the path.
    usage: dict[str, Usage] = field(default_factory=dict)


class Collector:
    """Collections of one store; only one may run at a time.

    Args:
        objects: the store's.
        digests: SHA-256 of blobs that are referred to from elsewhere, such as the database.
        grace_s: the grace period.
    """

    def __init__(
        self,
        objects: Objects,
        digests: Callable[[], Iterable[str]],
        grace_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._objects = objects
        self._digests = digests
        self._grace_s = grace_s
        self._clock = clock
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Ends a collection that is under way in another thread, before it removes or publishes anything more."""
        self._given_up.set()

    def collect(self, *, dry_run: bool = False) -> Collected:
        """Runs one collection; blocks.

        Raises:
            Corrupted, StorageFull, Unavailable: it was cut short, and can be run again.
        """
        report = Collected()
        before = read_condemned(self._objects)
        self._sweep_scratch(report, dry_run=dry_run)
        marked = self._mark(report)
        if report.damaged:
            return report
        after, fresh = dict[str, float](), list[str]()
        now = self._clock()
        for info in self._objects.walk(BLOBS):
            self._require_wanted()
            if not _BLOB.match(info.key):
                continue
            report.blobs += 1
            report.blob_bytes += info.size
            if _is_in(info.key, marked):
                continue
            since = before.keys.get(info.key)
            if since is not None and now - since >= self._grace_s:
                report.freed += 1
                report.freed_bytes += info.size
                if dry_run:
                    after[info.key] = since
                else:
                    self._objects.delete(info.key)
            elif since is not None or self._may_go(info, now, len(after) + len(fresh)):
                report.condemned += 1
                report.condemned_bytes += info.size
                if since is not None:
                    after[info.key] = since
                else:
                    fresh.append(info.key)
        # Not before it is published can anybody know of it: removing others may have taken hours.
        after |= dict.fromkeys(fresh, self._clock())
        self._require_wanted()
        if not dry_run and after != before.keys:
            self._objects.write(CONDEMNED_KEY, msgspec.json.encode(Condemned(after)))
        return report

    def _may_go(self, info: ObjectInfo, now: float, condemned: int) -> bool:
        return now - info.modified_s >= self._grace_s and condemned < MAX_CONDEMNED

    def _require_wanted(self) -> None:
        if self._given_up.is_set():
            raise Unavailable("the collection was given up")

    def _mark(self, report: Collected) -> Hashes:
        """Hashes of all blobs that are referred to, sorted."""
        by_digest = ((digest, generation) for digest in self._digests() for generation in GENERATIONS)
        found = [_hashes(by_digest)]
        with ThreadPoolExecutor(READERS, "collector") as pool:
            for batch in _batches(self._entries()):
                self._require_wanted()
                for info, entry in pool.map(self._read, batch):
                    if entry is None:
                        report.damaged.append(info.key)
                        continue
                    usage = report.usage.setdefault(info.key.partition("/")[0], Usage())
                    usage.files += 1
                    usage.size += entry.size
                    if entry.chunks:
                        found.append(_hashes((chunk.sha256, chunk.suffix) for chunk in entry.chunks))
        return np.unique(np.concatenate(found))

    def _entries(self) -> Iterator[ObjectInfo]:
        """Files, and parts of uploads: what is being written lies beside these, in no folder."""
        yield from files(self._objects)
        yield from (info for info in self._objects.walk(UPLOADS) if info.key.count("/") > 1)

    def _read(self, info: ObjectInfo) -> tuple[ObjectInfo, Entry | None]:
        """The entry of an object without its bytes, None when it is damaged."""
        sure = HEADER_BYTES + SURE_BYTES
        if info.size <= sure:
            return info, Entry(max(0, info.size - HEADER_BYTES), "", b"")
        try:
            start = self._objects.read(info.key, 0, sure)
            if start is None:  # deleted meanwhile
                return info, Entry(0, "", b"")
            header = decode_header(start)
            if header.is_inline:
                return info, Entry(header.size, header.sha256, b"")
            stored = start if len(start) == info.size else self._objects.read(info.key)
            return info, decode(stored) if stored is not None else Entry(0, "", b"")
        except InvalidInput:
            return info, None

    def _sweep_scratch(self, report: Collected, *, dry_run: bool) -> None:
        """Removes what was begun and never finished, each upload as a whole."""
        newest = dict[str, float]()
        infos = list(self._objects.walk(UPLOADS))
        for info in infos:
            name = info.key.split("/")[1]
            newest[name] = max(info.modified_s, newest.get(name, 0.0))
        now = self._clock()
        old = {name for name, modified_s in newest.items() if now - modified_s >= SCRATCH_S}
        for info in infos:
            if info.key.split("/")[1] in old:
                report.scratch += 1
                report.scratch_bytes += info.size
        if not dry_run:
            for name in old:
                self._objects.delete(f"{UPLOADS}/{name}")


def _hashes(blobs: Iterable[tuple[str, str]]) -> Hashes:
    return np.fromiter((_hash(digest, suffix) for digest, suffix in blobs), np.uint64)


def _hash(digest: str, suffix: str) -> int:
    """64 bits of a blob's digest and suffix: two that share them keep one that could go, once in an age."""
    return int(digest[:16], 16) ^ zlib.crc32(suffix.encode())


def _is_in(key: str, marked: Hashes) -> bool:
    name = key.rpartition("/")[2]
    value = np.uint64(_hash(name[:64], name[64:]))
    place = int(np.searchsorted(marked, value))
    return place < len(marked) and marked[place] == value


def _batches(infos: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    batch = list[ObjectInfo]()
    for info in infos:
        batch.append(info)
        if len(batch) >= READERS * 16:
            yield batch
            batch = []
    yield batch
