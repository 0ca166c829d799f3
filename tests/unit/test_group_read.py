"""Lookups that share reads: each is answered by a read that began after it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from mlplat.db.group_read import GroupRead
from mlplat.errors import InvalidInput, Overloaded, Unavailable


class Source:
    """Values by key; reads wait at a gate, and see what there is when they are let through."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {"a": 1, "b": 2}
        self.reads: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def read(self, keys: Sequence[str]) -> Mapping[str, int]:
        self.reads.append(sorted(keys))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if "bad" in keys:
            raise InvalidInput("no key")
        return {key: self.values[key] for key in keys if key in self.values}


async def _turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_lone_lookup_is_one_read() -> None:
    source = Source()
    group = GroupRead(source.read)
    assert [await group.find(key) for key in ("a", "b", "nothing", "a")] == [1, 2, None, 1]
    assert source.reads == [["a"], ["b"], ["nothing"], ["a"]]


async def test_what_comes_during_a_read_shares_the_next_and_sees_what_was_written_meanwhile() -> None:
    source = Source()
    group = GroupRead(source.read)
    source.gate.clear()
    first = asyncio.create_task(group.find("a"))
    await _turn()
    others = [asyncio.create_task(group.find(key)) for key in ("a", "b", "a", "c")]
    await _turn()
    assert source.reads == [["a"]], "one read at a time"
    source.values |= {"a": 10, "c": 3}  # after the first read began: it may see that or not, the next one must
    source.gate.set()
    assert await asyncio.gather(*others) == [10, 2, 10, 3]
    assert await first in {1, 10}
    assert source.reads == [["a"], ["a", "b", "c"]]


async def test_groups_are_bounded() -> None:
    source = Source()
    group = GroupRead(source.read, max_group=3, max_waiting=5)
    source.gate.clear()
    lookups = [asyncio.create_task(group.find("a"))]
    await _turn()
    lookups += [asyncio.create_task(group.find(str(number))) for number in range(5)]
    await _turn()
    with pytest.raises(Overloaded):
        await group.find("b")
    source.gate.set()
    await asyncio.gather(*lookups)
    assert [len(keys) for keys in source.reads] == [1, 3, 2]
    assert await group.find("b") == 2


async def test_a_key_that_cannot_be_read_is_an_error_of_its_own() -> None:
    source = Source()
    group = GroupRead(source.read)
    source.gate.clear()
    first = asyncio.create_task(group.find("a"))
    await _turn()
    others = [asyncio.create_task(group.find(key)) for key in ("a", "bad", "b")]
    source.gate.set()
    found = await asyncio.gather(first, *others, return_exceptions=True)
    assert [found[0], found[1], found[3]] == [1, 1, 2]
    assert isinstance(found[2], InvalidInput)


async def test_a_read_that_fails_fails_its_group_and_no_later_one() -> None:
    source = Source()
    group = GroupRead(source.read)
    source.error = Unavailable("away")
    found = await asyncio.gather(*(group.find(key) for key in "ab"), return_exceptions=True)
    assert all(isinstance(each, Unavailable) for each in found)
    source.error = None
    assert await group.find("a") == 1


async def test_who_goes_away_takes_nobody_along() -> None:
    source = Source()
    group = GroupRead(source.read)
    source.gate.clear()
    first = asyncio.create_task(group.find("a"))
    await _turn()
    gone, stays = (asyncio.create_task(group.find("b")) for _ in range(2))
    await _turn()
    gone.cancel()
    first.cancel()
    source.gate.set()
    assert await stays == 2
    assert gone.cancelled() or gone.cancelling()
