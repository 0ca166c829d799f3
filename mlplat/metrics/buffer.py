"""What of the log is still in memory: a bounded cache in front of the metric store.

Contiguous by sequence number. A group that does not fit is simply not cached; whoever drains the
buffer then finds a gap and reads it from the log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

#: Runs whose newest group is remembered before those that are flushed are forgotten.
MAX_RUNS = 20_000


@dataclass(frozen=True)
class Cached(Generic[T]):
    """A group in memory, with points of ``run_ids``."""

    seq: int
    points: int
    weight: int
    body: T
    run_ids: frozenset[str] = frozenset()


class FlushBuffer(Generic[T]):
    """Groups in the order of their sequence numbers, at most ``max_weight`` in all."""

    def __init__(self, flushed_seq: int, last_seq: int, max_weight: int) -> None:
        """Groups up to ``last_seq`` were appended by an earlier process, and nobody here knows their runs."""
        self.flushed_seq = flushed_seq
        self.last_seq = last_seq
        self._inherited_seq = last_seq
        self._last_of_run: dict[str, int] = {}
        self._max_weight = max_weight
        self._weight = 0
        self._points = 0
        self._groups: deque[Cached[T]] = deque()
        self._full = False

    @property
    def weight(self) -> int:
        """Weight of what is cached."""
        return self._weight

    @property
    def points(self) -> int:
        """Points that are cached."""
        return self._points

    @property
    def lag(self) -> int:
        """Groups committed and not flushed."""
        return self.last_seq - self.flushed_seq

    def pending_seq(self, run_ids: Iterable[str] | None) -> int:
        """The group that must be flushed before every point of these runs (None: of all runs) can be read."""
        if run_ids is None:
            return self.last_seq
        newest = max((self._last_of_run.get(run_id, 0) for run_id in run_ids), default=0)
        return max(newest, self._inherited_seq)

    def pending(self, run_ids: Collection[str]) -> list[Cached[T]] | None:
        """The groups with points of these runs that are not flushed; None when not all of them are in memory."""
        target = self.pending_seq(run_ids)
        if target <= self.flushed_seq:
            return []
        groups = self._groups
        if not groups or groups[0].seq != self.flushed_seq + 1 or groups[-1].seq < target:
            return None
        wanted = frozenset(run_ids)
        return [group for group in groups if not wanted.isdisjoint(group.run_ids)]

    def add(self, group: Cached[T]) -> None:
        """Takes a committed group; drops it when there is no room (the log has it)."""
        assert group.seq == self.last_seq + 1, f"group {group.seq} after {self.last_seq}"
        self.last_seq = group.seq
        self._last_of_run.update(dict.fromkeys(group.run_ids, group.seq))
        self._full = self._full or self._weight + group.weight > self._max_weight
        if not self._full:
            self._groups.append(group)
            self._weight += group.weight
            self._points += group.points

    def next_batch(self, max_points: int) -> list[Cached[T]]:
        """The groups to flush next, all from memory, or an empty list when the log must be read."""
        batch: list[Cached[T]] = []
        points = 0
        for group in self._groups:
            if group.seq != self.flushed_seq + len(batch) + 1:
                break
            points += group.points
            if batch and points > max_points:
                break
            batch.append(group)
        return batch

    def mark_flushed(self, seq: int) -> None:
        """Forgets everything up to ``seq``."""
        assert seq >= self.flushed_seq
        self.flushed_seq = seq
        while self._groups and self._groups[0].seq <= seq:
            group = self._groups.popleft()
            self._weight -= group.weight
            self._points -= group.points
        if self.flushed_seq == self.last_seq:
            self._full = False
            self._last_of_run.clear()
        elif len(self._last_of_run) > MAX_RUNS:
            self._last_of_run = {run_id: last for run_id, last in self._last_of_run.items() if last > seq}
