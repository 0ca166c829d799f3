"""Runs driven to their end: rows in memory, and a world whose attempts do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from mlplat.errors import Fenced
from mlplat.pipelines.driver import Request, RunDriver
from mlplat.pipelines.machine import Changes
from mlplat.pipelines.model import (
    Attempt,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    ChildRequest,
    Node,
    PipelineRun,
    Signal,
    SignalKind,
    State,
    StepRun,
)
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.transitions import CachedOutput, Transition
from tests.unit.playing import NOW, RUN, Ledger, new_run, stored

S = AttemptState.SUCCEEDED


class Crash(Exception):
    """The driver's process dies here."""


def changes_of(transition: Transition) -> Changes:
    """What a transition writes."""
    row = transition.row
    return Changes(
        row.seq, msgspec.json.decode(row.step_runs, type=list[StepRun]),
        msgspec.json.decode(row.attempts, type=list[Attempt]),
        msgspec.json.decode(row.run, type=PipelineRun | None),
    )  # fmt: skip


class Rows:
    """What was committed.

    Args:
        trouble: what happens at a commit, by its number: the process dies "before" or "after" it is durable, or a
            "takeover" follows it.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        params: Mapping[str, Any] | None = None,
        trouble: Mapping[int, str] | None = None,
        **run: Any,
    ) -> None:
        self.ledger = Ledger(spec, new_run(spec, params, **run))
        self.epoch = 0
        self.taken_over = asyncio.Event()
        self.children: list[dict[str, Any]] = []
        self.cached: list[CachedOutput] = []
        self.transitions: list[Transition] = []
        self._trouble = dict(trouble or {})

    async def commit(self, transition: Transition) -> None:
        """See ``driver.Commit``."""
        await asyncio.sleep(0)
        if transition.row.epoch != self.epoch:
            raise Fenced("the epoch is over")
        self.transitions.append(transition)
        trouble = self._trouble.get(len(self.transitions))
        if trouble == "before":
            raise Crash
        self.ledger.store(changes_of(transition))
        self.children += msgspec.json.decode(transition.row.children)
        self.cached += msgspec.json.decode(transition.row.cache, type=list[CachedOutput])
        if trouble == "after":
            raise Crash
        if trouble == "takeover":
            self.epoch += 1
            self.taken_over.set()

    def say(self, kind: SignalKind, step: str = "") -> Signal:
        """Somebody says something, durably."""
        signal = Signal(len(self.ledger.signals) + 1, RUN, kind, step, "ann", "", NOW)
        self.ledger.signals.append(signal)
        return signal


class FakeWorld:
    """Attempts end at once, successfully, unless a test says otherwise.

    Args:
        outcomes: by node, for its attempts in order.
        compute: the value of an attempt.
        turns: how often an attempt lets others go first; None: it runs until it is stopped.
    """

    def __init__(
        self,
        rows: Rows,
        outcomes: Mapping[Node, list[AttemptState]] | None = None,
        compute: Callable[[AttemptRequest], Any] = lambda request: request.attempt,
        turns: Callable[[Request], int | None] = lambda _request: 0,
    ) -> None:
        self._rows = rows
        self._outcomes = outcomes or {}
        self._compute = compute
        self._turns = turns
        self._stops: dict[str, asyncio.Event] = {}
        self._alone: dict[str, asyncio.Task[AttemptOutcome]] = {}  # what goes on without its driver
        self.requests: list[Request] = []
        self.stopped: list[str] = []
        self.killed: list[str] = []
        self.acknowledged: list[str] = []
        self.lost_labels: list[str] = []
        self.cache: dict[str, tuple[dict[str, Any], str]] = {}
        self.code: str | None = "code"
        self.looking_up = asyncio.Event()
        self.looking_up.set()

    async def run(self, request: Request) -> AttemptOutcome:
        """See ``driver.World``."""
        label = label_of(request)
        if label in self._alone:
            return await asyncio.shield(self._alone[label])
        assert (request.step, request.item, request.attempt) in self._rows.ledger.attempts, "before it was committed"
        self.requests.append(request)
        self._stops.setdefault(label, asyncio.Event())
        task = asyncio.get_running_loop().create_task(self._work(request))
        if isinstance(request, ChildRequest) or request.durable:
            self._alone[label] = task
            return await asyncio.shield(task)
        try:
            return await task
        except asyncio.CancelledError:
            task.cancel()
            self.killed.append(label)
            raise

    async def _work(self, request: Request) -> AttemptOutcome:
        turns = self._turns(request)
        if turns is None:
            await self._stops[label_of(request)].wait()
            return AttemptOutcome(AttemptState.CANCELLED, error="stopped", started_at=NOW)
        for _turn in range(turns):
            await asyncio.sleep(0)
        script = self._outcomes.get(request.node, [])
        state = script[request.attempt - 1] if request.attempt <= len(script) else S
        if state is not S:
            return AttemptOutcome(state, error=f"{state} {request.attempt}", started_at=NOW)
        value = self._compute(request) if isinstance(request, AttemptRequest) else None
        return AttemptOutcome(S, stored(value), started_at=NOW)

    async def stop(self, request: Request) -> None:
        """See ``driver.World``."""
        self.stopped.append(label_of(request))
        self._stops.setdefault(label_of(request), asyncio.Event()).set()

    async def survives(self, request: Request) -> bool:
        """See ``driver.World``."""
        return label_of(request) in self._alone

    async def acknowledge(self, request: Request) -> None:
        """See ``driver.World``."""
        self.acknowledged.append(label_of(request))

    async def lost(self, label: str) -> None:
        """See ``driver.World``."""
        self.lost_labels.append(label)

    async def find_cached(self, key: str, ttl_s: float | None) -> tuple[dict[str, Any], str] | None:
        """See ``driver.World``."""
        await self.looking_up.wait()
        return self.cache.get(key)

    async def code_digest(self, uses: str) -> str | None:
        """See ``driver.World``."""
        assert uses == "m:f"
        return self.code

    @property
    def labels(self) -> list[str]:
        """Of the attempts that ran, in order."""
        return [label_of(request) for request in self.requests]

    def values(self, step: str) -> list[Mapping[str, Any]]:
        """The arguments of a step's attempts, as they were launched."""
        return [r.arguments for r in self.requests if isinstance(r, AttemptRequest) and r.step == step]


def label_of(request: Request) -> str:
    """The attempt's name."""
    return f"{request.run_id}/{request.step}/{request.item}/{request.attempt}"


def driver_of(rows: Rows, world: FakeWorld, **more: Any) -> RunDriver:
    """A new owner."""
    rows.epoch += 1
    rows.taken_over.clear()
    snapshot = rows.ledger.snapshot()
    return RunDriver(rows.ledger.spec, snapshot, rows.epoch, world, rows.commit, **more)


async def drive(rows: Rows, world: FakeWorld) -> State:
    """Drives under ever higher epochs until an owner brings the run to its end."""
    tasks: list[asyncio.Task[State]] = []
    try:
        for _owner in range(100):
            tasks.append(asyncio.create_task(driver_of(rows, world).drive()))
            taken_over = asyncio.create_task(rows.taken_over.wait())
            await asyncio.wait([tasks[-1], taken_over], return_when=asyncio.FIRST_COMPLETED)
            taken_over.cancel()
            if rows.ledger.run.state.is_final:
                break
            if tasks[-1].done():
                assert isinstance(tasks[-1].exception(), Fenced if rows.taken_over.is_set() else Crash)
    finally:
        results = await asyncio.gather(*tasks, return_exceptions=True)
    strange = [result for result in results if not isinstance(result, State | Crash | Fenced)]
    assert not strange, strange
    assert rows.ledger.run.state.is_final
    return rows.ledger.run.state
