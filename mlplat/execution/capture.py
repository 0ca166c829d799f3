"""Per-attempt logs: everything the attempt's process prints, its children and C code included.

File descriptors 1 and 2 point at a file for the duration. Whoever looks after the attempt calls ``ship`` now
and then, which moves what is new into the artifact store as numbered segments. So logs can be read while
the attempt runs, and a killed attempt loses its last second at most.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TextIO

from mlplat.artifacts.segments import Shipper
from mlplat.artifacts.store import ArtifactStore

SEGMENT_INTERVAL_S = 1.0
FULL_NOTICE = b"\n[mlplat: the log is full; what follows is not kept]\n"
_LABEL = re.compile(r"([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,128})/(-1|\d{1,9})/(\d{1,9})", re.ASCII)


def log_folder(run_id: str, step: str, item: int, attempt: int) -> str:
    """Where an attempt's log segments lie in the artifact store."""
    return f"pipelines/{run_id}/logs/{step}/{item}/{attempt}"


def log_folder_of(label: str) -> str | None:
    """The folder of the attempt with this ``StepContext.label``; None when it is not one."""
    found = _LABEL.fullmatch(label)
    return None if found is None else log_folder(found[1], found[2], int(found[3]), int(found[4]))


class AttemptLog:
    """What one attempt prints. ``ship`` may be called from any thread."""

    def __init__(self, descriptor: int, artifacts: ArtifactStore, folder: str) -> None:
        self._descriptor = descriptor
        self._offset = 0
        self._lock = threading.Lock()

        def write(name: str, body: bytes) -> None:
            artifacts.write_inline(f"{folder}/{name}", body)

        self._shipper = Shipper(self, write, SEGMENT_INTERVAL_S, full_notice=FULL_NOTICE)

    def ship(self) -> None:
        """Moves what is new into the store, as far as the store takes it."""
        with self._lock:
            if os.fstat(self._descriptor).st_size > self._offset:
                self._shipper.ship()
            if self._shipper.is_full:  # nobody will read it: the disk must not fill up with it
                os.ftruncate(self._descriptor, 0)
                self._offset = 0

    def peek(self, limit: int) -> bytes:
        """See ``segments.Source``."""
        return os.pread(self._descriptor, limit, self._offset)

    def drop(self, count: int) -> None:
        """See ``segments.Source``."""
        self._offset += count


@contextmanager
def captured_output(artifacts: ArtifactStore, folder: str) -> Iterator[AttemptLog]:
    """Sends this process' stdout and stderr to the log at ``folder``. One at a time per process."""
    process = _process_output()
    descriptor = _anonymous_file()
    log = AttemptLog(descriptor, artifacts, folder)
    streams = sys.stdout, sys.stderr
    _flush(*streams)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Ray replaces sys.stdout by its own object, which would bypass the descriptors.
    sys.stdout, sys.stderr = process.streams
    try:
        yield log
    finally:
        _flush(*process.streams)
        sys.stdout, sys.stderr = streams
        for target, original in zip((1, 2), process.originals, strict=True):
            os.dup2(original, target)
        log.ship()
        os.close(descriptor)


class _ProcessOutput:
    """What captures share: where the descriptors pointed first, and text streams on top of them."""

    def __init__(self) -> None:
        self.originals = os.dup(1), os.dup(2)
        self.streams: tuple[TextIO, TextIO] = (_text(1), _text(2))


@cache
def _process_output() -> _ProcessOutput:
    return _ProcessOutput()


def _text(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


def _anonymous_file() -> int:
    """A file without a name, which goes with its last descriptor. Every write goes to its end."""
    folder = tempfile.gettempdir()
    with suppress(OSError, AttributeError):  # not every file system and not every Unix has these
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
    descriptor, path = tempfile.mkstemp(prefix="mlplat-log-")
    os.close(descriptor)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    os.unlink(path)  # noqa: PTH108
    return descriptor


def _flush(*streams: TextIO) -> None:
    for stream in streams:
        with suppress(ValueError, OSError, AttributeError):
            stream.flush()
