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
        self._replaceable: dict[str, str] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of all copies."""
        with self._lock:
            return sum(self._sizes.values())

    @property
    def count(self) -> int:
        """Copies that were added here and wait."""
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
            self._sizes[name] = size  # what others find room for from now on
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            size = _copy(source, self.folder / name)
            with self._lock:
                earlier = self._replaceable.get(key)
                if earlier is not None:
                    (self.folder / name).replace(self.folder / earlier)
                    self._sizes[earlier] = size
                    del self._sizes[name]
                    return Attached(earlier, False)
                self._sizes[name] = size
                self._replaceable[key] = name
                return Attached(name, True)
        except OSError:
            self.discard(name)
            raise

    def take_over(self, path: Path) -> None:
        """Moves another folder's copy here, under its name.

        Raises:
            OSError: there is no such copy any more, or it cannot be moved.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        size = path.stat().st_size
        path.replace(self.folder / path.name)
        with self._lock:
            self._sizes[path.name] = size

    def claim(self, name: str) -> None:
        """The copy is about to be sent: it stays as it is."""
        with self._lock:
            self._replaceable = {key: other for key, other in self._replaceable.items() if other != name}

    def discard(self, name: str) -> None:
        """Deletes a copy; again does nothing."""
        self.claim(name)
        with self._lock:
            self._sizes.pop(name, None)
        (self.folder / name).unlink(missing_ok=True)


def _copy(source: BinaryIO, target: Path) -> int:
    with target.open("xb") as copy:
        shutil.copyfileobj(source, copy, COPY_BYTES)
        copy.flush()
        os.fsync(copy.fileno())
        return copy.tell()
