"""The leading scheduler over real stores: what is accepted, what waits, and what nobody may forget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Overloaded
from mlplat.pipelines.model import Assignment, PipelineRun, State, Submission
from mlplat.pipelines.scheduling import SchedulerService
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.submissions import SubmissionStore
from mlplat.pipelines.transitions import TransitionWriter
from tests.contract.chdb import unique
from tests.contract.pipelines import TTL_S, change, new_run, spec_of, transition
from tests.contract.waiting import until


@dataclass
class Driver:
    """An executor that takes every run, and ends one when a test says so."""

    name: str
    runs: dict[str, int] = field(default_factory=dict)
    #: While it is clear, runs are on their way and do not arrive.
    way: asyncio.Event = field(default_factory=asyncio.Event)
    looks: int = 0

    def __post_init__(self) -> None:
        self.way.set()

    async def assign(self, assignments: Sequence[Assignment]) -> None:
        """Takes them."""
        await self.way.wait()
        self.runs |= {assignment.run_id: assignment.epoch for assignment in assignments}

    async def owned(self) -> Mapping[str, int]:
        """What it has."""
        self.looks += 1
        return dict(self.runs)

    async def poke(self) -> None:
        """Nothing to do."""


class Imports:
    """Every name can be imported."""

    def is_known(self, names: Sequence[str]) -> bool:
        """Yes."""
        return True

    async def check(self, names: Sequence[str]) -> Mapping[str, str]:
        """No problems."""
        return {}


@dataclass
class Scheduling:
    """A leader with one executor and room for one run."""

    engine: AsyncEngine
    service: SchedulerService
    driver: Driver
    leader: LeaseKeeper

    def __post_init__(self) -> None:
        self.store = PipelineStore(self.engine)

    async def submit(self, key: str | None = None, **fields: Any) -> str:
        """A submission's run."""
        spec = msgspec.json.encode(spec_of(**fields).to_json())
        return await self.service.submit(Submission(spec, {}, key or unique("key"), "ann"))

    async def end(self, run_id: str, state: State = State.SUCCEEDED) -> None:
        """The executor ends the run and says so."""
        writer = TransitionWriter(self.engine, self.driver.name)
        await writer.write(transition(run_id, self.driver.runs[run_id], run=change(run_id, state)))
        del self.driver.runs[run_id]  # not before: what is neither driven nor over is given away again
        await writer.close()
        await self.service.ended([run_id])

    async def is_driven(self, run_id: str) -> None:
        """Waits until the executor has the run."""

        async def driven() -> bool:
            return run_id in self.driver.runs

        await until(driven)

    async def run(self, run_id: str) -> PipelineRun:
        """See ``PipelineStore.get_run``."""
        return await self.store.get_run(run_id)


@pytest.fixture
async def scheduling(engine: AsyncEngine) -> AsyncIterator[Scheduling]:
    driver, leader = Driver("executor"), LeaseKeeper(engine, "scheduler", "holder", TTL_S)
    service = SchedulerService(engine, leader, [driver], Imports(), max_active_runs=1)
    await service.start()
    yield Scheduling(engine, service, driver, leader)
    await service.stop()


async def test_runs_wait_for_room_and_then_run(scheduling: Scheduling) -> None:
    first, second = await scheduling.submit(), await scheduling.submit()
    await scheduling.is_driven(first)
    assert (await scheduling.run(second)).executor is None
    await scheduling.end(first)
    await scheduling.is_driven(second)
    assert (await scheduling.run(second)).epoch == 1


async def test_a_run_on_its_way_to_an_executor_is_not_given_away_again(scheduling: Scheduling) -> None:
    scheduling.driver.way.clear()
    run_id = await scheduling.submit()
    before = scheduling.driver.looks

    async def looked_twice() -> bool:
        return scheduling.driver.looks >= before + 3  # a third look begins after the second has had its effect

    await until(looked_twice)
    assert (await scheduling.run(run_id)).epoch == 1
    scheduling.driver.way.set()
    await scheduling.is_driven(run_id)
    assert scheduling.driver.runs == {run_id: 1}


async def test_a_run_that_its_executor_has_lost_is_given_to_it_again(scheduling: Scheduling) -> None:
    run_id = await scheduling.submit()
    await scheduling.is_driven(run_id)
    scheduling.driver.runs.clear()
    await scheduling.is_driven(run_id)
    assert scheduling.driver.runs == {run_id: 2}


async def test_a_run_that_waits_is_cancelled_at_once(scheduling: Scheduling) -> None:
    first, second = await scheduling.submit(), await scheduling.submit()
    await scheduling.store.cancel(second, "bob")
    await scheduling.service.cancel(second, "bob")
    run = await scheduling.run(second)
    assert (run.state, run.error) == (State.CANCELLED, "cancelled by bob")
    await scheduling.end(first)
    assert scheduling.service.lag() == "0 runs, 0 waiting"


async def test_a_run_whose_submitter_has_gone_runs_all_the_same(scheduling: Scheduling) -> None:
    first = await scheduling.submit()
    submissions = SubmissionStore(scheduling.engine, scheduling.leader)
    forgotten, _is_new = await submissions.add(new_run("forgotten"))  # durable, and the leader does not know
    await submissions.close()
    assert await scheduling.submit("forgotten") == forgotten
    await scheduling.is_driven(first)
    await scheduling.end(first)
    await scheduling.is_driven(forgotten)


CANCELLING: dict[str, Any] = {"concurrency": {"key": "k", "when_full": "cancel_running"}}


async def test_a_full_key_refuses_when_it_says_so(scheduling: Scheduling) -> None:
    first = await scheduling.submit(concurrency={"key": "k", "when_full": "reject"})
    with pytest.raises(Overloaded, match=f"concurrency key 'k' is full: {first}"):
        await scheduling.submit(concurrency={"key": "k", "when_full": "reject"})


async def test_a_newer_run_cancels_the_one_before(scheduling: Scheduling) -> None:
    first = await scheduling.submit(**CANCELLING)
    await scheduling.is_driven(first)
    second = await scheduling.submit(**CANCELLING)
    assert [signal.run_id for signal in await scheduling.store.find_signals("executor")] == [first]
    await scheduling.end(first, State.CANCELLED)
    await scheduling.is_driven(second)


@pytest.mark.parametrize("when_full", ["cancel_running", "reject", "queue"])
async def test_the_same_submission_again_is_no_newer_run(scheduling: Scheduling, when_full: str) -> None:
    concurrency = {"key": "k", "when_full": when_full}
    first = await scheduling.submit("same", concurrency=concurrency)
    await scheduling.is_driven(first)
    assert await scheduling.submit("same", concurrency=concurrency) == first
    assert await scheduling.store.find_signals("executor") == []
    assert (await asyncio.gather(*(scheduling.submit("same", concurrency=concurrency) for _ in range(3)))) == [
        first
    ] * 3


async def test_another_leader_goes_on_with_what_waits(scheduling: Scheduling, engine: AsyncEngine) -> None:
    first, second = await scheduling.submit(), await scheduling.submit()
    await scheduling.is_driven(first)
    await scheduling.service.stop()
    leader = LeaseKeeper(engine, "scheduler", "holder", TTL_S)
    service = SchedulerService(engine, leader, [scheduling.driver], Imports(), max_active_runs=1)
    await service.start()
    assert service.lag() == "1 runs, 1 waiting"
    scheduling.service = service
    await scheduling.end(first)
    await scheduling.is_driven(second)
