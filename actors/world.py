"""Where attempts run: Ray tasks, detached actors, and runs of their own for sub-pipelines."""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from actors.durable_attempt import NAME_PREFIX, DurableAttempt, get_durable, kill_durable, tell_executor
from actors.lifecycle import WORKLOAD_ENV
from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.errors import Unavailable
from mlplat.execution.attempt import run_attempt
from mlplat.execution.attendant import Notice
from mlplat.pipelines.model import (
    Assignment,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    ChildRequest,
    PipelineRun,
    Reservation,
    State,
)
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.turns import Turns
from mlplat.runtime import NAMESPACE
from mlplat.settings import PlatformConfig
from mlplat.steps.functions import ImportReport, try_imports
from mlplat.tracking.runs import RunStore

#: How long an attempt may take to end after it was asked to.
GRACE_S = 10.0
PING_TIMEOUT_S = 10.0
CHILD_POLL_S = 0.5
#: Attempts that are with the cluster at once: enough that a CPU which gets free has the next one at hand.
TURNS_PER_CPU = 2
MIN_TURNS = 8
COUNT_EVERY_S = 5.0
CODE_TIMEOUT_S = 60.0
CODE_BELIEVED_S = 60.0
MAX_CODE = 10_000
MAX_REMOTES = 5_000
_log = logging.getLogger(__name__)
#: The one thing by which Ray's error tells that it was not the actor that died by itself.
_NODE_DIED = "its node has died"
_TIMEOUT_TYPES = ("builtins.TimeoutError", "builtins.OSError", "builtins.Exception", "builtins.BaseException")

Request = AttemptRequest | ChildRequest


def run_light_attempt(packed: bytes, executor: str) -> AttemptOutcome:
    """The Ray task of a light attempt.

    Args:
        packed: its request and the platform's configuration, pickled: Ray takes ten times as long for two objects.
        executor: the name of the actor to tell how it goes.
    """
    request, config = pickle.loads(packed)  # noqa: S301 - the executor's own

    def tell(notice: Notice) -> None:
        tell_executor(executor, notice)

    return run_attempt(request, config, tell)


class RayWorld:
    """One executor's attempts. ``assign`` is where runs of sub-pipelines go."""

    def __init__(
        self,
        config: PlatformConfig,
        executor: str,
        store: PipelineStore,
        runs: RunStore,
        assign: Callable[[Assignment], None],
    ) -> None:
        self._config = config
        self._executor = executor
        self._store = store
        self._runs = runs
        self._assign = assign
        self._light: Any = ray.remote(run_light_attempt)
        # Ray keeps a worker for as long as it owns objects, which after a sweep is for ever.
        self._fresh: Any = ray.remote(max_calls=1)(run_light_attempt)
        self._turns = Turns(MIN_TURNS)
        self._counter = asyncio.get_running_loop().create_task(self._count_cpus())
        self._remotes: dict[tuple[object, ...], Any] = {}
        self._refs: dict[str, Any] = {}
        #: Why an attempt is being stopped, by label.
        self._stopping: dict[str, str] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._timeouts: dict[str, float] = {}
        self._code: dict[str, tuple[str, float]] = {}
        self._children: dict[str, asyncio.Future[PipelineRun]] = {}
        self._poller: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, request: Request) -> AttemptOutcome:
        """See ``driver.World``."""
        if isinstance(request, ChildRequest):
            return await self._run_child(request)
        if request.timeout_s is not None:
            self._timeouts[request.label] = request.timeout_s
        try:
            if _waits_for_cpus(request):
                await self._turns.take(request.label, request.priority, request.submitted_by)
            if request.durable:
                return await self._run_durable(request)
            return await self._run_light(request)
        except asyncio.CancelledError:
            if request.label in self._stopping:  # while it waited for its turn
                return self._explain(request.label, AttemptOutcome(AttemptState.CANCELLED))
            raise
        finally:
            self._turns.give_back(request.label)
            self._forget(request.label)

    async def stop(self, request: Request) -> None:
        """See ``driver.World``."""
        if isinstance(request, ChildRequest):
            await self._store.cancel(request.child_id, "the run that it is part of")
            return
        self._stop(request.label, request.durable, "stopped")

    async def survives(self, request: Request) -> bool:
        """See ``driver.World``."""
        if isinstance(request, ChildRequest):
            return True
        if not request.durable:
            return False
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await get_durable(request.label).pid.remote()
        except (Unavailable, RayError):
            return False
        except TimeoutError:  # busy, or still waiting for resources: it lives
            return True
        return True

    async def acknowledge(self, request: Request) -> None:
        """See ``driver.World``."""
        if isinstance(request, AttemptRequest) and request.durable:
            kill_durable(request.label)

    async def lost(self, label: str) -> None:
        """See ``driver.World``: the tracked runs of a dead attempt end with it."""
        try:
            await self._runs.kill_of_attempt(label)
        except CONNECTION_ERRORS as error:
            _log.warning("runs of %s were not marked KILLED: %s", label, error)

    async def find_cached(self, key: str, ttl_s: float | None) -> tuple[dict[str, Any], str] | None:
        """See ``driver.World``."""
        try:
            return await self._store.find_cached(key, ttl_s)
        except CONNECTION_ERRORS:
            return None

    async def code_digest(self, uses: str) -> str | None:
        """See ``driver.World``. What was found out is believed for a minute."""
        known = self._code.get(uses)
        if known is not None and known[1] > time.monotonic():
            return known[0]
        task = ray.remote(try_imports).options(num_cpus=0, max_retries=0, runtime_env=WORKLOAD_ENV)
        try:
            async with asyncio.timeout(CODE_TIMEOUT_S):
                report: ImportReport = await task.remote([uses])
        except (RayError, TimeoutError) as error:
            _log.warning("the code of %s is not known: %s", uses, error)
            return None
        digest = report.code.get(uses)
        if digest is not None:
            if len(self._code) > MAX_CODE:
                self._code.clear()
            self._code[uses] = (digest, time.monotonic() + CODE_BELIEVED_S)
        return digest

    def started(self, label: str, at: datetime, durable: bool) -> None:
        """A worker has begun with the attempt: from now on its timeout runs."""
        timeout_s = self._timeouts.pop(label, None)
        if timeout_s is None or label in self._timers:
            return
        left_s = max(0.0, timeout_s - (datetime.now(UTC) - at).total_seconds())
        reason = f"timed out after {timeout_s:g} s"
        loop = asyncio.get_running_loop()
        self._timers[label] = loop.call_later(left_s, self._stop, label, durable, reason)

    def child_ended(self, run: PipelineRun) -> None:
        """A run that may be somebody's child is over."""
        waiting = self._children.pop(run.run_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(run)

    async def _count_cpus(self) -> None:
        """Keeps the number of attempts that are with the cluster in step with its size."""
        while True:
            try:
                resources = await asyncio.to_thread(ray.cluster_resources)
                self._turns.set_capacity(MIN_TURNS + TURNS_PER_CPU * int(resources.get("CPU", 0)))
            except RayError as error:
                _log.warning("the cluster's size is not known: %s", error)
            await asyncio.sleep(COUNT_EVERY_S)

    # -- light attempts --------------------------------------------------------------------------

    async def _run_light(self, request: AttemptRequest) -> AttemptOutcome:
        ref = self._remote(request).remote(pickle.dumps((request, self._config)), self._executor)
        self._refs[request.label] = ref
        try:
            outcome: AttemptOutcome = await ref
        except asyncio.CancelledError:
            ray.cancel(ref, force=True, recursive=True)
            raise
        except RayError as error:
            outcome = _outcome_of(error)
        return self._explain(request.label, outcome)

    def _remote(self, request: AttemptRequest) -> Any:
        """The task with its options, which are expensive to make and the same for every attempt of a step."""
        key = (request.pipeline, request.step, request.fresh_process, request.reservation)
        known = self._remotes.get(key)
        if known is None:
            if len(self._remotes) > MAX_REMOTES:
                self._remotes.clear()
            task = self._fresh if request.fresh_process else self._light
            known = task.options(
                name=f"{request.pipeline}/{request.step}", max_retries=0, **_options(request.reservation)
            )
            self._remotes[key] = known
        return known

    # -- durable attempts ------------------------------------------------------------------------

    async def _run_durable(self, request: AttemptRequest) -> AttemptOutcome:
        actor: Any = (
            ray.remote(DurableAttempt)
            .options(
                name=NAME_PREFIX + request.label, namespace=NAMESPACE, lifetime="detached", get_if_exists=True,
                max_restarts=0, max_concurrency=100, **_options(request.reservation),
            )
            .remote(request, self._config, self._executor)
        )  # fmt: skip
        try:
            outcome: AttemptOutcome = await actor.outcome.remote(self._executor)
        except RayError as error:
            outcome = _outcome_of(error)
        return self._explain(request.label, outcome)

    # -- stopping --------------------------------------------------------------------------------

    def _stop(self, label: str, durable: bool, reason: str) -> None:
        if label not in self._stopping:
            self._stopping[label] = reason
            if self._turns.give_up(label):
                return
            task = asyncio.get_running_loop().create_task(self._ask_then_force(label, durable))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask_then_force(self, label: str, durable: bool) -> None:
        if durable:
            await self._ask_durable(label)
        elif label in self._refs:
            ray.cancel(self._refs[label], force=False, recursive=True)
        await asyncio.sleep(GRACE_S)
        if label not in self._stopping:
            return
        if durable:
            kill_durable(label)
        elif label in self._refs:
            ray.cancel(self._refs[label], force=True, recursive=True)

    async def _ask_durable(self, label: str) -> None:
        try:
            async with asyncio.timeout(GRACE_S):
                await get_durable(label).stop.remote()
        except (Unavailable, RayError, TimeoutError):
            kill_durable(label)

    def _explain(self, label: str, outcome: AttemptOutcome) -> AttemptOutcome:
        """An attempt that was stopped ended for that reason, whatever it looks like."""
        reason = self._stopping.get(label)
        if reason is None or outcome.state is AttemptState.SUCCEEDED:
            return outcome
        timed_out = reason != "stopped"
        return AttemptOutcome(
            AttemptState.FAILED if timed_out else AttemptState.CANCELLED,
            error=reason,
            error_types=_TIMEOUT_TYPES if timed_out else (),
            started_at=outcome.started_at,
            node=outcome.node,
        )

    def _forget(self, label: str) -> None:
        self._refs.pop(label, None)
        self._stopping.pop(label, None)
        self._timeouts.pop(label, None)
        timer = self._timers.pop(label, None)
        if timer is not None:
            timer.cancel()

    # -- sub-pipelines ---------------------------------------------------------------------------

    async def _run_child(self, request: ChildRequest) -> AttemptOutcome:
        began = datetime.now(UTC)
        done: asyncio.Future[PipelineRun] = asyncio.get_running_loop().create_future()
        self._children[request.child_id] = done
        self._assign(Assignment(request.child_id, 1))
        if self._poller is None or self._poller.done():
            self._poller = asyncio.get_running_loop().create_task(self._poll_children())
        try:
            run = await done
        finally:
            self._children.pop(request.child_id, None)
        states = {State.SUCCEEDED: AttemptState.SUCCEEDED, State.CANCELLED: AttemptState.CANCELLED}
        error = None if run.error is None else f"run {run.run_id}: {run.error}"
        output = run.output if run.output is not None else {"kind": "json", "value": None}
        return AttemptOutcome(states.get(run.state, AttemptState.FAILED), output, error, (), run.started_at or began)

    async def _poll_children(self) -> None:
        """Finds out about children that another executor drives, or that ended before anybody listened."""
        while self._children:
            await asyncio.sleep(CHILD_POLL_S)
            try:
                for run in (await self._store.find_states(list(self._children))).values():
                    if run.state.is_final:
                        self.child_ended(run)
            except CONNECTION_ERRORS as error:
                _log.warning("children: %s", error)


def _waits_for_cpus(request: AttemptRequest) -> bool:
    """Attempts that reserve something else than CPUs may wait long for it, and must not hold up the others."""
    reservation = request.reservation
    return reservation.cpus > 0 and not reservation.gpus and not reservation.custom and not reservation.accelerator


def _options(reservation: Reservation) -> dict[str, Any]:
    runtime_env: dict[str, Any] = {"env_vars": {**WORKLOAD_ENV["env_vars"], **dict(reservation.env_vars)}}
    if reservation.packages:
        runtime_env["pip"] = list(reservation.packages)
    return {
        "num_cpus": reservation.cpus,
        "num_gpus": reservation.gpus,
        "memory": None if reservation.memory_mb is None else reservation.memory_mb * 1024 * 1024,
        "accelerator_type": reservation.accelerator,
        "resources": dict(reservation.custom) or None,
        "runtime_env": runtime_env,
    }


def _outcome_of(error: RayError) -> AttemptOutcome:
    """How an attempt ended that did not come back with an outcome of its own."""
    if isinstance(error, OutOfMemoryError):
        return AttemptOutcome(
            AttemptState.FAILED, error="out of memory: the node killed the attempt's process",
            error_types=("builtins.MemoryError", "builtins.Exception"),
        )  # fmt: skip
    if isinstance(error, ActorDiedError) and _NODE_DIED in str(error):
        return AttemptOutcome(AttemptState.LOST, error="lost: its node died")
    if isinstance(error, WorkerCrashedError | ActorDiedError):
        return AttemptOutcome(AttemptState.FAILED, error="the attempt's process died (killed, or it exited by itself)")
    if isinstance(error, ObjectLostError | TaskCancelledError | GetTimeoutError | RayActorError):
        return AttemptOutcome(AttemptState.LOST, error=f"lost: {type(error).__name__}")
    if isinstance(error, RayTaskError):
        return AttemptOutcome(AttemptState.FAILED, error=str(error.cause or error))
    return AttemptOutcome(AttemptState.LOST, error=f"lost: {type(error).__name__}: {error}")
