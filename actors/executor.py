"""RunExecutor: drives its runs and owns the Ray tasks of their steps."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import ray
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from actors.lifecycle import WORKLOAD_ENV, Health
from mlplat.db.engine import CONNECTION_ERRORS, open_engine
from mlplat.errors import Fenced, Unavailable
from mlplat.execution.attempt import run_attempt
from mlplat.pipelines.driver import RunDriver
from mlplat.pipelines.model import AttemptOutcome, AttemptRequest, AttemptState, State
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.transitions import RunChange, Transition, TransitionWriter
from mlplat.settings import PlatformConfig
from mlplat.tracking.runs import RunStore

_log = logging.getLogger(__name__)


class RunExecutor:
    """Keeps no truth: after a restart the scheduler assigns its runs again, under new epochs."""

    def __init__(self, config: PlatformConfig, name: str) -> None:
        self._config = config
        engine = open_engine(config.postgres_url, name, pool_size=3)
        self._store = PipelineStore(engine)
        self._runs = RunStore(engine)
        # One connection of its own, so that commits never wait for reads.
        self._writer = TransitionWriter(open_engine(config.postgres_url, f"{name} writer", pool_size=1))
        self._drivers: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self._active: dict[str, RunDriver] = {}
        self._attempt: Any = ray.remote(run_attempt)
        # Ray keeps a worker for as long as it owns objects, which after a sweep is for ever.
        self._fresh_attempt: Any = ray.remote(max_calls=1)(run_attempt)

    async def assign(self, run_id: str, epoch: int) -> None:
        """Takes a run over. A newer epoch replaces an older one; a repeat changes nothing."""
        known = self._drivers.get(run_id)
        if known is not None and known[0] >= epoch:
            return
        if known is not None:
            known[1].cancel()
        task = asyncio.get_running_loop().create_task(self._drive(run_id, epoch))
        self._drivers[run_id] = (epoch, task)
        task.add_done_callback(lambda _task: self._forget(run_id, epoch))

    async def owned(self) -> dict[str, int]:
        """The runs it drives, with their epochs."""
        return {run_id: epoch for run_id, (epoch, _task) in self._drivers.items()}

    async def health(self) -> Health:
        """Always answers at once."""
        attempts = sum(driver.active_attempts for driver in self._active.values())
        return {"pid": os.getpid(), "lag": f"{attempts} attempts"}

    async def stop(self) -> None:
        """Abandons its runs; whoever comes next takes them over."""
        for _epoch, task in list(self._drivers.values()):
            task.cancel()
        await self._writer.close()

    def _forget(self, run_id: str, epoch: int) -> None:
        if self._drivers.get(run_id, (0, None))[0] == epoch:
            del self._drivers[run_id]
            self._active.pop(run_id, None)

    async def _drive(self, run_id: str, epoch: int) -> None:
        try:
            snapshot = await self._store.get_snapshot(run_id)
            driver = RunDriver(snapshot, epoch, self._launch, self._writer.write, self._kill_runs)
            self._active[run_id] = driver
            await driver.drive()
        except (Fenced, Unavailable, *CONNECTION_ERRORS) as error:
            _log.warning("run %s, epoch %s: let go: %s", run_id, epoch, error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a defect must end one run, not hide it as RUNNING for ever
            _log.exception("run %s, epoch %s: failed", run_id, epoch)
            change = RunChange(State.FAILED, f"internal error: {type(error).__name__}: {error}")
            await self._writer.write(Transition(run_id, epoch, run=change))

    async def _launch(self, request: AttemptRequest) -> AttemptOutcome:
        attempt = self._fresh_attempt if request.fresh_process else self._attempt
        ref = attempt.options(
            name=request.label,
            num_cpus=request.cpus,
            num_gpus=request.gpus,
            memory=None if request.memory_mb is None else request.memory_mb * 1024 * 1024,
            max_retries=0,
            runtime_env=WORKLOAD_ENV,
        ).remote(request, self._config)
        try:
            outcome: AttemptOutcome = await ref
            return outcome
        except asyncio.CancelledError:
            _cancel(ref)
            raise
        except RayError as error:
            return _outcome_of(error)

    async def _kill_runs(self, attempt: str) -> None:
        """The tracked runs of a dead attempt end with it."""
        try:
            await self._runs.kill_of_attempt(attempt)
        except CONNECTION_ERRORS as error:
            _log.warning("runs of %s were not marked KILLED: %s", attempt, error)


def _outcome_of(error: RayError) -> AttemptOutcome:
    """How an attempt ended that did not come back with an outcome of its own."""
    if isinstance(error, OutOfMemoryError):
        return AttemptOutcome(AttemptState.FAILED, error="out of memory: the node killed the attempt's process")
    if isinstance(error, WorkerCrashedError):
        return AttemptOutcome(AttemptState.FAILED, error="the attempt's process died (killed, or it exited by itself)")
    if isinstance(error, ObjectLostError | TaskCancelledError):
        return AttemptOutcome(AttemptState.LOST, error=f"lost: {type(error).__name__}")
    if isinstance(error, RayTaskError):
        return AttemptOutcome(AttemptState.FAILED, error=str(error.cause or error))
    return AttemptOutcome(AttemptState.LOST, error=f"lost: {type(error).__name__}: {error}")


def _cancel(ref: Any) -> None:
    ray.cancel(ref, force=True, recursive=True)
