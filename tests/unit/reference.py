"""The rules of a run once more, as simply as possible: look at everything until nothing changes any more.

Written from the definition of the rules, not from the machine; it shares no code with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WAITING, ACTIVE = {"PENDING"}, {"QUEUED", "RUNNING"}
OVER = {"SUCCEEDED", "FAILED", "CANCELLED", "SKIPPED"}


@dataclass(frozen=True)
class Sketch:
    """A step in short.

    Args:
        when: None: no condition; else what it gives.
        items: None: no fan-out; else whether the arguments of each item can be made.
        wait_s: before each retry.
    """

    needs: tuple[str, ...] = ()
    when: bool | None = None
    items: tuple[bool, ...] | None = None
    width: int | None = None
    attempts: int = 1
    wait_s: float = 0
    approval: bool = False
    is_finally: bool = False
    survives: bool = False


@dataclass
class Cell:
    """A node."""

    state: str = "PENDING"
    attempt: int = 0
    failures: int = 0
    items: int | None = None
    retry_at: float | None = None
    unmet: bool = False  # skipped by its condition


@dataclass
class Reference:
    """A run. Times are seconds since its start."""

    sketches: Mapping[str, Sketch]
    timeout_s: float | None = None
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    stopping: str | None = None
    state: str = "RUNNING"
    started: set[tuple[str, int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in self.sketches:
            self.cells[name, -1] = Cell()

    # -- what happens ----------------------------------------------------------------------------

    def end(self, node: tuple[str, int], outcome: str, now: float) -> None:
        """The attempt of an active node ends."""
        cell, sketch = self.cells[node], self.sketches[node[0]]
        if outcome == "SUCCEEDED":
            cell.state = "SUCCEEDED"
        elif self._stops(node[0]):
            cell.state = "CANCELLED"
        elif outcome == "LOST" and not self._is_lost_cause(node[0]):
            cell.state, cell.retry_at = "PENDING", now
        else:
            cell.failures += outcome != "LOST"
            is_last = outcome != "FAILED" or cell.failures >= sketch.attempts
            if is_last or self._is_lost_cause(node[0]):
                cell.state = "FAILED"
            else:
                cell.state, cell.retry_at = "PENDING", now + sketch.wait_s

    def decide(self, name: str, approve: bool) -> None:
        """Somebody decides."""
        cell = self.cells[name, -1]
        if self.sketches[name].approval and cell.state == "QUEUED":
            cell.state = "SUCCEEDED" if approve else "FAILED"

    def stop(self, state: str) -> None:
        """Somebody or the timeout stops it."""
        if self.stopping is not None or self.is_main_over():
            return
        self.stopping = state
        for name, sketch in self.sketches.items():
            if sketch.approval and not sketch.is_finally and self.cells[name, -1].state not in OVER:
                self.cells[name, -1].state = "CANCELLED"

    # -- what follows ----------------------------------------------------------------------------

    def settle(self, now: float, chosen: set[tuple[str, int, int]]) -> None:
        """Applies the rules. ``chosen`` is what the machine started: it may choose among items that retry."""
        if self.timeout_s is not None and now >= self.timeout_s:
            self.stop("FAILED")
        self.started = set()
        changed = True
        while changed:
            changed = sum(self._look(name, now, chosen) for name in self.sketches) > 0
        if all(self.cells[name, -1].state in OVER for name in self.sketches):
            failed = any(self.cells[name, -1].state == "FAILED" for name in self.sketches)
            self.state = self.stopping or ("FAILED" if failed else "SUCCEEDED")

    def _look(self, name: str, now: float, chosen: set[tuple[str, int, int]]) -> bool:
        cell, sketch = self.cells[name, -1], self.sketches[name]
        if cell.state in OVER:
            return False
        if cell.items is not None:
            return self._look_at_items(name, cell, sketch, now, chosen)
        if cell.state in ACTIVE:
            return False
        needs = [self.cells[need, -1] for need in sketch.needs]
        if self._stops(name):
            cell.state = "CANCELLED"
        elif cell.retry_at is not None:
            if cell.retry_at > now:
                return False
            self._start(name, -1)
        elif any(need.state in OVER and not _is_met(need) for need in needs):
            cell.state = "SKIPPED"
        elif not all(_is_met(need) for need in needs) or (sketch.is_finally and not self.is_main_over()):
            return False
        elif sketch.when is False:
            cell.state, cell.unmet = "SKIPPED", True
        elif sketch.approval:
            cell.state = "QUEUED"
        elif sketch.items is None:
            self._start(name, -1)
        else:
            cell.state, cell.items = "RUNNING", len(sketch.items)
            for index in range(len(sketch.items)):
                self.cells[name, index] = Cell()
        return True

    def _look_at_items(
        self, name: str, whole: Cell, sketch: Sketch, now: float, chosen: set[tuple[str, int, int]]
    ) -> bool:
        items = [self.cells[name, index] for index in range(whole.items or 0)]
        changed = False
        if self._stops(name) or any(item.state == "FAILED" for item in items):
            for item in items:
                if item.state in WAITING:
                    item.state, changed = "CANCELLED" if self._stops(name) else "SKIPPED", True
        else:
            room = len(items) if sketch.width is None else sketch.width
            room -= sum(item.state in ACTIVE for item in items)
            again = [i for i, item in enumerate(items) if item.state in WAITING and item.attempt > 0]
            due = [i for i in again if (items[i].retry_at or 0) <= now]
            due.sort(key=lambda i: (name, i, items[i].attempt + 1) not in chosen)
            fresh = [i for i, item in enumerate(items) if item.state in WAITING and item.attempt == 0]
            for index in (due + fresh)[: max(room, 0)]:
                changed = True
                if not self._start(name, index):
                    break
        if all(item.state in OVER for item in items):
            found = {item.state for item in items}
            whole.state = next((state for state in ("FAILED", "CANCELLED") if state in found), "SUCCEEDED")
            changed = True
        return changed

    def _start(self, name: str, index: int) -> bool:
        cell, items = self.cells[name, index], self.sketches[name].items
        if index >= 0 and items is not None and not items[index]:
            cell.state = "FAILED"
            return False
        cell.state, cell.retry_at, cell.attempt = "QUEUED", None, cell.attempt + 1
        self.started.add((name, index, cell.attempt))
        return True

    def _stops(self, name: str) -> bool:
        return self.stopping is not None and not self.sketches[name].is_finally

    def _is_lost_cause(self, name: str) -> bool:
        """A fan-out with a failed item."""
        count = self.cells[name, -1].items or 0
        return any(self.cells[name, index].state == "FAILED" for index in range(count))

    def is_main_over(self) -> bool:
        return all(self.cells[name, -1].state in OVER for name, step in self.sketches.items() if not step.is_finally)


def _is_met(need: Cell) -> bool:
    return need.state == "SUCCEEDED" or (need.state == "SKIPPED" and need.unmet)
