"""Which waiting run comes next: by priority, then by fair share between submitters, then by age."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A run as the queue sees it. ``limit`` is how many runs with the same ``key`` may be under way."""

    run_id: str
    priority: int
    submitter: str
    key: str | None = None
    limit: int = 1


class AdmissionQueue:
    """Runs that wait, and those that are under way. Add runs in the order of their submission.

    Of the waiting runs with the highest priority, the oldest of the submitter with the fewest runs under way comes
    first. A run whose key is full lets others pass.

    Args:
        capacity: runs that may be under way at once.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._active: dict[str, Candidate] = {}
        self._by_submitter: Counter[str] = Counter()
        self._by_key: Counter[str] = Counter()
        self._waiting: dict[int, dict[str, deque[Candidate]]] = {}
        #: Runs whose key was full when their turn came, oldest first.
        self._parked: dict[str, deque[Candidate]] = {}
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def active(self) -> dict[str, Candidate]:
        """Runs under way, by id."""
        return self._active

    def is_full(self, key: str, limit: int) -> bool:
        """Whether as many runs as ``limit`` with that key are under way."""
        return self._by_key[key] >= limit

    def holders(self, key: str) -> list[str]:
        """Runs under way with that key, oldest first."""
        return [run_id for run_id, candidate in self._active.items() if candidate.key == key]

    def add(self, candidate: Candidate) -> None:
        """The run waits. A run that is known already changes nothing."""
        if candidate.run_id in self._ids or candidate.run_id in self._active:
            return
        self._ids.add(candidate.run_id)
        self._lane(candidate).append(candidate)

    def start(self, candidate: Candidate) -> None:
        """The run is under way, whether it waited here or not."""
        if candidate.run_id in self._active:
            return
        self._ids.discard(candidate.run_id)
        self._active[candidate.run_id] = candidate
        self._by_submitter[candidate.submitter] += 1
        if candidate.key is not None:
            self._by_key[candidate.key] += 1

    def end(self, run_id: str) -> bool:
        """The run is over, or waits no more. False when it was not known."""
        known = run_id in self._ids
        self._ids.discard(run_id)
        candidate = self._active.pop(run_id, None)
        if candidate is None:
            return known
        self._by_submitter[candidate.submitter] -= 1
        if candidate.key is not None:
            self._by_key[candidate.key] -= 1
            self._unpark(candidate.key)
        return True

    def take_next(self) -> Candidate | None:
        """The run whose turn it is, now under way; None when nothing fits or nothing waits."""
        if len(self._active) >= self.capacity:
            return None
        for priority in sorted(self._waiting, reverse=True):
            by_submitter = self._waiting[priority]
            for submitter in sorted(by_submitter, key=self._by_submitter.__getitem__):
                found = self._first_that_fits(by_submitter[submitter])
                if not by_submitter[submitter]:
                    del by_submitter[submitter]
                if found is not None:
                    self.start(found)
                    return found
            if not by_submitter:
                del self._waiting[priority]
        return None

    def _lane(self, candidate: Candidate) -> deque[Candidate]:
        return self._waiting.setdefault(candidate.priority, {}).setdefault(candidate.submitter, deque())

    def _unpark(self, key: str) -> None:
        """The most important run that waits for the key gets its turn again, before its submitter's others."""
        parked = self._parked.get(key)
        while parked:
            chosen = max(parked, key=lambda candidate: candidate.priority)
            parked.remove(chosen)
            if chosen.run_id in self._ids:
                self._lane(chosen).appendleft(chosen)
                break
        if not parked:
            self._parked.pop(key, None)

    def _first_that_fits(self, waiting: deque[Candidate]) -> Candidate | None:
        while waiting:
            candidate = waiting.popleft()
            if candidate.run_id not in self._ids:  # ended while it waited
                continue
            if candidate.key is None or not self.is_full(candidate.key, candidate.limit):
                return candidate
            self._parked.setdefault(candidate.key, deque()).append(candidate)
        return None
