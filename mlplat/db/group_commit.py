"""Group commit by natural batching: a group closes when the previous commit returns.

A lone caller waits for nobody; under load the groups grow by themselves. There is no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from mlplat.errors import Overloaded, Unavailable

T = TypeVar("T")


class GroupCommit(Generic[T]):
    """Joins concurrent submissions into one ``commit`` call after another.

    Args:
        commit: makes a group durable; if it raises, every caller of that group gets the error.
        weight: size of one item, in the unit of the two bounds.
        max_group: a group takes further items until it weighs this much.
        max_pending: submissions beyond this weight are refused with ``Overloaded``.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[T]], Awaitable[None]],
        *,
        weight: Callable[[T], int] = lambda _item: 1,
        max_group: int = 1_000,
        max_pending: int = 10_000,
    ) -> None:
        self._commit = commit
        self._weight = weight
        self._max_group = max_group
        self._max_pending = max_pending
        self._queue: list[tuple[T, asyncio.Future[None]]] = []
        self._committing: list[tuple[T, asyncio.Future[None]]] = []
        self._pending = 0
        self._wake = asyncio.Event()
        self._closed = False
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    @property
    def pending(self) -> int:
        """Weight of what was submitted and is not committed yet."""
        return self._pending

    async def submit(self, item: T) -> None:
        """Returns when ``item`` is durable.

        Raises:
            Overloaded: too much is pending.
            Unavailable: this committer was closed.
        """
        if self._closed:
            raise Unavailable("this writer has stopped; retry")
        weight = self._weight(item)
        if self._pending and self._pending + weight > self._max_pending:
            raise Overloaded(f"{self._pending} pending of at most {self._max_pending}; retry in a second")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((item, done))
        self._pending += weight
        self._wake.set()
        await done

    async def settle(self) -> None:
        """Returns when everything submitted before this call is durable or refused."""
        waiting = [done for _item, done in (*self._committing, *self._queue)]
        if waiting:
            await asyncio.wait(waiting)

    async def close(self) -> None:
        """Commits what is queued, then refuses further items."""
        self._closed = True
        self._wake.set()
        await self._loop_task

    async def _run(self) -> None:
        while True:
            if not self._queue:
                if self._closed:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            self._committing = self._next_group()
            await self._commit_group(self._committing)
            self._committing = []

    def _next_group(self) -> list[tuple[T, asyncio.Future[None]]]:
        size = weight = 0
        for item, _done in self._queue:
            weight += self._weight(item)
            if size and weight > self._max_group:
                break
            size += 1
        group, self._queue = self._queue[:size], self._queue[size:]
        return group

    async def _commit_group(self, group: list[tuple[T, asyncio.Future[None]]]) -> None:
        error: BaseException | None = None
        try:
            await self._commit([item for item, _done in group])
        except Exception as raised:  # every caller of the group gets it
            error = raised
        self._pending -= sum(self._weight(item) for item, _done in group)
        for _item, done in group:
            if done.done():
                continue  # its caller was cancelled meanwhile
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)
