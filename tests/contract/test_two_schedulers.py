"""Two schedulers at once: one leads, the other waits until it is its turn, and no run is made or given away twice."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Fenced, Unavailable
from mlplat.pipelines.model import Submission
from mlplat.pipelines.scheduling import SchedulerService
from tests.contract.pipelines import TTL_S, spec_of
from tests.contract.test_scheduling import Driver, Imports

NAME = "scheduler"


async def _take_turns(engine: AsyncEngine, rounds: int) -> None:
    """Two start at one moment; one leads and hands over to the other one, and both accept the same submission."""
    driver, epochs, runs = Driver("executor"), [0], set[str]()
    spec = msgspec.json.encode(spec_of().to_json())
    for number in range(rounds):
        leases = [LeaseKeeper(engine, NAME, f"holder-{number}-{index}", TTL_S) for index in range(2)]
        pair = [SchedulerService(engine, lease, [driver], Imports(), max_active_runs=1_000) for lease in leases]
        starts = [asyncio.create_task(service.start()) for service in pair]
        done, waiting = await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED)
        [leading] = done
        first = starts.index(leading)
        submission = Submission(spec, {}, f"key-{number}", "ann")
        run_id = await pair[first].submit(submission)
        with pytest.raises(Fenced):
            _ = leases[1 - first].current
        assert not [task for task in waiting if task.done()], "the other one waits"
        epochs.append(leases[first].current.epoch)
        await pair[first].stop()
        await asyncio.wait_for(starts[1 - first], 60)
        with pytest.raises(Unavailable):
            await pair[first].submit(Submission(spec, {}, f"late-{number}", "ann"))
        assert await pair[1 - first].submit(submission) == run_id
        epochs.append(leases[1 - first].current.epoch)
        await pair[1 - first].stop()
        runs.add(run_id)
    assert epochs == list(range(2 * rounds + 1)), "one epoch at a time"
    async with engine.connect() as connection:
        rows = (await connection.execute(text("SELECT run_id, epoch FROM pipeline_run"))).all()
    assert {row.run_id for row in rows} == runs
    assert driver.runs == {row.run_id: row.epoch for row in rows}, "each run with its executor, under its own epoch"


async def test_of_two_schedulers_started_at_once_one_leads(engine: AsyncEngine) -> None:
    await _take_turns(engine, 10)


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_two_schedulers_start_at_once_again_and_again(engine: AsyncEngine) -> None:
    await _take_turns(engine, 500)
