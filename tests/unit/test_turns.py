"""Attempts take turns at the cluster: by example, and held against the rules for random events."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines.turns import Turns


class Cluster:
    """Attempts that work until a test ends them, once it is their turn."""

    def __init__(self, capacity: int) -> None:
        self.turns = Turns(capacity)
        self.capacity = capacity
        self.priorities: dict[str, int] = {}
        self.waiting: list[str] = []
        self.working: list[str] = []
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    def comes(self, label: str, priority: int = 0, submitter: str = "ann") -> None:
        """An attempt wants to work."""
        self._ends[label] = asyncio.Event()
        self.priorities[label] = priority
        self.waiting.append(label)
        self.tasks[label] = asyncio.create_task(self._attempt(label, priority, submitter))

    async def come(self, *labels: str, priority: int = 0, submitter: str = "ann") -> None:
        """Attempts want to work, one after another."""
        for label in labels:
            self.comes(label, priority, submitter)
        await self.settle()

    async def end(self, label: str) -> None:
        """An attempt has done its work."""
        self._ends[label].set()
        await self.settle()

    async def settle(self) -> None:
        """Everybody does what they can do."""
        for _turn in range(8):
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Ends what is left."""
        for event in self._ends.values():
            event.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    async def _attempt(self, label: str, priority: int, submitter: str) -> None:
        try:
            try:
                await self.turns.take(label, priority, submitter)
            finally:
                self.waiting.remove(label)
            assert len(self.working) < self.capacity, "more than fit"
            self.working.append(label)
            self.begun.append(label)
            await self._ends[label].wait()
        finally:
            if label in self.working:
                self.working.remove(label)
            self.turns.give_back(label)


async def test_so_many_work_at_once_and_the_others_wait() -> None:
    cluster = Cluster(2)
    await cluster.come("a", "b", "c", "d")
    assert (cluster.working, len(cluster.turns)) == (["a", "b"], 2)
    await cluster.end("b")
    assert (cluster.working, len(cluster.turns)) == (["a", "c"], 1)
    await cluster.close()
    assert (cluster.begun, len(cluster.turns)) == (["a", "b", "c", "d"], 0)


async def test_priorities_overtake_those_that_wait() -> None:
    cluster = Cluster(1)
    await cluster.come("a", "b")
    await cluster.come("urgent", priority=5)
    assert cluster.working == ["a"]
    await cluster.end("a")
    await cluster.end("urgent")
    assert cluster.begun == ["a", "urgent", "b"]
    await cluster.close()


async def test_submitters_share_however_many_attempts_each_has() -> None:
    cluster = Cluster(2)
    await cluster.come(*(f"a{number}" for number in range(9)))
    await cluster.come("b0", "b1", submitter="bob")
    await cluster.end("a0")
    await cluster.end("a1")
    assert sorted(cluster.working) == ["a2", "b0"]
    await cluster.close()


async def test_an_attempt_that_gives_up_is_cancelled_and_takes_nobodys_place() -> None:
    cluster = Cluster(1)
    await cluster.come("a", "b", "c")
    assert cluster.turns.give_up("b")
    await cluster.settle()
    assert cluster.tasks["b"].cancelled()
    await cluster.end("a")
    assert cluster.working == ["c"]
    await cluster.close()


async def test_only_who_waits_can_give_up() -> None:
    cluster = Cluster(1)
    await cluster.come("a", "b")
    assert not cluster.turns.give_up("nobody")
    assert not cluster.turns.give_up("a")
    assert cluster.turns.give_up("b")
    await cluster.settle()
    assert not cluster.turns.give_up("b")
    assert cluster.working == ["a"]
    await cluster.close()
    assert not cluster.turns.give_up("a")


async def test_who_is_cancelled_as_its_turn_comes_passes_it_on() -> None:
    cluster = Cluster(1)
    await cluster.come("a", "b", "c")
    cluster.working.remove("a")
    cluster.turns.give_back("a")  # from here on it is b's turn, which does not know yet
    cluster.tasks["b"].cancel()
    await cluster.settle()
    assert cluster.tasks["b"].cancelled()
    assert cluster.working == ["c"]
    await cluster.close()


async def test_giving_back_twice_or_for_nobody_makes_no_room() -> None:
    cluster = Cluster(1)
    await cluster.come("a", "b", "c")
    await cluster.end("a")
    for label in ("a", "nobody"):
        cluster.turns.give_back(label)
    await cluster.settle()
    assert cluster.working == ["b"]
    await cluster.close()


async def test_a_cluster_that_grows_takes_more_and_one_that_shrinks_fewer() -> None:
    cluster = Cluster(1)
    await cluster.come("a", "b", "c", "d", "e")
    cluster.capacity = 3
    cluster.turns.set_capacity(3)
    await cluster.settle()
    assert cluster.working == ["a", "b", "c"]
    cluster.capacity = 1
    cluster.turns.set_capacity(1)
    await cluster.end("a")
    await cluster.end("b")
    assert cluster.working == ["c"]  # who has its turn keeps it
    await cluster.end("c")
    assert cluster.working == ["d"]
    await cluster.close()


arrivals = st.tuples(st.integers(0, 2), st.sampled_from("abc"))
events = st.lists(
    st.one_of(
        arrivals, st.sampled_from(["end", "end", "cancel", "give up", "end and cancel", "kill"]), st.integers(1, 5)
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 4), events)
def test_no_turn_is_lost_and_none_is_given_twice(capacity: int, happened: list[object]) -> None:
    async def scenario() -> None:
        cluster = Cluster(capacity)
        for number, event in enumerate(happened):
            before = len(cluster.begun)
            await _happens(cluster, event, number)
            chosen = cluster.begun[before:]
            assert len(cluster.turns) == len(cluster.waiting)
            assert not cluster.waiting or len(cluster.working) >= cluster.capacity, "there is room, and somebody waits"
            if not isinstance(event, tuple) and chosen and cluster.waiting:
                assert min(map(cluster.priorities.__getitem__, chosen)) >= max(
                    map(cluster.priorities.__getitem__, cluster.waiting)
                )
        await cluster.close()
        gone = {label for label, task in cluster.tasks.items() if task.cancelled()}
        assert [task.exception() for task in cluster.tasks.values() if not task.cancelled()].count(None) == len(
            cluster.tasks
        ) - len(gone)
        assert cluster.tasks.keys() - gone <= set(cluster.begun)
        assert (len(cluster.begun), len(cluster.turns)) == (len(set(cluster.begun)), 0)

    asyncio.run(scenario())


async def _happens(cluster: Cluster, event: object, number: int) -> None:
    def pick(labels: list[str]) -> str | None:
        return labels[number * 7919 % len(labels)] if labels else None

    waiting, working = pick(cluster.waiting), pick(cluster.working)
    if isinstance(event, tuple):
        cluster.comes(f"r{number}", *event)
    elif isinstance(event, int):
        cluster.capacity = event
        cluster.turns.set_capacity(event)
    if event in {"end", "end and cancel"} and working is not None:
        cluster._ends[working].set()
        if event == "end and cancel":
            await asyncio.sleep(0)  # the turn is on its way to somebody
    if event in {"cancel", "end and cancel"} and waiting is not None:
        cluster.tasks[waiting].cancel()
    if event == "give up" and waiting is not None:
        assert cluster.turns.give_up(waiting)
    if event == "kill" and working is not None:
        cluster.tasks[working].cancel()
    await cluster.settle()
