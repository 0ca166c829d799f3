"""The queue between what was logged and the platform: on disk, or in memory while the disk refuses."""

from __future__ import annotations

import errno
import logging
import os
import shutil
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
#: Bytes of the folder, and of its disk, that only records other than points and files may use.
RESERVED_BYTES = 1024 * 1024
MEASURE_EVERY_S = 5.0
_log = logging.getLogger(__name__)


class Backlog:
    """Frames in order, and the files that some of them name, for one writer and one reader.

    When the folder has ``max_bytes``, new points and files are refused and the oldest are kept: a run's beginning is
    never lost to its end. Other records still find room. While the disk has none, frames wait in memory, and move to
    the disk as soon as it has again.
    """

    def __init__(self, folder: Path, origin: bytes, max_bytes: int) -> None:
        self._folder = folder
        self._origin = origin
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._file: SpoolFile | None = None
        self._attachments: Attachments | None = None
        #: Frames in memory, numbered from 1, and where those have gone that were moved to disk since the last look.
        self._memory: deque[tuple[int, Frame]] = deque()
        self._memory_bytes = 0
        self._last_number = 0
        self._moved: dict[int, int] = {}
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
            self._spill()
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
            offsets = [mark if mark >= 0 else self._moved[-mark] for mark in marks if mark >= 0 or -mark in self._moved]
            if offsets and self._file is not None:  # else closed meanwhile: the next sender sends it again
                self._file.acknowledge(offsets[-1])
            while marks and self._memory and self._memory[0][0] <= -marks[-1]:
                self._forget_oldest()

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
            self._spill()
            file, dirty, self._dirty = self._file, self._dirty, False
        if file is not None and dirty:
            try:
                file.sync()
            except OSError as error:
                self._tell(error)

    def close(self) -> None:
        """Lets go of the file: deletes it when all is settled, else leaves it for the next sender.

        Of what is still in memory the disk gets what it has room for.
        """
        with self._lock:
            lost = 0
            while self._memory:
                oldest = self._memory[0][1]
                lost += not (self._may_keep(oldest) and self._write(oldest))
                self._forget_oldest()
            if lost:
                _log.error("mlplat: %d records found no room in %s and are lost", lost, self._folder)
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
                self._moved.clear()
                return [frame for frame, _offset in found], [offset for _frame, offset in found]
            _log.error("%s is damaged, %d bytes are lost", self._file.path, self._file.pending_bytes)
            self._file.acknowledge(self._file.size)
            self.settled = self.appended - len(self._memory)
        return [frame for _number, frame in self._memory], [-number for number, _frame in self._memory]

    def _to_disk(self, frame: Frame) -> bool:
        if not self._may_keep(frame):
            return False
        return self._write(frame) or self._to_memory(frame)

    def _write(self, frame: Frame) -> bool:
        """Whether the disk had room."""
        try:
            self._opened()
            assert self._file is not None
            if frame.kind is Kind.POINTS and shutil.disk_usage(self._folder).free < len(frame.body) + RESERVED_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._file.append([frame])
        except OSError as error:
            self._tell(error)
            return False
        self._dirty = True
        return True

    def _spill(self) -> None:
        """Moves what is in memory to the disk, in its order, as far as there is room."""
        while self._memory and self._may_keep(self._memory[0][1]) and self._write(self._memory[0][1]):
            assert self._file is not None
            self._moved[self._memory[0][0]] = self._file.size
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _number, frame = self._memory.popleft()
        self._memory_bytes -= len(frame.body)

    def _opened(self) -> Attachments:
        if self._file is None or self._attachments is None:
            self._file = SpoolFile.create(self._folder, self._origin)
            self._attachments = Attachments(self._file.attachments)
        return self._attachments

    def _to_memory(self, frame: Frame) -> bool:
        if self._memory_bytes + len(frame.body) > MAX_MEMORY_BYTES:
            return False
        self._last_number += 1
        self._memory.append((self._last_number, frame))
        self._memory_bytes += len(frame.body)
        return True

    def _may_keep(self, frame: Frame) -> bool:
        return self._has_room(len(frame.body), RESERVED_BYTES if frame.kind is Kind.POINTS else 0)

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
