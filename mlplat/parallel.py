"""Calls in threads, answers in order, and never more under way than are worked off."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

T = TypeVar("T")


def in_order(pool: Executor, count: int, calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What calls return, in their order; ``count`` of them are under way or wait to be taken.

    When one raises, those that have begun or were about to come to their end first.
    """
    waiting = deque[Future[T]]()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except Exception:
        wait(waiting)
        raise
    finally:
        for future in waiting:
            future.cancel()
