"""Files that wait for their upload: copies in a folder beside a spool file, whose frames name them.

The folder lives and dies with its spool file, so no copy outlives the records that tell what it is for.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from pathlib import Path
from typing import BinaryIO, NamedTuple

COPY_BYTES = 1024 * 1024


class Attached(NamedTuple):
    """A copy. ``is_new``: no frame names it yet; else it took the place of one that waited under the same key."""

    name: str
    is_new: bool


class Attachments:
    """The copies of one spool file. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        #: The copies that may still be replaced, by key, and the other way round.
        self._names: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        #: Bytes of all copies.
        self.total_bytes = 0

    @property
    def count(self) -> int:
        """Copies that wait, or are being made."""
        return len(self._sizes)

    def add(self, key: str, source: BinaryIO, size: int) -> Attached:
        """Copies a file of about ``size`` bytes; the disk has it afterwards.

        While nobody has begun to send the copy that was added last under ``key``, the new one takes its place: of a
        file that is written again and again, such as the newest part of a log, one copy waits.

        Raises:
            OSError: the disk is full, or failed.
        """
        name = uuid.uuid4().hex
        with self._lock:
            self._resize(name, size)  # others do not find this room from now on
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            size = _copy(source, self.folder / name)
            with self._lock:
                earlier = self._names.get(key)
                if earlier is not None:
                    (self.folder / name).replace(self.folder / earlier)
                    self._resize(name, None)
                    self._resize(earlier, size)
                    return Attached(earlier, False)
                self._resize(name, size)
                self._names[key], self._keys[name] = name, key
                return Attached(name, True)
        except OSError:
            self.discard(name)
            raise

    def take_over(self, path: Path) -> None:
        """Has another folder's copy too, under its name. Who had it deletes it there.

        Raises:
            OSError: there is no such copy any more, or it is here already.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        (self.folder / path.name).hardlink_to(path)
        with self._lock:
            self._resize(path.name, path.stat().st_size)

    def claim(self, name: str) -> None:
        """The copy is about to be sent: it stays as it is."""
        with self._lock:
            self._claim(name)

    def discard(self, name: str) -> None:
        """Deletes a copy; again does nothing."""
        with self._lock:
            self._claim(name)
            self._resize(name, None)
        (self.folder / name).unlink(missing_ok=True)

    def _claim(self, name: str) -> None:
        key = self._keys.pop(name, None)
        if key is not None:
            del self._names[key]

    def _resize(self, name: str, size: int | None) -> None:
        self.total_bytes += (size or 0) - self._sizes.pop(name, 0)
        if size is not None:
            self._sizes[name] = size


def _copy(source: BinaryIO, target: Path) -> int:
    with target.open("xb") as copy:
        shutil.copyfileobj(source, copy, COPY_BYTES)
        copy.flush()
        os.fsync(copy.fileno())
        return copy.tell()
