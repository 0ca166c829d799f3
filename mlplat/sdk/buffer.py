"""What was logged a moment ago: the only thing between the user's loop and the disk."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Buffer(Generic[T]):
    """Entries with weights, in order. ``add`` takes a microsecond: the lock guards a few assignments and no work."""

    def __init__(self, max_weight: int, hurry_weight: int) -> None:
        self._max_weight = max_weight
        self._hurry_weight = hurry_weight
        self._lock = threading.Lock()
        self._entries: list[T] = []
        self._weight = 0
        self._wanted = False
        self._wake: SimpleQueue[None] = SimpleQueue()
        #: Entries ever accepted.
        self.added = 0

    def add(self, entry: T, weight: int) -> bool:
        """Takes an entry; False when there is no room."""
        with self._lock:
            if self._weight + weight > self._max_weight:
                return False
            self._entries.append(entry)
            self._weight += weight
            self.added += 1
            wake = self._wanted or self._weight - weight < self._hurry_weight <= self._weight
            self._wanted = False
        if wake:
            self._wake.put(None)
        return True

    def take(self) -> list[T]:
        """All entries, oldest first."""
        with self._lock:
            taken, self._entries, self._weight = self._entries, [], 0
        return taken

    def wait(self) -> None:
        """Returns when there is something to take, or after ``hurry``."""
        with self._lock:
            if self._entries:
                return
            self._wanted = True
        self._wake.get()

    def linger(self, seconds: float) -> None:
        """Lets entries gather: for so long, or until ``hurry`` is called or ``hurry_weight`` is reached."""
        if seconds > 0:
            try:
                self._wake.get(timeout=seconds)
            except Empty:
                return

    def hurry(self) -> None:
        """Wakes whoever waits or lingers."""
        self._wake.put(None)
