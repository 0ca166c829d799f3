"""PipelineScheduler: accepts runs, keeps every open one with an executor, and ends the runs of dead processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayError

from actors.durable_attempt import DurableActors
from actors.handles import ExecutorClient
from actors.lifecycle import WORKLOAD_ENV, Health, Started, actor_id, spare_garbage_collection
from mlplat.db.engine import open_engine
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import PlatformError, Unavailable
from mlplat.pipelines.leftovers import LeftoverReaper
from mlplat.pipelines.model import Submission
from mlplat.pipelines.scheduling import SchedulerService
from mlplat.settings import PlatformConfig
from mlplat.steps.functions import ImportReport, try_imports
from mlplat.tracking.heartbeats import HeartbeatStore, Reaper

IMPORT_TIMEOUT_S = 60.0
IMPORT_CACHE_S = 60.0
IMPORT_CACHE_SIZE = 10_000


class PipelineScheduler:
    """The leader; see ``SchedulerService``."""

    def __init__(self, config: PlatformConfig, name: str, executors: Sequence[str]) -> None:
        engine = open_engine(config.postgres_url, name, pool_size=4)
        lease = LeaseKeeper(engine, name, actor_id())
        self._importable: dict[str, float] = {}
        clients = [ExecutorClient(executor) for executor in executors]
        self._service = SchedulerService(engine, lease, clients, self, max_active_runs=config.max_active_runs)
        self._reaper = Reaper(HeartbeatStore(engine), lease, config.heartbeat_timeout_s)
        self._leftovers = LeftoverReaper(engine, DurableActors())
        self._started = Started(self._start, lease)
        spare_garbage_collection()

    async def submit(self, submission: Submission) -> str:
        """Validates and stores a run; returns its id."""
        await self._started.wait()
        return await self._service.submit(submission)

    async def submit_known(self, submissions: Sequence[Submission]) -> list[str | PlatformError | None]:
        """The answers to submissions; None for those that must be submitted alone."""
        await self._started.wait()
        return await self._service.submit_known(submissions)

    async def cancel(self, run_id: str, by: str) -> None:
        """Somebody has asked for the run's end."""
        await self._started.wait()
        await self._service.cancel(run_id, by)

    async def poke(self, run_id: str) -> None:
        """People told the run something."""
        await self._started.wait()
        await self._service.poke(run_id)

    async def wake(self) -> None:
        """Schedules or triggers were changed or fired."""
        await self._started.wait()
        await self._service.wake()

    async def ended(self, run_ids: Sequence[str]) -> None:
        """These runs are over."""
        await self._started.wait()
        await self._service.ended(run_ids)

    async def health(self) -> Health:
        """Answers when the scheduler leads."""
        await self._started.wait()
        return {"pid": os.getpid(), "lag": self._service.lag()}

    async def stop(self) -> None:
        """Lets go."""
        await self._started.wait()
        self._started.release()
        self._reaper.stop()
        self._leftovers.stop()
        await self._service.stop()

    async def _start(self) -> None:
        await self._service.start()
        self._reaper.start()
        self._leftovers.start()

    def is_known(self, names: Sequence[str]) -> bool:
        """Whether all of these could be imported a short while ago."""
        return all(self._is_importable(name) for name in names)

    def _is_importable(self, name: str) -> bool:
        return self._importable.get(name, 0.0) >= time.monotonic()

    async def check(self, names: Sequence[str]) -> Mapping[str, str]:
        """Importing runs the user's code, so a worker does it. What could be imported is believed for a minute."""
        unknown = [name for name in names if not self._is_importable(name)]
        if not unknown:
            return {}
        check = ray.remote(try_imports).options(num_cpus=0, max_retries=0, runtime_env=WORKLOAD_ENV)
        try:
            async with asyncio.timeout(IMPORT_TIMEOUT_S):
                report: ImportReport = await check.remote(unknown)
        except TimeoutError as error:
            raise Unavailable(f"importing {', '.join(unknown)} took more than {IMPORT_TIMEOUT_S:g} s") from error
        except RayError as error:
            first_line = str(error).splitlines()[0]
            return dict.fromkeys(unknown, f"importing it ended the process: {first_line}")
        if len(self._importable) > IMPORT_CACHE_SIZE:
            self._importable.clear()
        now = time.monotonic()
        self._importable |= {name: now + IMPORT_CACHE_S for name in unknown if name not in report.problems}
        return report.problems
