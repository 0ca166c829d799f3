"""What scheduler and executors cost by themselves: attempts only sleep, everything around them is the product's."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import psycopg

from actors.lifecycle import spare_garbage_collection
from mlplat.db.engine import open_engine
from mlplat.db.lease import LeaseKeeper
from mlplat.db.migrate import migrate
from mlplat.pipelines.driver import Request, RunDriver
from mlplat.pipelines.machine import RunMachine
from mlplat.pipelines.model import (
    Assignment,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    PipelineRun,
    RunSnapshot,
    State,
    Submission,
)
from mlplat.pipelines.parsing import SpecCache
from mlplat.pipelines.scheduling import SchedulerService
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.transitions import Transition, TransitionWriter
from tests.benchmarks.result import Result
from tests.platform import Platform

SLEEP_S = 3.0
ATTEMPTS = 1_000
STEPS = 10_000
DATABASE = "mlplat_benchmark"
OUTPUT = {"kind": "json", "value": 1}


class SleepingWorld:
    """Attempts that sleep."""

    async def run(self, request: Request) -> AttemptOutcome:
        """Sleeps."""
        began = datetime.now(UTC)
        await asyncio.sleep(SLEEP_S)
        return AttemptOutcome(AttemptState.SUCCEEDED, dict(OUTPUT), started_at=began)

    async def stop(self, request: Request) -> None:
        """Nothing is stopped here."""

    async def survives(self, request: Request) -> bool:
        """Nothing is taken over here."""
        return False

    async def acknowledge(self, request: Request) -> None:
        """Nothing is kept."""

    async def lost(self, label: str) -> None:
        """Nothing is tracked."""

    async def find_cached(self, key: str, ttl_s: float | None) -> tuple[dict[str, Any], str] | None:
        """Nothing is cached."""
        return None

    async def code_digest(self, uses: str) -> str | None:
        """Nothing is cached."""
        return None


class InProcessExecutor:
    """An executor without an actor."""

    def __init__(self, name: str, writer: TransitionWriter) -> None:
        self.name = name
        self._writer = writer
        self._specs = SpecCache()
        self._runs: dict[str, tuple[int, asyncio.Task[State]]] = {}

    async def assign(self, assignments: Sequence[Assignment]) -> None:
        """Drives the runs."""
        for given in assignments:
            assert given.run is not None
            assert given.spec is not None
            driver = RunDriver(
                self._specs.get(given.spec).spec, RunSnapshot(given.run, {}), given.epoch, SleepingWorld(),
                self._writer.write,
            )  # fmt: skip
            self._runs[given.run_id] = given.epoch, asyncio.get_running_loop().create_task(driver.drive())

    async def owned(self) -> Mapping[str, int]:
        """Its runs."""
        return {run_id: epoch for run_id, (epoch, task) in self._runs.items() if not task.done()}

    async def poke(self) -> None:
        """Nobody says anything."""

    async def all_done(self) -> None:
        """Returns when its runs are over."""
        await asyncio.gather(*(task for _epoch, task in self._runs.values()))


class NoImports:
    """Everything can be imported."""

    def is_known(self, names: Sequence[str]) -> bool:
        """Everything is."""
        return True

    async def check(self, names: Sequence[str]) -> Mapping[str, str]:
        """No problems."""
        return {}


def concurrency(platform: Platform) -> Iterator[Result]:
    """CPU of one scheduler and its executors while attempts sleep, and what a step costs at ten times the load."""
    with _own_database(platform.config.postgres_url) as url:
        few = asyncio.run(_drive(url, runs=10, items=10, executors=1))
        many_runs = asyncio.run(_drive(url, runs=100, items=10, executors=1))
        spread = asyncio.run(_drive(url, runs=100, items=10, executors=2))
        one_run = asyncio.run(_drive(url, runs=1, items=ATTEMPTS, executors=2))
    yield Result(f"{ATTEMPTS:,} concurrent attempts, two executors: CPU", spread / SLEEP_S, "cores", bound="<= 1.0")
    yield Result("CPU per step, 100 runs, two executors", 1000 * spread / ATTEMPTS, "ms", 1000 * few / 100)
    yield Result("CPU per step, 100 runs, one executor", 1000 * many_runs / ATTEMPTS, "ms", 1000 * few / 100)
    yield Result("CPU per step, one run of 1,000", 1000 * one_run / ATTEMPTS, "ms", 1000 * few / 100)


@contextmanager
def _own_database(server_url: str) -> Iterator[str]:
    """A migrated database beside the platform's, whose scheduler would take the runs over."""
    admin = server_url.replace("postgresql+psycopg", "postgresql")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
        connection.execute(f"CREATE DATABASE {DATABASE}")
        url = server_url.replace("/mlplat?", f"/{DATABASE}?")
        migrate(url)
        yield url
        connection.execute(f"DROP DATABASE {DATABASE} WITH (FORCE)")


async def _drive(url: str, runs: int, items: int, executors: int) -> float:
    """Seconds of CPU from the first submission to the last end; every attempt is under way at the same time."""
    engine = open_engine(url, "benchmark", pool_size=4)
    writers = [
        TransitionWriter(open_engine(url, f"benchmark {n}", pool_size=1), f"bench-{n}") for n in range(executors)
    ]
    pool = [InProcessExecutor(f"bench-{number}", writer) for number, writer in enumerate(writers)]
    # A lease of its own: the platform's scheduler goes on. Its runs go to this one's executors only.
    lease = LeaseKeeper(engine, f"benchmark {uuid.uuid4().hex}", "bench")
    service = SchedulerService(engine, lease, pool, NoImports(), max_active_runs=100_000)
    await service.start()
    spec = {"name": "sleep", "steps": {"s": {"uses": "builtins:int", "foreach": list(range(items))}}}
    body = msgspec.json.encode(spec)
    began = time.process_time()
    await asyncio.gather(*(service.submit(Submission(body, {}, uuid.uuid4().hex)) for _ in range(runs)))
    await asyncio.sleep(SLEEP_S / 2)  # every attempt sleeps for longer
    for executor in pool:
        await executor.all_done()
    used = time.process_time() - began
    await service.stop()
    for writer in writers:
        await writer.close()
    await engine.dispose()
    return used


def ticks() -> Iterator[Result]:
    """The longest round of the rules in a run of many steps, with the encoding of its transition."""
    spare_garbage_collection()  # as executors do
    join = {"join": {"uses": "builtins:int", "needs": [f"s{number}" for number in range(STEPS - 1)]}}
    shapes: dict[str, dict[str, Any]] = {
        "fan-out": {"s": {"uses": "builtins:int", "foreach": list(range(STEPS))}},
        "wide with a join": {f"s{number}": {"uses": "builtins:int"} for number in range(STEPS - 1)} | join,
        "chain": {
            f"s{number}": {"uses": "builtins:int", "needs": [f"s{number - 1}"] if number else []}
            for number in range(STEPS)
        },
    }
    for name, steps in shapes.items():
        yield Result(f"{STEPS:,} steps, {name}: longest round", 1000 * _longest_round(steps), "ms", bound="<= 50")


def _longest_round(steps: dict[str, Any]) -> float:
    spec = PipelineSpec.model_validate({"name": "large", "steps": steps})
    machine = RunMachine(spec, RunSnapshot(PipelineRun("run", spec.name, "", {}, State.QUEUED), {}))
    machine.begin(datetime.now(UTC))
    waiting: list[AttemptRequest] = []
    longest = 0.0
    while not machine.run.state.is_final:
        began = time.perf_counter()
        actions = machine.advance(datetime.now(UTC))
        changes = machine.take_changes()
        if changes is not None:
            Transition.of("run", 1, changes)
        longest = max(longest, time.perf_counter() - began)
        waiting += [request for request in actions.start if isinstance(request, AttemptRequest)]
        if waiting:
            request = waiting.pop()
            done = AttemptOutcome(AttemptState.SUCCEEDED, dict(OUTPUT))
            machine.attempt_ended(request.node, request.attempt, done, datetime.now(UTC))
    return longest
