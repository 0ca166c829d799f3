"""RunExecutor: drives its runs and owns the Ray tasks of their steps."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.handles import SchedulerClient
from actors.lifecycle import Health, spare_garbage_collection
from actors.world import RayWorld
from mlplat.db.engine import CONNECTION_ERRORS, open_engine
from mlplat.errors import Fenced, PlatformError, Unavailable
from mlplat.execution.attendant import Notice
from mlplat.pipelines.driver import Progressed, RunDriver, Started
from mlplat.pipelines.machine import Changes
from mlplat.pipelines.model import Assignment, Node, PipelineRun, RunSnapshot, State, StepRun
from mlplat.pipelines.parsing import SpecCache
from mlplat.pipelines.resume import reusable
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.transitions import Transition, TransitionWriter
from mlplat.settings import PlatformConfig
from mlplat.tracking.runs import RunStore

#: How often the runs look for what people told them, when nobody says that there is something.
SIGNALS_EVERY_S = 1.0
_log = logging.getLogger(__name__)


@dataclass
class _Owned:
    """A run under way."""

    epoch: int
    task: asyncio.Task[None] | None = None
    driver: RunDriver | None = None
    heard: set[int] = field(default_factory=set)


class RunExecutor:
    """Keeps no truth: after a restart the scheduler assigns its runs again, under new epochs."""

    def __init__(self, config: PlatformConfig, name: str) -> None:
        self._name = name
        engine = open_engine(config.postgres_url, name, pool_size=3)
        self._store = PipelineStore(engine)
        # One connection of its own, so that commits never wait for reads.
        self._writer = TransitionWriter(open_engine(config.postgres_url, f"{name} writer", pool_size=1), name)
        self._world = RayWorld(config, name, self._store, RunStore(engine), self._take)
        self._scheduler = SchedulerClient()
        self._specs = SpecCache()
        self._owned: dict[str, _Owned] = {}
        self._ended: list[str] = []
        self._telling: asyncio.Task[None] | None = None
        self._poked = asyncio.Event()
        self._listener = asyncio.get_running_loop().create_task(self._listen())
        spare_garbage_collection()

    async def assign(self, assignments: Sequence[Assignment]) -> None:
        """Takes runs over. A newer epoch replaces an older one; a repeat changes nothing."""
        for assignment in assignments:
            self._take(assignment)

    async def owned(self) -> Mapping[str, int]:
        """The runs it drives, with their epochs."""
        return {run_id: owned.epoch for run_id, owned in self._owned.items()}

    async def poke(self) -> None:
        """People told its runs something."""
        self._poked.set()

    async def notice(self, notice: Notice) -> None:
        """An attempt says that it runs, or how far it is."""
        run_id, step, item, attempt = notice.label.rsplit("/", 3)
        owned = self._owned.get(run_id)
        if owned is None or owned.driver is None:
            return
        node = (step, int(item))
        if notice.progress is not None:
            owned.driver.post(Progressed(node, int(attempt), notice.progress))
            return
        self._world.started(notice.label, notice.started_at, owned.driver.is_durable(step))
        owned.driver.post(Started(node, int(attempt), notice.started_at, notice.node))

    async def health(self) -> Health:
        """Always answers at once."""
        attempts = sum(owned.driver.active_attempts for owned in self._owned.values() if owned.driver is not None)
        return {"pid": os.getpid(), "lag": f"{attempts} attempts"}

    async def stop(self) -> None:
        """Abandons its runs; whoever comes next takes them over."""
        self._listener.cancel()
        for owned in list(self._owned.values()):
            if owned.task is not None:
                owned.task.cancel()
        await self._writer.close()

    def _take(self, assignment: Assignment) -> None:
        known = self._owned.get(assignment.run_id)
        if known is not None and known.epoch >= assignment.epoch:
            return
        if known is not None and known.task is not None:
            known.task.cancel()
        owned = _Owned(assignment.epoch)
        self._owned[assignment.run_id] = owned
        owned.task = asyncio.get_running_loop().create_task(self._drive(assignment, owned))

    async def _drive(self, assignment: Assignment, owned: _Owned) -> None:
        run_id = assignment.run_id
        try:
            snapshot, spec = await self._load(assignment)
            reuse = await self._results_of(snapshot, spec)
            owned.heard = {signal.signal_id for signal in snapshot.signals}
            owned.driver = RunDriver(
                spec, snapshot, assignment.epoch, self._world, self._writer.write, reuse=reuse
            )  # fmt: skip
            await owned.driver.drive()
            self._tell_end(snapshot.run)
        except (Fenced, Unavailable, *CONNECTION_ERRORS) as error:
            _log.warning("run %s, epoch %s: let go: %s", run_id, assignment.epoch, error)
        except Exception as error:  # a defect must end one run, not hide it as RUNNING for ever
            _log.exception("run %s, epoch %s: failed", run_id, assignment.epoch)
            await self._fail(assignment, error)
        finally:
            if self._owned.get(run_id) is owned:
                del self._owned[run_id]

    async def _load(self, assignment: Assignment) -> tuple[RunSnapshot, PipelineSpec]:
        if assignment.run is not None and assignment.spec is not None:
            spec = self._specs.get(assignment.spec).spec
            return RunSnapshot(assignment.run, {}), spec
        snapshot = await self._store.get_snapshot(assignment.run_id)
        return snapshot, PipelineSpec.model_validate(snapshot.spec)

    async def _results_of(self, snapshot: RunSnapshot, spec: PipelineSpec) -> Mapping[Node, StepRun]:
        """What a new run takes over from the run that it goes on from."""
        run = snapshot.run
        if run.resumed_from is None or run.started_at is not None:
            return {}
        earlier = await self._store.get_snapshot(run.resumed_from)
        return reusable(earlier, spec, run.params, run.resumed_step)

    async def _fail(self, assignment: Assignment, error: Exception) -> None:
        try:
            run = await self._store.get_run(assignment.run_id)
            run.state, run.error = State.FAILED, f"internal error: {type(error).__name__}: {error}"
            changes = Changes(run.seq + 1, [], [], run)
            await self._writer.write(Transition.of(run.run_id, assignment.epoch, changes))
        except (PlatformError, *CONNECTION_ERRORS):
            _log.exception("run %s was not marked FAILED", assignment.run_id)

    def _tell_end(self, run: PipelineRun) -> None:
        """The scheduler may admit another run, a parent may go on. Both find out by themselves if this is lost."""
        self._world.child_ended(run)
        self._ended.append(run.run_id)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell_scheduler())

    async def _tell_scheduler(self) -> None:
        while self._ended:
            ended, self._ended = self._ended, []
            try:
                await self._scheduler.ended(ended)
            except PlatformError as error:
                _log.debug("the scheduler does not know yet of %d ends: %s", len(ended), error)

    async def _listen(self) -> None:
        """Takes what people say to the runs."""
        while True:
            try:
                async with asyncio.timeout(SIGNALS_EVERY_S):
                    await self._poked.wait()
            except TimeoutError:
                pass
            self._poked.clear()
            if not self._owned:
                continue
            try:
                for signal in await self._store.find_signals(self._name):
                    owned = self._owned.get(signal.run_id)
                    if owned is not None and owned.driver is not None and signal.signal_id not in owned.heard:
                        owned.heard.add(signal.signal_id)
                        owned.driver.post(signal)
            except (PlatformError, *CONNECTION_ERRORS) as error:
                _log.warning("signals: %s", error)
