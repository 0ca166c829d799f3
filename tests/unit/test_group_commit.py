"""Group commit: who commits with whom, and who hears of an error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.db.group_commit import GroupCommit
from mlplat.errors import Overloaded, Unavailable


class Log:
    """A commit that takes until ``gate`` opens, and fails when told to."""

    def __init__(self, is_open: bool = True) -> None:
        self.groups: list[list[int]] = []
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()
        self.failures: list[Exception] = []
        if is_open:
            self.gate.set()

    async def commit(self, group: Sequence[int]) -> None:
        self.groups.append(list(group))
        self.entered.set()
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)


async def start(committer: GroupCommit[int], *items: int) -> list[asyncio.Task[None]]:
    """Submits without waiting for the commits."""
    tasks = [asyncio.create_task(committer.submit(item)) for item in items]
    for _turn in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_a_lone_item_is_committed_alone_and_at_once() -> None:
    log = Log()
    committer = GroupCommit(log.commit)
    await committer.submit(1)
    await committer.submit(2)
    assert log.groups == [[1], [2]]
    assert committer.pending == 0
    await committer.close()


async def test_what_comes_during_a_commit_shares_the_next_one_in_order() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit)
    first = await start(committer, 1)
    rest = await start(committer, 2, 3, 4)
    assert (log.groups, committer.pending) == ([[1]], 4)
    assert not any(task.done() for task in first + rest)
    log.gate.set()
    await asyncio.gather(*first, *rest)
    assert log.groups == [[1], [2, 3, 4]]
    assert committer.pending == 0
    await committer.close()


async def test_a_caller_returns_only_after_its_own_commit() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit)
    (task,) = await start(committer, 1)
    await log.entered.wait()
    assert not task.done()
    log.gate.set()
    await task
    await committer.close()


async def test_a_group_weighs_no_more_than_it_may_unless_one_item_does() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit, weight=lambda item: item, max_group=10)
    tasks = await start(committer, 1)
    tasks += await start(committer, 4, 6, 1, 25, 2)
    log.gate.set()
    await asyncio.gather(*tasks)
    assert log.groups == [[1], [4, 6], [1], [25], [2]]
    await committer.close()


async def test_too_much_pending_is_refused_and_accepted_again_later() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit, weight=lambda item: item, max_pending=10)
    tasks = await start(committer, 6, 4)
    with pytest.raises(Overloaded, match="10 pending of at most 10"):
        await committer.submit(1)
    log.gate.set()
    await asyncio.gather(*tasks)
    await committer.submit(10)
    await committer.close()


async def test_an_item_larger_than_the_bound_is_accepted_when_nothing_is_pending() -> None:
    log = Log()
    committer = GroupCommit(log.commit, weight=lambda item: item, max_pending=10)
    await committer.submit(99)
    assert log.groups == [[99]]
    await committer.close()


async def test_an_error_reaches_every_caller_of_its_group_and_nobody_else() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit)
    first = await start(committer, 1)
    second = await start(committer, 2, 3)
    log.failures = [ValueError("first"), ValueError("second")]
    log.gate.set()
    results = await asyncio.gather(*first, *second, return_exceptions=True)
    assert [str(result) for result in results] == ["first", "second", "second"]
    await committer.submit(4)
    assert (log.groups[-1], committer.pending) == ([4], 0)
    await committer.close()


async def test_a_cancelled_caller_does_not_disturb_its_group() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit)
    first = await start(committer, 1)
    cancelled, other = await start(committer, 2, 3)
    cancelled.cancel()
    log.gate.set()
    await asyncio.gather(*first, other)
    assert log.groups == [[1], [2, 3]]
    assert committer.pending == 0
    await committer.close()


async def test_closing_commits_what_is_queued_and_refuses_the_rest() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit)
    tasks = await start(committer, 1) + await start(committer, 2, 3)
    closing = asyncio.create_task(committer.close())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="has stopped"):
        await committer.submit(4)
    log.gate.set()
    await closing
    await asyncio.gather(*tasks)
    assert log.groups == [[1], [2, 3]]


async def test_closing_an_idle_committer_twice_returns() -> None:
    committer = GroupCommit(Log().commit)
    await asyncio.wait_for(committer.close(), 5)
    await asyncio.wait_for(committer.close(), 5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.booleans()), max_size=30), st.integers(1, 20))
def test_every_item_is_committed_once_in_order_or_refused(calls: list[tuple[int, int, bool]], max_group: int) -> None:
    async def scenario() -> None:
        groups: list[list[tuple[int, int]]] = []

        async def commit(group: Sequence[tuple[int, int]]) -> None:
            groups.append(list(group))
            for _turn in range(3):
                await asyncio.sleep(0)
            if len(groups) % 4 == 0:
                raise ValueError

        committer = GroupCommit(commit, weight=lambda item: item[1], max_group=max_group, max_pending=40)
        tasks: list[asyncio.Task[None]] = []
        cancelled: set[int] = set()
        for number, (weight, turns, cancel) in enumerate(calls):
            tasks.append(asyncio.create_task(committer.submit((number, weight))))
            for _turn in range(turns):
                await asyncio.sleep(0)
            if cancel and turns and not tasks[-1].done():
                tasks[-1].cancel()
                cancelled.add(number)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await committer.close()
        assert committer.pending == 0
        committed = [number for group in groups for number, _weight in group]
        assert committed == sorted(set(committed))
        failed = {number for index, group in enumerate(groups, 1) if index % 4 == 0 for number, _weight in group}
        for number, result in enumerate(results):
            if number in cancelled:
                continue
            assert isinstance(result, Overloaded) == (number not in committed)
            assert isinstance(result, ValueError) == (number in failed)
        assert all(len(group) == 1 or sum(weight for _number, weight in group) <= max_group for group in groups)

    asyncio.run(scenario())


async def test_settle_waits_for_what_was_submitted_before_and_for_nothing_later() -> None:
    log = Log(is_open=False)
    committer = GroupCommit(log.commit)
    await committer.settle()  # nothing to wait for
    running = await start(committer, 1)
    queued = await start(committer, 2)
    settling = asyncio.create_task(committer.settle())
    await asyncio.sleep(0)
    assert not settling.done()
    log.failures.append(Unavailable("a refusal settles it too"))
    log.gate.set()
    await settling
    results = await asyncio.gather(*running, *queued, return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable, type(None)]
    assert log.groups == [[1], [2]]
    await committer.close()
