"""A submission that is sent again finds its run, whatever the pipeline says about a full concurrency key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Overloaded
from mlplat.pipelines.model import Assignment, Submission
from mlplat.pipelines.scheduling import SchedulerService


class Executor:
    """Takes every run and never moves it."""

    name = "executor"

    def __init__(self) -> None:
        self.runs: dict[str, int] = {}

    async def assign(self, assignments: Sequence[Assignment]) -> None:
        self.runs |= {assignment.run_id: assignment.epoch for assignment in assignments}

    async def owned(self) -> Mapping[str, int]:
        return self.runs

    async def poke(self) -> None:
        """Nothing to look at."""


class Imports:
    """Everything can be imported."""

    def is_known(self, names: Sequence[str]) -> bool:
        return True

    async def check(self, names: Sequence[str]) -> Mapping[str, str]:
        return {}


@pytest.fixture
async def scheduler(engine: AsyncEngine) -> AsyncIterator[SchedulerService]:
    lease = LeaseKeeper(engine, "scheduler", "me", 600)
    scheduler = SchedulerService(engine, lease, [Executor()], Imports(), max_active_runs=100)
    await scheduler.start()
    yield scheduler
    await scheduler.stop()


def submission(when_full: str, idempotency_key: str) -> Submission:
    spec: dict[str, Any] = {
        "name": "one",
        "concurrency": {"key": "one", "limit": 1, "when_full": when_full},
        "steps": {"a": {"uses": "os:getcwd"}},
    }
    return Submission(msgspec.json.encode(spec), {}, idempotency_key)


async def signals(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT run_id FROM pipeline_signal"))).scalars())


async def test_a_repeat_does_not_cancel_its_own_run(scheduler: SchedulerService, engine: AsyncEngine) -> None:
    first = await scheduler.submit(submission("cancel_running", "k"))
    assert await scheduler.submit(submission("cancel_running", "k")) == first
    assert await signals(engine) == []
    assert await scheduler.submit(submission("cancel_running", "other")) != first
    assert await signals(engine) == [first]


async def test_a_repeat_is_not_refused_because_of_its_own_run(scheduler: SchedulerService) -> None:
    first = await scheduler.submit(submission("reject", "k"))
    assert await scheduler.submit(submission("reject", "k")) == first
    with pytest.raises(Overloaded, match="concurrency key 'one' is full"):
        await scheduler.submit(submission("reject", "other"))
