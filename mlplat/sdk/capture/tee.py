"""Seeing what goes through a stream or a file descriptor, which both still reach their reader."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import select
import sys
import termios
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any

Sink = Callable[[str], None]
#: Seconds to wait for the rest of a pipe; children may hold it open for longer, and go on being forwarded.
DRAIN_S = 1.0


class StreamTee:
    """Text written to a Python stream, also by those that took hold of the stream earlier (``logging``).

    The stream's ``write`` is wrapped in place. Whatever the sink does, the writer does not notice.

    Raises:
        AttributeError: the stream does not let its ``write`` be replaced.
    """

    def __init__(self, stream: Any, sink: Sink) -> None:
        self._stream = stream
        self._sink: Sink | None = sink
        self._replaced = vars(stream).get("write")
        original = stream.write

        def write(text: Any, *rest: Any, **options: Any) -> Any:
            result = original(text, *rest, **options)
            if self._sink is not None and isinstance(text, str):
                with contextlib.suppress(Exception):
                    self._sink(text)
            return result

        self._write = write
        stream.write = write

    def is_on(self, stream: object) -> bool:
        """Whether this is about the stream."""
        return self._stream is stream

    def close(self) -> None:
        """Restores the stream, unless somebody else has wrapped it since: then ours passes through."""
        self._sink = None
        if vars(self._stream).get("write") is not self._write:
            return
        if self._replaced is None:
            del self._stream.write
        else:
            self._stream.write = self._replaced


class DescriptorTee:
    """Bytes written to file descriptor 1 or 2, by whomever: a pipe that a thread empties into both sides."""

    def __init__(self, descriptor: int, sink: Sink) -> None:
        self._descriptor = descriptor
        self._sink = sink
        self._original = os.dup(descriptor)
        self._read_end, write_end = os.pipe()
        self._handling = threading.Lock()
        _flush_streams()
        os.dup2(write_end, descriptor)
        os.close(write_end)
        self._thread = threading.Thread(target=self._forward, name=f"mlplat-logs-{descriptor}", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Waits until the sink has all that was written, a second at most."""
        _flush_streams()
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline:
            with self._handling:
                if not self._waiting():
                    return
            time.sleep(0.001)

    def close(self) -> None:
        """Restores the descriptor."""
        _flush_streams()
        os.dup2(self._original, self._descriptor)
        self._thread.join(DRAIN_S)

    def _waiting(self) -> int:
        count = array("i", [0])
        fcntl.ioctl(self._read_end, termios.FIONREAD, count)
        return count[0]

    def _forward(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        readable = select.poll()
        readable.register(self._read_end, select.POLLIN)
        while True:
            readable.poll()
            with self._handling:  # from the moment at which the bytes leave the pipe
                chunk = os.read(self._read_end, 64 * 1024)
                if not chunk:
                    break
                self._pass_on(chunk, decoder.decode(chunk))
        os.close(self._read_end)
        os.close(self._original)

    def _pass_on(self, chunk: bytes, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone must not stop the rest
            view = memoryview(chunk)
            while view:
                view = view[os.write(self._original, view) :]
        with contextlib.suppress(Exception):
            self._sink(text)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError, AttributeError):
            stream.flush()
