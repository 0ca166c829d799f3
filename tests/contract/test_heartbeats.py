"""Heartbeats and the reaper on Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper, try_acquire
from mlplat.errors import Fenced
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.heartbeats import HeartbeatStore, Reaper
from mlplat.tracking.model import REAPED_TAG, RunStatus
from mlplat.tracking.runs import RunStore
from tests.contract.waiting import until

NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
async def runs(engine: AsyncEngine) -> RunStore:
    """Runs ``beating`` and ``silent`` (a stock client's) in one experiment."""
    experiment = await ExperimentStore(engine, "mlflow-artifacts:").create("experiment", None, {})
    store = RunStore(engine)
    await store.create("beating", experiment, None, "", NOW, {}, beating=True)
    await store.create("silent", experiment, None, "", NOW, {})
    return store


@pytest.fixture
def heartbeats(engine: AsyncEngine) -> HeartbeatStore:
    return HeartbeatStore(engine)


@pytest.fixture
async def leader(engine: AsyncEngine) -> AsyncIterator[LeaseKeeper]:
    """The scheduler's lease."""
    keeper = LeaseKeeper(engine, "scheduler", "me", 600)
    await keeper.start()
    yield keeper
    await keeper.stop()


async def age(engine: AsyncEngine, seconds: int) -> None:
    """Makes every heartbeat older."""
    async with engine.begin() as connection:
        statement = "UPDATE run SET heartbeat_at = heartbeat_at - make_interval(secs => :seconds)"
        await connection.execute(text(statement), {"seconds": seconds})


async def test_only_runs_whose_heartbeats_stopped_are_reaped(
    engine: AsyncEngine, runs: RunStore, heartbeats: HeartbeatStore, leader: LeaseKeeper
) -> None:
    assert await heartbeats.reap(leader.current, 60) == []
    await age(engine, 61)
    assert await heartbeats.reap(leader.current, 90) == []
    assert await heartbeats.reap(leader.current, 60) == ["beating"]
    assert await heartbeats.reap(leader.current, 60) == []
    killed = await runs.get("beating")
    assert killed.status is RunStatus.KILLED
    assert killed.tags[REAPED_TAG].startswith("no heartbeat since 2")
    assert killed.ended_at is not None
    assert killed.tags[REAPED_TAG].startswith(f"no heartbeat since {killed.ended_at:%F %T} UTC")
    assert (await runs.get("silent")).status is RunStatus.RUNNING


async def test_a_beat_revives_what_was_reaped_and_nothing_else(
    engine: AsyncEngine, runs: RunStore, heartbeats: HeartbeatStore, leader: LeaseKeeper
) -> None:
    await age(engine, 61)
    await heartbeats.reap(leader.current, 60)
    await runs.update("silent", RunStatus.KILLED, NOW, None)
    assert await heartbeats.beat(["silent", "beating", "unknown"]) == {
        "beating": RunStatus.RUNNING,
        "silent": RunStatus.KILLED,
    }
    revived, silent = await runs.get("beating"), await runs.get("silent")
    assert (revived.status, revived.ended_at, REAPED_TAG in revived.tags) == (RunStatus.RUNNING, None, False)
    assert (silent.status, silent.ended_at) == (RunStatus.KILLED, NOW)
    assert await heartbeats.reap(leader.current, 60) == []
    assert await heartbeats.beat([]) == {}


async def test_an_end_that_arrives_late_replaces_the_reapers(
    engine: AsyncEngine, runs: RunStore, heartbeats: HeartbeatStore, leader: LeaseKeeper
) -> None:
    await age(engine, 61)
    await heartbeats.reap(leader.current, 60)
    ended = await runs.update("beating", RunStatus.FINISHED, NOW, None)
    assert (ended.status, ended.ended_at, REAPED_TAG in ended.tags) == (RunStatus.FINISHED, NOW, False)
    assert await heartbeats.beat(["beating"]) == {"beating": RunStatus.FINISHED}
    assert (await runs.get("beating")).status is RunStatus.FINISHED


async def test_a_resumed_run_has_no_end_unless_the_news_is_older_than_the_end(runs: RunStore) -> None:
    await runs.update("silent", RunStatus.FINISHED, NOW, None)
    before, after = NOW.replace(hour=1), NOW.replace(hour=5)
    late = await runs.update("silent", RunStatus.RUNNING, None, None, resumed_at=before)
    assert (late.status, late.ended_at) == (RunStatus.FINISHED, NOW)
    resumed = await runs.update("silent", RunStatus.RUNNING, None, None, resumed_at=after)
    assert (resumed.status, resumed.ended_at) == (RunStatus.RUNNING, None)


async def test_many_processes_beat_for_the_same_runs_at_once(
    engine: AsyncEngine, runs: RunStore, heartbeats: HeartbeatStore, leader: LeaseKeeper
) -> None:
    await age(engine, 61)
    names = ["beating", "silent"]
    beats = [heartbeats.beat(names if number % 2 else names[::-1]) for number in range(20)]
    await asyncio.gather(*beats, heartbeats.reap(leader.current, 60), heartbeats.reap(leader.current, 60))
    await heartbeats.beat(names)
    assert {(await runs.get(name)).status for name in names} == {RunStatus.RUNNING}


async def test_a_deposed_leader_reaps_nothing(
    engine: AsyncEngine, runs: RunStore, heartbeats: HeartbeatStore, leader: LeaseKeeper
) -> None:
    await age(engine, 61)
    old = leader.current
    assert await try_acquire(engine, "scheduler", "me", 600) is not None
    with pytest.raises(Fenced):
        await heartbeats.reap(old, 60)
    assert (await runs.get("beating")).status is RunStatus.RUNNING


async def test_the_reaper_reaps_by_itself_after_a_whole_timeout(
    engine: AsyncEngine, runs: RunStore, heartbeats: HeartbeatStore, leader: LeaseKeeper
) -> None:
    await age(engine, 61)
    reaper = Reaper(heartbeats, leader, 0.2)
    reaper.start()
    reaper.start()

    async def reaped() -> bool:
        return (await runs.get("beating")).status is RunStatus.KILLED

    await until(reaped)
    await heartbeats.beat(["beating"])
    await until(reaped)  # it goes on
    reaper.stop()
