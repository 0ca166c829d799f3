"""Looks after the attempt that runs in this process: its live log, its start and its progress.

A thread that lives as long as the process. Most attempts are over before it has looked once; they cost it
nothing, and say with their outcome when they began.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

from mlplat.execution.capture import SEGMENT_INTERVAL_S, AttemptLog

#: An attempt that runs for longer is announced as running.
ANNOUNCE_AFTER_S = 0.2
PROGRESS_EVERY_S = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """What an attempt says before it is over: that it runs (``progress`` is None), or how far it is."""

    label: str
    started_at: datetime
    node: str | None
    progress: dict[str, Any] | None = None


#: Takes a notice to the attempt's executor; may drop it, and may not raise.
Tell = Callable[[Notice], None]


@dataclass
class Attended:
    """An attempt under way."""

    label: str
    tell: Tell
    log: AttemptLog
    node: str | None
    announce_at_once: bool
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    progress: dict[str, Any] | None = None
    _began: float = field(default_factory=time.monotonic)
    _announced: bool = False
    _told: dict[str, Any] | None = None

    def look(self) -> None:
        """Ships the log and says what is new."""
        self.log.ship()
        self.announce()

    def announce(self) -> None:
        """Says that it runs, when it is time, and how far it is, when that changed."""
        if not self._announced and (self.announce_at_once or time.monotonic() - self._began >= ANNOUNCE_AFTER_S):
            self._announced = True
            self.tell(Notice(self.label, self.started_at, self.node))
        if self._announced and self.progress is not self._told:
            self._told = self.progress
            self.tell(Notice(self.label, self.started_at, self.node, self._told))


class Attendant:
    """The thread. ``begin`` and ``end`` enclose each attempt of the process."""

    def __init__(self) -> None:
        self._current: Attended | None = None
        self._begun = threading.Event()
        #: Held while the attempt is looked at, so that ``end`` waits for that.
        self._looking = threading.Lock()
        threading.Thread(target=self._run, name="mlplat-attendant", daemon=True).start()

    def begin(self, attended: Attended) -> None:
        """From now on this attempt is looked after."""
        if attended.announce_at_once:
            attended.announce()
        self._current = attended
        self._begun.set()

    def end(self) -> None:
        """The attempt is over; whatever it still has to say is in its outcome and its log."""
        with self._looking:
            self._current = None

    def _run(self) -> None:
        while True:
            self._begun.wait()
            self._begun.clear()
            wait_s = ANNOUNCE_AFTER_S
            while self._current is not None:
                time.sleep(wait_s)
                with self._looking:
                    if self._current is not None:
                        _look_at(self._current)
                wait_s = min(PROGRESS_EVERY_S, SEGMENT_INTERVAL_S)


def _look_at(attended: Attended) -> None:
    try:
        attended.look()
    except Exception:  # a look that fails must not be the last one of this process
        _log.debug("attempt %s was not looked at", attended.label, exc_info=True)


@cache
def attendant() -> Attendant:
    """The one of this process."""
    return Attendant()
