"""The queue between what was logged and the platform: on disk, or in memory while the disk refuses."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from mlplat.sdk.attachments import Attached, Attachments
from mlplat.sdk.records import attachment_of
from mlplat.sdk.spool import Frame, Kind, SpoolFile, folder_bytes

#: What is kept in memory while nothing can be written to disk.
MAX_MEMORY_BYTES = 64 * 1024 * 1024
#: Bytes of the folder that only records other than points and files may use.
RESERVED_BYTES = 1024 * 1024
MEASURE_EVERY_S = 5.0
_log = logging.getLogger(__name__)


class Backlog:
    """Frames in order, and the files that some of them name, for one writer and one reader.

    When the folder has ``max_bytes``, new points and files are refused and the oldest are kept: a run's beginning is
    never lost to its end. Other records still find room.
    """

    def __init__(self, folder: Path, origin: bytes, max_bytes: int) -> None:
        self._folder = folder
        self._origin = origin
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._file: SpoolFile | None = None
        self._attachments: Attachments | None = None
        self._memory: deque[Frame] = deque()
        self._memory_bytes = 0
        self._others_bytes = 0
        self._measured_at = float("-inf")
        self._dirty = False
        self._told = False
        #: Frames ever accepted, and those of them that are settled.
        self.appended = 0
        self.settled = 0

    @property
    def in_memory(self) -> int:
        """Frames that would be lost with this process."""
        return len(self._memory)

    @property
    def attachments(self) -> Attachments | None:
        """The files that frames name; None when there were none yet."""
        return self._attachments

    def append(self, frame: Frame) -> bool:
        """Takes a frame; False when there is no room for it."""
        with self._lock:
            kept = self._to_memory(frame) if self._memory else self._to_disk(frame)
            self.appended += kept
        return kept

    def attach(self, key: str, source: BinaryIO, size: int) -> Attached | None:
        """Copies a file of ``size`` bytes, for a frame that will name it; None when there is no room.

        A copy that waits under the same key is replaced, see ``Attachments.add``.
        """
        try:
            with self._lock:
                if not self._has_room(size, RESERVED_BYTES):
                    return None
                attachments = self._opened()
            return attachments.add(key, source, size)
        except OSError as error:
            self._tell(error)
            return None

    def peek(self, max_bytes: int) -> tuple[list[Frame], list[int]]:
        """The oldest frames, and for each what ``settle`` wants to hear."""
        with self._lock:
            frames, marks = self._oldest(max_bytes)
            name = attachment_of(frames[0]) if frames else None
            if name is not None and self._attachments is not None:
                self._attachments.claim(name)
            return frames, marks

    def settle(self, marks: Sequence[int]) -> None:
        """Forgets the oldest frames, by their marks."""
        with self._lock:
            self.settled += len(marks)
            if marks and marks[-1] >= 0:
                if self._file is not None:  # else closed meanwhile: the next sender sends it again
                    self._file.acknowledge(marks[-1])
                return
            for _mark in marks:
                self._memory_bytes -= len(self._memory.popleft().body)

    def forget(self, frame: Frame) -> None:
        """Deletes the file that a settled or refused frame names."""
        name = attachment_of(frame)
        if name is not None and self._attachments is not None:
            self._attachments.discard(name)

    def take_over(self, frame: Frame, attachments: Path | None) -> bool:
        """Takes a frame of another backlog, with the file that it names; False when that cannot be."""
        name = attachment_of(frame)
        if name is not None:
            try:
                with self._lock:
                    own = self._opened()
                if attachments is None:
                    return False
                own.take_over(attachments / name)
            except OSError as error:
                self._tell(error)
                return False
        return self.append(frame)

    def sync(self) -> None:
        """Makes what is on disk survive the machine."""
        with self._lock:
            file, dirty, self._dirty = self._file, self._dirty, False
        if file is not None and dirty:
            try:
                file.sync()
            except OSError as error:
                self._tell(error)

    def close(self) -> None:
        """Lets go of the file: deletes it when all is settled, else leaves it for the next sender."""
        with self._lock:
            if self._file is not None:
                self._file.close(delete=self._file.pending_bytes == 0)
                self._file = self._attachments = None

    def abandon(self) -> None:
        """Forgets a file that belongs to the process this one was forked from."""
        if self._file is not None:
            self._file.close(delete=False)
            self._file = self._attachments = None

    def _oldest(self, max_bytes: int) -> tuple[list[Frame], list[int]]:
        if self._file is not None and self._file.pending_bytes:
            found = self._file.read(max_bytes)
            if found:
                return [frame for frame, _offset in found], [offset for _frame, offset in found]
            _log.error("%s is damaged, %d bytes are lost", self._file.path, self._file.pending_bytes)
            self._file.acknowledge(self._file.size)
            self.settled = self.appended - len(self._memory)
        frames = list(self._memory)
        return frames, [-1] * len(frames)

    def _to_disk(self, frame: Frame) -> bool:
        if not self._has_room(len(frame.body), RESERVED_BYTES if frame.kind is Kind.POINTS else 0):
            return False
        try:
            self._opened()
            assert self._file is not None
            self._file.append([frame])
            self._dirty = True
        except OSError as error:
            self._tell(error)
            return self._to_memory(frame)
        return True

    def _opened(self) -> Attachments:
        if self._file is None or self._attachments is None:
            self._file = SpoolFile.create(self._folder, self._origin)
            self._attachments = Attachments(self._file.attachments)
        return self._attachments

    def _to_memory(self, frame: Frame) -> bool:
        if self._memory_bytes + len(frame.body) > MAX_MEMORY_BYTES:
            return False
        self._memory.append(frame)
        self._memory_bytes += len(frame.body)
        return True

    def _has_room(self, size: int, reserved: int) -> bool:
        now = time.monotonic()
        own = 0 if self._file is None else self._file.size
        if self._attachments is not None:
            own += self._attachments.total_bytes
        if now - self._measured_at > MEASURE_EVERY_S:
            self._others_bytes = folder_bytes(self._folder) - own
            self._measured_at = now
        return self._others_bytes + own + size <= self._max_bytes - reserved

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            _log.warning("mlplat cannot write to %s (%s): what is logged waits in memory", self._folder, error)
