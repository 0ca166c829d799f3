"""Processes of durable attempts: what is ended, and what is not while Postgres cannot say whose they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from ray.exceptions import RayError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS, open_engine
from mlplat.errors import Unavailable
from mlplat.pipelines import leftovers
from mlplat.pipelines.leftovers import LeftoverReaper


class Processes:
    """Those that a test says. ``errors`` come first."""

    def __init__(self, *labels: str, errors: list[Exception] | None = None) -> None:
        self.alive = list(labels)
        self.errors = errors or []
        self.looks = 0

    async def labels(self) -> list[str]:
        self.looks += 1
        if self.errors:
            raise self.errors.pop(0)
        return list(self.alive)

    def kill(self, label: str) -> None:
        self.alive.remove(label)


@pytest.fixture
async def nowhere(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """The engine of a Postgres that is away."""
    engine = open_engine(f"postgresql+psycopg://nobody@/nothing?host={tmp_path}", "tests", pool_size=1)
    yield engine
    await engine.dispose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_without_processes_postgres_is_not_asked(nowhere: AsyncEngine) -> None:
    assert await LeftoverReaper(nowhere, Processes()).reap() == []


async def test_nothing_is_ended_while_postgres_is_away(nowhere: AsyncEngine) -> None:
    processes = Processes("run/step/-1/1", "run/step/0/2")
    with pytest.raises(CONNECTION_ERRORS):
        await LeftoverReaper(nowhere, processes).reap()
    assert processes.alive == ["run/step/-1/1", "run/step/0/2"]


@pytest.mark.parametrize(
    "label", ["", "mine", "a/b/c/d", "run/step/-1", "run/step/-2/1", "r/s/0/1\n", "r/s/٠/1", "r/s/0/32768"]
)
async def test_a_process_with_a_name_of_somebody_elses_is_left_alone(label: str, nowhere: AsyncEngine) -> None:
    processes = Processes(label)
    assert await LeftoverReaper(nowhere, processes).reap() == []
    assert processes.alive == [label]


async def test_it_looks_again_and_again_whatever_happens_and_until_it_is_stopped(
    nowhere: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "EVERY_S", 0.0)
    processes = Processes(
        "run/step/-1/1", errors=[Unavailable("away"), RayError("the cluster is away"), ZeroDivisionError()]
    )
    reaper, others = LeftoverReaper(nowhere, processes), asyncio.all_tasks()
    reaper.start()
    await until(lambda: processes.looks > 5)
    [task] = asyncio.all_tasks() - others
    reaper.stop()
    await asyncio.wait([task], timeout=60)
    assert task.cancelled()
    assert (processes.errors, processes.alive) == ([], ["run/step/-1/1"])


async def test_one_that_never_started_can_be_stopped(nowhere: AsyncEngine) -> None:
    LeftoverReaper(nowhere, Processes()).stop()
