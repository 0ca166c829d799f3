"""Per-attempt logs: everything the attempt's process prints, its children and C code included.

File descriptors 1 and 2 point at a file for the duration; a thread moves what is new into the
artifact store every second, as numbered segments. So logs can be read while the attempt runs, and a
killed attempt loses its last second at most.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlplat.artifacts.segments import Shipper
from mlplat.artifacts.store import ArtifactStore

SEGMENT_INTERVAL_S = 1.0
_LABEL = re.compile(r"([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,128})/(-1|\d{1,9})/(\d{1,9})", re.ASCII)


def log_folder(run_id: str, step: str, item: int, attempt: int) -> str:
    """Where an attempt's log segments lie in the artifact store."""
    return f"pipelines/{run_id}/logs/{step}/{item}/{attempt}"


def log_folder_of(label: str) -> str | None:
    """The folder of the attempt with this ``StepContext.label``; None when it is not one."""
    found = _LABEL.fullmatch(label)
    return None if found is None else log_folder(found[1], found[2], int(found[3]), int(found[4]))


def read_log(artifacts: ArtifactStore, run_id: str, step: str, item: int, attempt: int) -> bytes:
    """What the attempt has printed so far."""
    folder = log_folder(run_id, step, item, attempt)
    return b"".join(chunk for entry in artifacts.list(folder) for chunk in artifacts.read(f"{folder}/{entry.path}"))


class _GrowingFile:
    """A file that others append to, as a source of segments."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset = 0

    def peek(self, limit: int) -> bytes:
        with open(self._path, "rb") as source:  # noqa: PTH123 - a plain file name from mkstemp
            source.seek(self._offset)
            return source.read(limit)

    def drop(self, count: int) -> None:
        self._offset += count


@contextmanager
def captured_output(artifacts: ArtifactStore, folder: str) -> Iterator[None]:
    """Sends this process' stdout and stderr to the log at ``folder``. One at a time per process."""
    handle, path = tempfile.mkstemp(prefix="mlplat-log-")
    saved = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr

    def write(name: str, body: bytes) -> None:
        artifacts.write(f"{folder}/{name}", [body])

    shipper = Shipper(_GrowingFile(path), write, SEGMENT_INTERVAL_S)
    shipper.start()
    _flush(*streams)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    # Ray replaces sys.stdout by its own object, which would bypass the descriptors.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="replace")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
    try:
        yield
    finally:
        _flush(sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = streams
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        shipper.close()
        os.unlink(path)  # noqa: PTH108


def _flush(*streams: object) -> None:
    for stream in streams:
        with suppress(ValueError, OSError, AttributeError):
            stream.flush()  # type: ignore[attr-defined]
