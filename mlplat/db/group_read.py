"""Group reads by natural batching: lookups that arrive while a read is under way share the next one.

A lookup is answered by a read that begins after it came, so it sees all that was committed before. A lone caller waits
for nobody; under load a read answers many for little more than the price of one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mlplat.errors import InvalidInput, Overloaded

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class GroupRead(Generic[K, V]):
    """Joins concurrent lookups.

    Args:
        read: what there is of several keys; if it raises, every caller of that group gets the error.
        max_group: lookups of one read.
        max_waiting: lookups beyond these are refused with ``Overloaded``.
    """

    def __init__(
        self,
        read: Callable[[Sequence[K]], Awaitable[Mapping[K, V]]],
        *,
        max_group: int = 100,
        max_waiting: int = 10_000,
    ) -> None:
        self._read = read
        self._max_group = max_group
        self._max_waiting = max_waiting
        self._waiting: list[_Lookup[K, V]] = []
        self._reader: asyncio.Task[None] | None = None

    async def find(self, key: K) -> V | None:
        """What there is of a key, None when there is nothing.

        Raises:
            Overloaded: too many wait.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} reads wait; retry in a second")
        loop = asyncio.get_running_loop()
        lookup = _Lookup[K, V](key, loop.create_future())
        self._waiting.append(lookup)
        if self._reader is None or self._reader.done():
            self._reader = loop.create_task(self._read_all())
        return await lookup.answer

    async def _read_all(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[: self._max_group], self._waiting[self._max_group :]
            await self._answer(group)

    async def _answer(self, group: Sequence[_Lookup[K, V]]) -> None:
        try:
            found = await self._read(list({lookup.key for lookup in group}))
        except InvalidInput as error:
            if len(group) == 1:
                group[0].fail(error)
                return
            for lookup in group:  # one of them is to blame, and the others are to have their answers
                await self._answer([lookup])
        except BaseException as error:
            for lookup in group:
                lookup.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            for lookup in group:
                if not lookup.answer.done():  # else who asked is gone
                    lookup.answer.set_result(found.get(lookup.key))


@dataclass(frozen=True)
class _Lookup(Generic[K, V]):
    key: K
    answer: asyncio.Future[V | None]

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
