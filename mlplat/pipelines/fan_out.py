"""What the machine keeps of a fan-out under way, so that no step looks at all its items."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlplat.pipelines.model import Node, State, StepRun


@dataclass
class FanOut:
    """Items by what they wait for.

    Args:
        pending: items that may start, in order.
        active: items with an attempt.
        open: items that are not final.
        failed: the first item that failed for good.
        cancelled: whether one was cancelled.
        max_parallel: how many may be active; None: all.
    """

    pending: deque[int]
    active: int
    open: int
    failed: int | None
    cancelled: bool
    max_parallel: int | None

    @classmethod
    def of(cls, items: Sequence[StepRun], max_parallel: int | None) -> FanOut:
        """As the rows of the items have it."""
        states = [item.state for item in items]
        return cls(
            deque(item.item for item in items if item.state is State.PENDING and item.retry_at is None),
            sum(state in {State.QUEUED, State.RUNNING} for state in states),
            sum(not state.is_final for state in states),
            next((item.item for item in items if item.state is State.FAILED), None),
            State.CANCELLED in states,
            max_parallel,
        )

    @property
    def may_start(self) -> bool:
        """Whether an item waits that may be active."""
        return bool(self.pending) and (self.max_parallel is None or self.active < self.max_parallel)

    def take_startable(self, limit: int) -> Iterator[int]:
        """Up to ``limit`` items that start now; they count as active."""
        while limit > 0 and self.may_start:
            limit -= 1
            self.active += 1
            yield self.pending.popleft()

    def take_waiting(self, nodes: Mapping[Node, StepRun], step: str) -> list[StepRun]:
        """Items without an attempt, which will get none any more. Those that wait for a retry are among them."""
        if self.open == self.active:
            return []
        self.pending.clear()
        count = nodes[step, -1].items or 0
        return [row for index in range(count) if (row := nodes[step, index]).state is State.PENDING]

    def close(self, item: StepRun, *, was_active: bool) -> None:
        """The item is final. Call it once."""
        self.open -= 1
        self.active -= was_active
        if item.state is State.FAILED and self.failed is None:
            self.failed = item.item
        self.cancelled |= item.state is State.CANCELLED
