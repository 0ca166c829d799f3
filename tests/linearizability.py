"""Whether what concurrent clients saw could have happened one after another: Wing and Gong's search, with a memory.

A history is linearizable when every operation can be given one moment between its call and its return, such that each
answer is right for a sequential object that is asked at those moments. What became of an operation without an answer
is unknown: it may have happened at any moment after its call, or never.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

S = TypeVar("S", bound=Hashable)
UNKNOWN = math.inf


@dataclass(frozen=True)
class Operation:
    """One call of one client. ``returned`` is ``UNKNOWN`` when there was no answer; ``result`` is the answer."""

    what: str
    arguments: tuple[Any, ...]
    called: float
    returned: float
    result: Any = None


#: The state after an operation; None when its answer is wrong in that state. Unknown answers are right in any state.
Step = Callable[[S, Operation], S | None]


@dataclass(frozen=True)
class _Place(Generic[S]):
    """How far a search is: the first operations are placed, and of the following those whose bits are set."""

    placed: int
    mask: int
    state: S


def is_linearizable(history: Sequence[Operation], step: Step[S], initial: S) -> bool:
    """Searches for an order. ``step`` must not change the state that it is given."""
    operations = sorted(history, key=lambda operation: operation.called)
    seen: set[_Place[S]] = set()
    waiting = [_Place(0, 0, initial)]
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        if _is_complete(operations, place):
            return True
        waiting += _following(operations, place, step)
    return False


def _is_complete(operations: Sequence[Operation], place: _Place[S]) -> bool:
    return all(
        operations[number].returned == UNKNOWN or place.mask >> (number - place.placed) & 1
        for number in range(place.placed, len(operations))
    )


def _following(operations: Sequence[Operation], place: _Place[S], step: Step[S]) -> Iterator[_Place[S]]:
    """Every place after one more operation: one that was called before each of the others had returned."""
    first_return = UNKNOWN
    for number in range(place.placed, len(operations)):
        bit = 1 << (number - place.placed)
        if place.mask & bit:
            continue
        operation = operations[number]
        if operation.called > first_return:
            return
        first_return = min(first_return, operation.returned)
        state = step(place.state, operation)
        if state is not None:
            yield _moved(place.placed, place.mask | bit, state)


def _moved(placed: int, mask: int, state: S) -> _Place[S]:
    while mask & 1:
        placed, mask = placed + 1, mask >> 1
    return _Place(placed, mask, state)
