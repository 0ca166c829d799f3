"""What went wrong in the background, by run."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from mlplat.sdk.delivery import Refusal

MAX_REASONS = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunNotes:
    """Points of a run that found no room, and the first reasons for which the platform refused something."""

    dropped_points: int = 0
    refused: tuple[str, ...] = ()


@dataclass
class _Notes:
    dropped_points: int = 0
    refused: list[str] = field(default_factory=list)


class Notes:
    """Collects, and warns at the first problem of each kind and run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, _Notes] = {}

    def drop(self, run_id: str, points: int) -> None:
        """Notes points that found no room."""
        with self._lock:
            notes = self._runs.setdefault(run_id, _Notes())
            first = notes.dropped_points == 0
            notes.dropped_points += points
        if first:
            _log.warning("mlplat run %s: metric points find no room and are dropped", run_id)

    def refuse(self, refusal: Refusal) -> None:
        """Notes what the platform did not take."""
        with self._lock:
            notes = self._runs.setdefault(refusal.run_id, _Notes())
            first = not notes.refused
            if len(notes.refused) < MAX_REASONS and refusal.reason not in notes.refused:
                notes.refused.append(refusal.reason)
        if first:
            _log.warning("mlplat run %s: not accepted: %s", refusal.run_id, refusal.reason)

    def of(self, run_id: str) -> RunNotes:
        """What there is about a run."""
        with self._lock:
            notes = self._runs.get(run_id, _Notes())
            return RunNotes(notes.dropped_points, tuple(notes.refused))
