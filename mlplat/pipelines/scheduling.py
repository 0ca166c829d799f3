"""What the pipeline scheduler does, apart from being an actor: accept, assign, and re-assign.

The leader holds a lease. It keeps no truth: whatever it knows is in Postgres, and a new leader finds
it there. It never touches running work; executors own that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Fenced, InvalidInput, InvalidPipeline, Overloaded, PlatformError, Unavailable
from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.model import PipelineRun, Submission
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.store import PipelineStore

RECONCILE_S = 0.5
MAX_SUBMITTING = 1_000
_log = logging.getLogger(__name__)


class Executor(Protocol):
    """An executor as the scheduler sees it. Methods raise ``Unavailable`` while it is out of reach."""

    @property
    def name(self) -> str:
        """Its actor name."""
        ...

    async def assign(self, run_id: str, epoch: int) -> None:
        """Hands a run over; returns when the executor has it."""
        ...

    async def owned(self) -> Mapping[str, int]:
        """The runs it drives, with their epochs."""
        ...


#: Tries to import ``module:function`` names where steps run; maps those that fail to the reason.
ImportCheck = Callable[[Sequence[str]], Awaitable[Mapping[str, str]]]


class SchedulerService:
    """The leader. Build it inside a running event loop, then ``await start()``."""

    def __init__(
        self, engine: AsyncEngine, lease: LeaseKeeper, executors: Sequence[Executor], check_imports: ImportCheck
    ) -> None:
        self._store = PipelineStore(engine)
        self._lease = lease
        self._executors = executors
        self._check_imports = check_imports
        self._placing: set[str] = set()
        self._submitting = 0
        self._open_runs = 0

    async def start(self) -> None:
        """Waits for the leader's lease, then keeps runs placed in the background."""
        await self._lease.start()
        self._reconciler = asyncio.get_running_loop().create_task(self._reconcile_forever())

    async def submit(self, submission: Submission) -> str:
        """Validates, stores and assigns a run; returns its id once that is durable.

        Raises:
            InvalidPipeline: one problem a line, each with its path.
            InvalidInput: the idempotency key belongs to a different submission.
            Overloaded: too many submissions at once.
            Unavailable: Postgres is away, or another scheduler leads.
        """
        if self._submitting >= MAX_SUBMITTING:
            raise Overloaded(f"{self._submitting} submissions are under way; retry in a second")
        if "\x00" in submission.idempotency_key + submission.submitted_by:
            raise InvalidInput("the idempotency key and the submitter may not contain NUL characters")
        self._submitting += 1
        try:
            spec = build_spec(submission.spec)
            params = spec.resolve_params(submission.params)
            await self._require_imports(spec)
            run_id, is_new = await self._store.add_run(self._lease.current, spec, dict(params), submission)
        except Fenced:
            self._lease.lost.set()
            raise
        except CONNECTION_ERRORS as error:
            raise Unavailable("Postgres is away; retry") from error
        finally:
            self._submitting -= 1
        if is_new:
            try:
                await self._place(run_id)
            except (PlatformError, *CONNECTION_ERRORS) as error:
                _log.warning("run %s waits for an executor: %s", run_id, error)
        return run_id

    def lag(self) -> str:
        """Runs that are not over, for people."""
        return f"{self._open_runs} open runs"

    async def stop(self) -> None:
        """Gives the lease back."""
        self._reconciler.cancel()
        await self._lease.stop()

    async def _require_imports(self, spec: PipelineSpec) -> None:
        named = sorted({step.uses for step in spec.steps.values() if not step.uses.startswith("pickle:")})
        if not named:
            return
        failures = await self._check_imports(named)
        problems = [
            f"steps.{name}.uses: {failures[step.uses]}" for name, step in spec.steps.items() if step.uses in failures
        ]
        if problems:
            raise InvalidPipeline("\n".join(problems))

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self._reconcile()
            except Fenced:
                self._lease.lost.set()
                return
            except (PlatformError, *CONNECTION_ERRORS) as error:
                _log.warning("reconcile: %s", error)
            await asyncio.sleep(RECONCILE_S)

    async def _reconcile(self) -> None:
        """Gives every open run that nobody drives to an executor."""
        open_runs = await self._store.find_open()
        self._open_runs = len(open_runs)
        if not open_runs:
            return
        owned: dict[str, Mapping[str, int]] = {}
        for executor in self._executors:
            try:
                owned[executor.name] = await executor.owned()
            except Unavailable:
                continue  # Ray restarts it; its runs are placed when it answers again
        for run in open_runs:
            if not self._is_driven(run, owned):
                await self._place(run.run_id)

    def _is_driven(self, run: PipelineRun, owned: Mapping[str, Mapping[str, int]]) -> bool:
        if run.executor is None:
            return False
        if run.executor not in owned:
            return any(executor.name == run.executor for executor in self._executors)
        return owned[run.executor].get(run.run_id) == run.epoch

    async def _place(self, run_id: str) -> None:
        if run_id in self._placing:
            return
        self._placing.add(run_id)
        try:
            executor = self._executors[hash(run_id) % len(self._executors)]
            epoch = await self._store.assign(self._lease.current, run_id, executor.name)
            if epoch is not None:
                await executor.assign(run_id, epoch)
        finally:
            self._placing.discard(run_id)
