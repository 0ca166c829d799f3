"""Drives one pipeline run: what happened → rules → durable rows → acts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from mlplat.errors import InvalidInput
from mlplat.pipelines.machine import RunMachine
from mlplat.pipelines.model import (
    Attempt,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    ChildRequest,
    Node,
    RunSnapshot,
    Signal,
    State,
    StepRun,
    attempt_label,
)
from mlplat.pipelines.requests import cache_key
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.transitions import CachedOutput, Transition

Request = AttemptRequest | ChildRequest
_log = logging.getLogger(__name__)


class World(Protocol):
    """Where attempts run. No method raises for what an attempt does."""

    async def run(self, request: Request) -> AttemptOutcome:
        """Runs the attempt to its end, or joins the one that runs under its name. Cancelled: a light attempt is
        killed, a durable one and a sub-pipeline go on alone."""
        ...

    async def stop(self, request: Request) -> None:
        """Makes the attempt end: it is asked to, and after a while forced. Its outcome comes from ``run``."""
        ...

    async def survives(self, request: Request) -> bool:
        """Whether the attempt of an earlier owner can be joined."""
        ...

    async def acknowledge(self, request: Request) -> None:
        """Its outcome is durable: whatever was kept for that may go."""
        ...

    async def lost(self, label: str) -> None:
        """The attempt with this label died without a word: what it tracked ends with it."""
        ...

    async def find_cached(self, key: str, ttl_s: float | None) -> tuple[dict[str, Any], str] | None:
        """The output under a key that is no older than ``ttl_s``, with its run; None when there is none."""
        ...

    async def code_digest(self, uses: str) -> str | None:
        """SHA-256 of the code behind a name, as it is where steps run; None when nobody knows."""
        ...


#: Makes a transition durable; raises Fenced when the run has another owner.
Commit = Callable[[Transition], Awaitable[None]]


@dataclass(frozen=True)
class Started:
    """A worker has begun with an attempt."""

    node: Node
    attempt: int
    at: datetime
    where: str | None


@dataclass(frozen=True)
class Progressed:
    """An attempt says how far it is."""

    node: Node
    attempt: int
    progress: dict[str, Any]


@dataclass(frozen=True)
class _Ended:
    request: Request
    outcome: AttemptOutcome


@dataclass(frozen=True)
class _Hit:
    request: AttemptRequest
    output: dict[str, Any]
    run_id: str


Event = Started | Progressed | Signal | _Ended | _Hit


class RunDriver:
    """Owns one run under one epoch. ``drive`` ends when the run does, or raises Fenced."""

    def __init__(
        self,
        spec: PipelineSpec,
        snapshot: RunSnapshot,
        epoch: int,
        world: World,
        commit: Commit,
        *,
        reuse: Mapping[Node, StepRun] | None = None,
    ) -> None:
        self._machine = RunMachine(spec, snapshot)
        self._run = snapshot.run
        self._epoch = epoch
        self._world = world
        self._commit = commit
        self._inbox: list[Event] = list(snapshot.signals)
        self._woken = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], Node] = {}
        self._requests: dict[Node, Request] = {}
        self._stopped: set[Node] = set()
        self._cache_keys: dict[Node, str] = {}
        self._cached: list[CachedOutput] = []
        self._durable_ends: list[Request] = []
        #: Ends of attempts that nobody waited for any more, and that changed nothing.
        self.stale_ends = 0
        if reuse and self._run.resumed_from is not None:
            self._machine.reuse(reuse, self._run.resumed_from)

    @property
    def active_attempts(self) -> int:
        """Attempts that are under way."""
        return len(self._tasks)

    def is_durable(self, step: str) -> bool:
        """Whether the step's attempts run in actors of their own."""
        known = self._machine.steps.get(step)
        return known is not None and known.is_durable

    def post(self, event: Event) -> None:
        """Something happened; the run looks at it when it has time."""
        self._inbox.append(event)
        self._woken.set()

    async def drive(self) -> State:
        """Runs until the run is over and returns its final state.

        Raises:
            Fenced: the run has another owner; this one's light attempts were abandoned.
            Unavailable: Postgres stayed away.
        """
        try:
            self._machine.begin(_now())
            await self._adopt()
            while not self._run.state.is_final:
                self._apply_inbox()
                actions = self._machine.advance(_now())
                await self._flush([request for request in actions.start if isinstance(request, ChildRequest)])
                for request in actions.start:
                    self._spawn(request)
                self._stopped.update(actions.stop)
                for node in actions.stop:
                    await self._world.stop(self._requests[node])
                if not self._run.state.is_final:
                    await self._wait(actions.wake_at)
            return self._run.state
        finally:
            for task in self._tasks:
                task.cancel()

    async def _adopt(self) -> None:
        """Takes over what an earlier owner left: durable attempts are joined, the others died with it."""
        for row, entry in list(self._machine.open_attempts()):
            request = self._request_again(row)
            if request is not None and await self._world.survives(request):
                self._spawn(request, is_new=False)
            else:
                # Before the commit: a crash in between repeats this, and never leaves it out.
                await self._world.lost(self._label(row, entry))
                gone = AttemptOutcome(AttemptState.LOST, error="its executor was lost")
                self._machine.attempt_ended(row.node, row.attempt, gone, _now())

    def _request_again(self, row: StepRun) -> Request | None:
        try:
            return self._machine.request_of(row)
        except InvalidInput:
            return None

    def _label(self, row: StepRun, entry: Attempt) -> str:
        return attempt_label(self._run.run_id, row.step, row.item, entry.attempt)

    def _apply_inbox(self) -> None:
        events, self._inbox = self._inbox, []
        for event in events:
            match event:
                case Started(node, attempt, at, where):
                    self._machine.attempt_started(node, attempt, at, where)
                case Progressed(node, attempt, progress):
                    text = _storable(progress.get("text"))
                    self._machine.attempt_progressed(node, attempt, {**progress, "text": text})
                case _Ended(request, outcome):
                    self._end(request, outcome)
                case _Hit(request, output, run_id):
                    self._machine.cache_hit(request.node, output, run_id, _now())
                case Signal():
                    self._machine.signal(event, _now())

    def _end(self, request: Request, outcome: AttemptOutcome) -> None:
        outcome = replace(outcome, error=_storable(outcome.error))
        if not self._machine.attempt_ended(request.node, request.attempt, outcome, _now()):
            self.stale_ends += 1
            _log.warning("attempt %s/%s/%s: its end came again, or too late", self._run.run_id, *request.node)
            return
        key = self._cache_keys.pop(request.node, None)
        if key is not None and outcome.state is AttemptState.SUCCEEDED and outcome.output is not None:
            self._cached.append(CachedOutput(key, request.step, request.item, outcome.output))
        if isinstance(request, AttemptRequest) and request.durable:
            self._durable_ends.append(request)

    async def _flush(self, children: Sequence[ChildRequest]) -> None:
        changes = self._machine.take_changes()
        if changes is None:
            return
        await self._commit(Transition.of(self._run.run_id, self._epoch, changes, children, self._cached))
        self._cached = []
        ended, self._durable_ends = self._durable_ends, []
        for request in ended:
            await self._world.acknowledge(request)

    def _spawn(self, request: Request, *, is_new: bool = True) -> None:
        self._requests[request.node] = request
        task = asyncio.get_running_loop().create_task(self._run_attempt(request, is_new))
        self._tasks[task] = request.node
        task.add_done_callback(self._tasks.pop)

    async def _run_attempt(self, request: Request, is_new: bool) -> None:
        try:
            outcome = await self._outcome_of(request, is_new)
        except Exception as error:  # a defect must end the attempt: the run would wait for it for ever
            _log.exception("attempt %s/%s/%s: failed", self._run.run_id, request.node, request.attempt)
            outcome = AttemptOutcome(AttemptState.FAILED, error=f"internal error: {type(error).__name__}: {error}")
        if outcome is not None:
            self.post(_Ended(request, outcome))

    async def _outcome_of(self, request: Request, is_new: bool) -> AttemptOutcome | None:
        """How the attempt ended; None when it need not run, because its output is cached."""
        if is_new and isinstance(request, AttemptRequest) and await self._take_cached(request):
            return None
        if is_new and request.node in self._stopped:  # while its output was looked for
            return AttemptOutcome(AttemptState.CANCELLED, error="stopped before it began")
        outcome = await self._world.run(request)
        if outcome.state is AttemptState.LOST or (outcome.state is AttemptState.FAILED and outcome.started_at is None):
            label = attempt_label(self._run.run_id, request.step, request.item, request.attempt)
            await self._world.lost(label)
        return outcome

    async def _take_cached(self, request: AttemptRequest) -> bool:
        caching = self._machine.steps[request.step].caching
        if caching is None:
            return False
        code = await self._world.code_digest(str(request.target)) if _is_name(request) else ""
        if code is None:
            return False
        key = cache_key(request, caching.version, code)
        self._cache_keys[request.node] = key
        found = await self._world.find_cached(key, caching.ttl_s)
        if found is None:
            return False
        self._cache_keys.pop(request.node)
        self.post(_Hit(request, *found))
        return True

    async def _wait(self, until: datetime | None) -> None:
        if self._inbox:
            return
        self._woken.clear()
        timeout = None if until is None else max(0.0, (until - _now()).total_seconds())
        try:
            async with asyncio.timeout(timeout):
                await self._woken.wait()
        except TimeoutError:
            return


def _is_name(request: AttemptRequest) -> bool:
    """Whether the target only names its code, so that the code itself must be known from elsewhere."""
    return request.kind == "uses" and not str(request.target).startswith("pickle:")


def _storable(text: str | None) -> str | None:
    """The text without what Postgres refuses."""
    return None if text is None else text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def _now() -> datetime:
    return datetime.now(UTC)
