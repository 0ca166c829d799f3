"""Accepting comes before running: while many submissions arrive at once, new runs wait a moment with their start."""

from __future__ import annotations

import asyncio
import time
from collections import deque

#: So many submissions within the window are a burst.
BURST = 10
WINDOW_S = 0.05
#: Nobody waits for longer than this.
MAX_WAIT_S = 0.4


class Burst:
    """Notices bursts of submissions."""

    def __init__(self) -> None:
        self._arrivals: deque[float] = deque(maxlen=BURST)

    def note(self) -> None:
        """A submission has arrived."""
        self._arrivals.append(time.monotonic())

    async def over(self) -> None:
        """Returns when no burst is under way, at once if none is."""
        deadline = time.monotonic() + MAX_WAIT_S
        while self._is_on() and time.monotonic() < deadline:
            await asyncio.sleep(WINDOW_S / 2)

    def _is_on(self) -> bool:
        return len(self._arrivals) == BURST and time.monotonic() - self._arrivals[0] < WINDOW_S
