"""Telling the platform that this process lives: one call for all its runs."""

from __future__ import annotations

import logging
import threading

from mlplat.errors import PlatformError
from mlplat.sdk.client import Client

BEAT_EVERY_S = 10.0
BEAT_TIMEOUT_S = 5.0
MAX_RUNS = 1_000
_log = logging.getLogger(__name__)


class Pulse:
    """Heartbeats of the runs in it, from a thread that lives while there are any. Thread-safe."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._run_ids: set[str] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, run_id: str) -> None:
        """Beats for the run from now on."""
        with self._lock:
            self._run_ids.add(run_id)
        self.start()

    def start(self) -> None:
        """Beats for the runs that are in it."""
        with self._lock:
            if self._run_ids and self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._run, name="mlplat-pulse", daemon=True)
                self._thread.start()

    def remove(self, run_id: str) -> None:
        """No longer beats for the run."""
        with self._lock:
            self._run_ids.discard(run_id)

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()

    def copy(self) -> Pulse:
        """The same runs in a pulse that is not started yet, for a forked process."""
        copy = Pulse(self._url)
        copy._run_ids = set(self._run_ids)
        return copy

    def _run(self) -> None:
        client = Client(self._url, retry_for_s=0, timeout_s=BEAT_TIMEOUT_S)
        while not self._stopped.wait(BEAT_EVERY_S):
            with self._lock:
                run_ids = sorted(self._run_ids)
                if not run_ids:
                    self._thread = None
                    return
            try:
                for start in range(0, len(run_ids), MAX_RUNS):
                    client.post("/api/v1/runs/heartbeat", {"run_ids": run_ids[start : start + MAX_RUNS]})
            except PlatformError as error:
                _log.debug("no heartbeat: %s", error)
