"""Whose attempt goes to the workers next: by its run's priority, then by fair share between submitters."""

from __future__ import annotations

import asyncio

from mlplat.pipelines.admission import AdmissionQueue, Candidate


class Turns:
    """Lets so many attempts go to the cluster as keep its CPUs busy; the others wait here, where priorities count.

    The cluster itself serves them in the order of their arrival, so what is handed to it early cannot be overtaken.

    Args:
        capacity: attempts that may be with the cluster at once.
    """

    def __init__(self, capacity: int) -> None:
        self._queue = AdmissionQueue(capacity)
        self._waiting: dict[str, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def set_capacity(self, capacity: int) -> None:
        """The cluster has grown or shrunk."""
        self._queue.capacity = capacity
        self._go_on()

    async def take(self, label: str, priority: int, submitter: str) -> None:
        """Returns when it is this attempt's turn. Call ``give_back`` afterwards, whatever happens."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[label] = turn
        self._queue.add(Candidate(label, priority, submitter))
        self._go_on()
        try:
            await turn
        finally:
            self._waiting.pop(label, None)

    def give_up(self, label: str) -> bool:
        """Ends the wait of an attempt with CancelledError; False when it does not wait."""
        turn = self._waiting.get(label)
        return turn is not None and turn.cancel()

    def give_back(self, label: str) -> None:
        """The attempt is over, or waits no more."""
        if self._queue.end(label):
            self._go_on()

    def _go_on(self) -> None:
        while (candidate := self._queue.take_next()) is not None:
            turn = self._waiting.get(candidate.run_id)
            if turn is not None and not turn.done():
                turn.set_result(None)
