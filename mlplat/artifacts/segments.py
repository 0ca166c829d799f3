"""Growing texts as numbered files: ``000001.log``, ``000002.log`` … in a folder of the artifact store.

A store has no append, so the newest segment is written again with what was added until it is full. What
is in a segment never changes; it only becomes longer. So a place in the text is a segment's number and
a byte offset in it, for ever.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlplat.artifacts.model import ArtifactInfo

_log = logging.getLogger(__name__)

#: A segment that has as many bytes is not written again.
SEGMENT_BYTES = 128 * 1024
#: Bytes that are moved at once, the size of a segment when much is printed.
MAX_SEGMENT_BYTES = 4 * 1024 * 1024
MAX_LOG_BYTES = 100 * 1024 * 1024
_NAME = re.compile(r"(\d{6,9})\.log\Z", re.ASCII)

#: Writes a file of the folder: its name and its bytes. It replaces what was there.
Write = Callable[[str, bytes], None]


@dataclass(frozen=True)
class Place:
    """The first byte that has not been read: byte ``offset`` of segment number ``segment``."""

    segment: int = 0
    offset: int = 0


class Source(Protocol):
    """Bytes that wait to be shipped."""

    def peek(self, limit: int) -> bytes:
        """Up to ``limit`` bytes from the front; the same again until they are dropped."""
        ...

    def drop(self, count: int) -> None:
        """Forgets ``count`` bytes at the front."""
        ...


def segment_name(number: int) -> str:
    """The file name of a segment."""
    return f"{number:06d}.log"


def segment_number(name: str) -> int | None:
    """The number in a segment's file name; None for other files."""
    found = _NAME.match(name)
    return int(found[1]) if found else None


def plan_read(entries: Sequence[ArtifactInfo], after: Place, limit: int) -> Iterator[tuple[str, int, int]]:
    """Which bytes to read from a folder listing: ``(name, start, end)`` per segment, ``limit`` bytes in all."""
    segments = sorted(
        (number, entry.path, entry.size or 0)
        for entry in entries
        if not entry.is_dir and (number := segment_number(entry.path)) is not None and number >= after.segment
    )
    for number, name, size in segments:
        start = after.offset if number == after.segment else 0
        end = min(size, start + limit)
        if end > start:
            limit -= end - start
            yield name, start, end
        if limit <= 0:
            return


class Shipper:
    """Moves what a source has into segments every ``interval_s``, in a thread of its own.

    A store that is away fails nothing: the same bytes are tried again next time. After ``max_bytes`` the
    rest is dropped.
    """

    def __init__(
        self,
        source: Source,
        write: Write,
        interval_s: float,
        *,
        max_bytes: int = MAX_LOG_BYTES,
        full_notice: bytes = b"",
    ) -> None:
        self._source = source
        self._write = write
        self._interval_s = interval_s
        self._left = max_bytes
        self._full_notice = full_notice
        self._number = 1
        self._open = b""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlplat-logs", daemon=True)

    @property
    def is_full(self) -> bool:
        """Whether what comes now is dropped."""
        return self._left <= 0

    def start(self) -> None:
        """Starts the thread. Without it, somebody calls ``ship`` instead."""
        self._thread.start()

    def close(self, timeout_s: float | None = None) -> bool:
        """Ships the rest and ends the thread; False when it takes longer than ``timeout_s``."""
        self._stop.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.ship()
        self.ship()

    def ship(self) -> None:
        """Moves everything that waits, as far as the store takes it. For the thread, once that runs."""
        while (new := self._source.peek(MAX_SEGMENT_BYTES)) and self._ship_one(new):
            pass

    def _ship_one(self, new: bytes) -> bool:
        kept = new[: self._left]
        if kept:
            notice = self._full_notice if len(kept) == self._left else b""
            try:
                self._append(kept + notice)
            except Exception as error:  # each kind of store has its own for being away
                _log.debug("a log segment waits: %s", error)
                return False
            self._left -= len(kept)
        self._source.drop(len(new))
        return True

    def _append(self, new: bytes) -> None:
        body = self._open + new
        self._write(segment_name(self._number), body)
        full = len(body) >= SEGMENT_BYTES
        self._number, self._open = (self._number + 1, b"") if full else (self._number, body)
