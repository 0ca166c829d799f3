"""Records on disk that the platform does not have yet: one append-only file per process.

A file is ``head, frame, frame, …``. The head holds how far the platform has acknowledged the file, so
that nothing old is sent again after a crash. A frame is its body's length, a CRC-32 of kind and body,
the kind, and the body. A tail that was torn by a crash, or does not match its CRC, ends the file.

Files that are to be uploaded lie in a folder of the same name (``SpoolFile.attachments``), and a frame names each.

The owner holds an exclusive lock on its file for as long as it lives. Whoever gets the lock of a file
may send what is left in it and delete it: the lock says that the owner is gone.

What ``append`` returned from survives the end of the process; what ``sync`` returned from survives
the end of the machine too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from mlplat.errors import InvalidInput

SUFFIX = ".spool"
ATTACHMENTS_SUFFIX = ".files"
MAX_BODY = 64 * 1024 * 1024
MAX_ORIGIN = 64 * 1024
#: A file whose frames are all acknowledged starts over when it is larger than this.
COMPACT_BYTES = 1024 * 1024
_MAGIC = b"mlplsp1\n"
_HEAD = struct.Struct("<8sQ")
_FRAME = struct.Struct("<IIB")


class Kind(IntEnum):
    """What a frame's body is."""

    ORIGIN = 0  # the file's first frame: where its records belong
    CREATE = 1
    CALL = 2
    POINTS = 3
    FILE = 4


class Frame(NamedTuple):
    """One record, encoded."""

    kind: Kind
    body: bytes


def pack(frame: Frame) -> bytes:
    """The frame's bytes.

    Raises:
        InvalidInput: the body is larger than ``MAX_BODY``.
    """
    if len(frame.body) > MAX_BODY:
        raise InvalidInput(f"a record of {len(frame.body)} bytes is too large, at most {MAX_BODY} are possible")
    kind = bytes((frame.kind,))
    return _FRAME.pack(len(frame.body), zlib.crc32(frame.body, zlib.crc32(kind)), frame.kind) + frame.body


def unpack(data: bytes) -> Iterator[tuple[Frame, int]]:
    """The whole, sound frames at the start of ``data``, each with the offset of its end."""
    offset = 0
    while offset + _FRAME.size <= len(data):
        length, crc, kind = _FRAME.unpack_from(data, offset)
        start, offset = offset + _FRAME.size, offset + _FRAME.size + length
        if length > MAX_BODY or offset > len(data):
            return
        body = data[start:offset]
        if zlib.crc32(body, zlib.crc32(bytes((kind,)))) != crc or kind not in Kind._value2member_map_:
            return
        yield Frame(Kind(kind), body), offset


class SpoolFile:
    """One file, locked by this process. Not thread-safe."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        magic, acked = _HEAD.unpack(os.pread(descriptor, _HEAD.size, 0))
        assert magic == _MAGIC
        self._end: int = os.fstat(descriptor).st_size
        self._first = _HEAD.size
        self.origin = b""
        for frame, offset in unpack(os.pread(descriptor, MAX_ORIGIN, _HEAD.size)):
            if frame.kind is Kind.ORIGIN:
                self._first, self.origin = _HEAD.size + offset, frame.body
            break
        self._read: int = min(max(acked, self._first), max(self._end, self._first))

    @classmethod
    def create(cls, folder: Path, origin: bytes) -> SpoolFile:
        """A new file, whose name sorts by time. ``origin`` says where its records belong.

        Raises:
            OSError: the folder cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{time.time_ns()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}"
        # Locked under a name that nobody looks at, so that nobody takes it before its owner has it.
        hidden = path.with_suffix(".new")
        descriptor = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(descriptor, _HEAD.pack(_MAGIC, 0) + pack(Frame(Kind.ORIGIN, origin)), 0)
            hidden.rename(path)
            return cls(path, descriptor)
        except OSError:
            os.close(descriptor)
            with suppress(OSError):
                hidden.unlink()
            raise

    @classmethod
    def adopt(cls, path: Path) -> SpoolFile | None:
        """A file whose owner is gone; None while it lives, or when somebody else was faster."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink and os.pread(descriptor, len(_MAGIC), 0) == _MAGIC:
                return cls(path, descriptor)
        except (BlockingIOError, struct.error):
            pass
        os.close(descriptor)
        return None

    @property
    def attachments(self) -> Path:
        """The folder of the files that frames name; there need not be one."""
        return self.path.with_suffix(ATTACHMENTS_SUFFIX)

    @property
    def pending_bytes(self) -> int:
        """Bytes that are not acknowledged."""
        return self._end - self._read

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end

    def append(self, frames: Sequence[Frame]) -> None:
        """Adds frames, all of them or none.

        Raises:
            OSError: the disk is full, or failed.
        """
        data = b"".join(map(pack, frames))
        try:
            _write(self._descriptor, data, self._end)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(data)

    def read(self, max_bytes: int) -> list[tuple[Frame, int]]:
        """The first frames that are not acknowledged, each with the offset to acknowledge it by.

        About ``max_bytes`` of them, but one if there is one; none when the rest of the file is damaged.
        """
        size = min(max_bytes, self.pending_bytes)
        found = list(unpack(os.pread(self._descriptor, size, self._read)))
        if not found and size < self.pending_bytes:
            found = list(unpack(os.pread(self._descriptor, _FRAME.size + MAX_BODY, self._read)))[:1]
        return [(frame, self._read + end) for frame, end in found]

    def acknowledge(self, offset: int) -> None:
        """Notes that the platform has everything up to ``offset``; what was read stays sent after a crash."""
        self._read = offset
        if self._read == self._end > self._first + COMPACT_BYTES:
            os.ftruncate(self._descriptor, self._first)
            self._read = self._end = self._first
        os.pwrite(self._descriptor, _HEAD.pack(_MAGIC, self._read), 0)

    def tail_is_torn(self) -> bool:
        """Whether what is left is the beginning of a frame, as a crash leaves it."""
        head = os.pread(self._descriptor, _FRAME.size, self._read)
        return len(head) < _FRAME.size or _FRAME.unpack(head)[0] > self.pending_bytes - _FRAME.size

    def sync(self) -> None:
        """Waits until the disk has everything."""
        os.fdatasync(self._descriptor)

    def close(self, *, delete: bool) -> None:
        """Lets go of the file; what is left in it is for whoever adopts it."""
        if delete:
            shutil.rmtree(self.attachments, ignore_errors=True)  # first: without the file nobody looks for it
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


def spooled_files(folder: Path) -> list[Path]:
    """The files of a spool folder, oldest first."""
    return sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: (len(path.name), path.name))


def folder_bytes(folder: Path) -> int:
    """Bytes that all processes together keep in the folder."""
    total = 0
    for pattern in (f"*{SUFFIX}", f"*{ATTACHMENTS_SUFFIX}/*"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
