"""Seeing what goes through a stream or a file descriptor, which both still reach their reader."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import threading
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
        _flush_streams()
        os.dup2(write_end, descriptor)
        os.close(write_end)
        self._thread = threading.Thread(target=self._forward, name=f"mlplat-logs-{descriptor}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restores the descriptor."""
        _flush_streams()
        os.dup2(self._original, self._descriptor)
        self._thread.join(DRAIN_S)

    def _forward(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while chunk := os.read(self._read_end, 64 * 1024):
            with contextlib.suppress(OSError):  # a terminal that is gone must not stop the rest
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self._original, view) :]
            with contextlib.suppress(Exception):
                self._sink(decoder.decode(chunk))
        os.close(self._read_end)
        os.close(self._original)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError, AttributeError):
            stream.flush()
