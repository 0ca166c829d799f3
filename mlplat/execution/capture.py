"""Per-attempt logs: everything the attempt's process prints, its children and C code included.

File descriptors 1 and 2 point at a file for the duration; a thread moves what is new into the
artifact store every second, as numbered segments. So logs can be read while the attempt runs, and a
killed attempt loses its last second at most.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import PlatformError

SEGMENT_INTERVAL_S = 1.0
MAX_LOG_BYTES = 100 * 1024 * 1024


def log_folder(run_id: str, step: str, item: int, attempt: int) -> str:
    """Where an attempt's log segments lie in the artifact store."""
    return f"pipelines/{run_id}/logs/{step}/{item}/{attempt}"


def read_log(artifacts: ArtifactStore, run_id: str, step: str, item: int, attempt: int) -> bytes:
    """What the attempt has printed so far."""
    folder = log_folder(run_id, step, item, attempt)
    return b"".join(chunk for entry in artifacts.list(folder) for chunk in artifacts.read(f"{folder}/{entry.path}"))


class _Shipper:
    """Moves a growing file into the artifact store, segment by segment."""

    def __init__(self, artifacts: ArtifactStore, folder: str, path: str) -> None:
        self._artifacts = artifacts
        self._folder = folder
        self._path = path
        self._offset = 0
        self._segment = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlplat-logs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._ship()

    def _run(self) -> None:
        while not self._stop.wait(SEGMENT_INTERVAL_S):
            self._ship()

    def _ship(self) -> None:
        if self._offset >= MAX_LOG_BYTES:
            return
        with open(self._path, "rb") as source:  # noqa: PTH123 - a plain file name from mkstemp
            source.seek(self._offset)
            new = source.read(MAX_LOG_BYTES - self._offset)
        if not new:
            return
        # A store that is away must not fail the attempt: the same bytes are tried again next time.
        with suppress(OSError, PlatformError):
            self._artifacts.write(f"{self._folder}/{self._segment:06d}.log", [new])
            self._segment += 1
            self._offset += len(new)


@contextmanager
def captured_output(artifacts: ArtifactStore, folder: str) -> Iterator[None]:
    """Sends this process' stdout and stderr to the log at ``folder``. One at a time per process."""
    handle, path = tempfile.mkstemp(prefix="mlplat-log-")
    saved = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    shipper = _Shipper(artifacts, folder, path)
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
