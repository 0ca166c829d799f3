"""Open files of a run: read by ranges, written as a whole."""

from __future__ import annotations

import inspect
import io
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO

from fsspec.spec import AbstractBufferedFile

from mlplat.sdk.artifact_bytes import Part, changed

#: What a file being written may have in memory; one that becomes larger goes to a temporary file on disk.
SPOOL_BYTES = 8 * 1024 * 1024
#: Callers that are looked at for the end of a ``with``: fsspec and pandas close their files two calls below it.
_CALLERS = 4


def new_spool() -> tempfile.SpooledTemporaryFile[bytes]:
    """A temporary file that goes away when it is closed."""
    return tempfile.SpooledTemporaryFile(SPOOL_BYTES)


class ArtifactReader(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file that is read block by block, ahead.

    Raises OSError once its ETag or, where the platform tells none, its size has become another one.
    """

    _etag: str | None = None

    def _fetch_range(self, start: int, end: int) -> bytes:
        part: Part = self.fs.fetch(self.path, start, end)
        self._etag = self._etag or part.etag
        if part.size != self.size or part.etag != self._etag:
            raise changed(self.path)
        return part.body


class ArtifactWriter(io.BufferedIOBase):
    """A file that is written to a temporary file and sent when it is closed.

    The end of a ``with`` by an exception drops it, and so does a fork for the child's copy.

    Args:
        send: sends a file of so many bytes.
        autocommit: whether closing sends it; else ``commit`` does.
    """

    mode = "wb"

    def __init__(self, send: Callable[[BinaryIO, int], None], autocommit: bool) -> None:
        super().__init__()
        self._send = send
        self._autocommit = autocommit
        self._spool: Any = new_spool()
        self._pid = os.getpid()
        self._opened_under = sys.exception()

    def writable(self) -> bool:
        """Until it is closed."""
        return not self.closed

    def seekable(self) -> bool:
        """Until it is closed."""
        return not self.closed

    def write(self, data: Any) -> int:
        """Writes all of the data."""
        self._check_open()
        return int(self._spool.write(data))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a place, also one that has been written already."""
        self._check_open()
        return int(self._spool.seek(offset, whence))

    def tell(self) -> int:
        """The place of the next byte."""
        self._check_open()
        return int(self._spool.tell())

    def truncate(self, size: int | None = None) -> int:
        """Drops what follows ``size`` or this place."""
        self._check_open()
        self._spool.truncate(size)
        return self.tell() if size is None else size

    def close(self) -> None:
        """Sends the file; nobody sees anything of it before all of it has arrived."""
        if self.closed:
            return
        is_left = self._pid != os.getpid() or self._is_left_by_an_exception()
        super().close()
        if is_left:
            self.discard()
        elif self._autocommit:
            self.commit()

    def commit(self) -> None:
        """Sends what was written."""
        if self._spool.closed:
            return
        try:
            self._send(self._spool, self._spool.seek(0, os.SEEK_END))
        finally:
            self._spool.close()

    def discard(self) -> None:
        """Drops what was written."""
        self._spool.close()

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file.")

    def _is_left_by_an_exception(self) -> bool:
        """Whether a ``with`` ends by an exception that came after the file was opened.

        Those who wrap files, as ``fsspec.open`` and pandas do, close them without a word of why.
        """
        error, frame = sys.exception(), inspect.currentframe()
        if error is None or error is self._opened_under:
            return False
        for _caller in range(_CALLERS):
            frame = None if frame is None else frame.f_back
            if frame is not None and frame.f_code.co_name == "__exit__":
                return True
        return False


class ArtifactTextWriter(io.TextIOWrapper):
    """Text on its way into a file. The end of a ``with`` by an exception drops that."""

    def __exit__(self, *_error: object) -> None:
        self.close()
