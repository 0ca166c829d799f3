"""Runs played by hand: a machine, the rows that it made durable, and a clock that tests move."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mlplat.pipelines.machine import Actions, Changes, RunMachine
from mlplat.pipelines.model import (
    WHOLE_STEP,
    Attempt,
    AttemptOutcome,
    AttemptState,
    Node,
    PipelineRun,
    RunSnapshot,
    Signal,
    SignalKind,
    State,
    StepRun,
)
from mlplat.pipelines.spec import PipelineSpec

RUN = "run1"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
OPEN = {AttemptState.QUEUED, AttemptState.RUNNING}
ACTIVE = {State.QUEUED, State.RUNNING}


def spec_of(steps: Mapping[str, Any], finally_: Mapping[str, Any] | None = None, **fields: Any) -> PipelineSpec:
    """A pipeline. Steps are functions unless they say otherwise; ``attempts`` is a retry without a wait."""
    return PipelineSpec.model_validate(
        {
            "name": "p",
            "steps": {name: _entry(step) for name, step in steps.items()},
            "finally": {name: _entry(step) for name, step in (finally_ or {}).items()},
        }
        | fields
    )


def _entry(step: Mapping[str, Any]) -> dict[str, Any]:
    entry = {key: value for key, value in step.items() if key != "attempts"}
    if not entry.keys() & {"command", "notebook", "pipeline", "approval"}:
        entry.setdefault("uses", "m:f")
    if "attempts" in step:
        entry["retry"] = {"max_attempts": step["attempts"], "initial_s": 0}
    return entry


def stored(value: Any) -> dict[str, Any]:
    """A JSON output as it is stored."""
    return {"kind": "json", "value": value}


def new_run(spec: PipelineSpec, params: Mapping[str, Any] | None = None, **fields: Any) -> PipelineRun:
    """A run that waits for its executor."""
    return PipelineRun(RUN, spec.name, spec.digest, dict(params or {}), State.QUEUED, epoch=1, **fields)


class Ledger:
    """What was made durable. Every change is held against the rules that no change may break."""

    def __init__(self, spec: PipelineSpec, run: PipelineRun) -> None:
        self.spec = spec
        self.steps = spec.all_steps
        self.run = run
        self.step_runs: dict[Node, StepRun] = {}
        self.attempts: dict[tuple[str, int, int], Attempt] = {}
        self.signals: list[Signal] = []

    def snapshot(self) -> RunSnapshot:
        """As a new owner reads it."""
        return copy.deepcopy(
            RunSnapshot(
                self.run, {}, list(self.step_runs.values()), list(self.attempts.values()), self.signals
            )
        )  # fmt: skip

    def state(self, step: str, item: int = WHOLE_STEP) -> State:
        """Of a node; PENDING while it has no row."""
        row = self.step_runs.get((step, item))
        return State.PENDING if row is None else row.state

    def of(self, node: Node) -> list[Attempt]:
        """The attempts of a node, by number, up to a gap."""
        found: list[Attempt] = []
        while (entry := self.attempts.get((*node, len(found) + 1))) is not None:
            found.append(entry)
        return found

    def store(self, changes: Changes) -> None:
        """Takes a transition."""
        changes = copy.deepcopy(changes)
        assert not self.run.state.is_final, "a run that is over changes no more"
        assert changes.seq == self.run.seq + 1
        assert {row.seq for row in changes.step_runs} | {row.seq for row in changes.attempts} <= {changes.seq}
        nodes = [row.node for row in changes.step_runs]
        assert len(set(nodes)) == len(nodes), "each row is written once"
        before = {node: self.state(*node) for node in nodes}
        for row in changes.step_runs:
            assert not before[row.node].is_final, f"{row.node} was final"
            self.step_runs[row.node] = row
        started = []
        for entry in changes.attempts:
            key = (entry.step, entry.item, entry.attempt)
            known = self.attempts.get(key)
            assert known is None or known.state in OPEN, f"{key} was over"
            if known is None:
                started.append(entry)
            self.attempts[key] = entry
        self.run.seq = changes.seq
        if changes.run is not None:
            self.run = changes.run
        for entry in started:
            self._check_start(entry)
        for name in {node[0] for node in nodes}:
            self._check_width(name)

    def _check_start(self, entry: Attempt) -> None:
        """The next number, alone, and not before what the step needs."""
        earlier = self.of((entry.step, entry.item))
        assert [other.attempt for other in earlier] == list(range(1, entry.attempt + 1))
        assert all(other.state not in OPEN | {AttemptState.SUCCEEDED} for other in earlier[:-1])
        for need in self.steps[entry.step].needs:
            assert self.step_runs[need, WHOLE_STEP].is_satisfied
        if entry.step in self.spec.finally_:
            assert all(self.state(name).is_final for name in self.spec.steps)
        else:
            assert self.run.stopping is None

    def _check_width(self, name: str) -> None:
        width, whole = self.steps[name].max_parallel, self.step_runs.get((name, WHOLE_STEP))
        if width is not None and whole is not None and whole.items is not None:
            assert sum(self.state(name, item) in ACTIVE for item in range(whole.items)) <= width


def same_state(one: RunMachine, other: RunMachine) -> bool:
    """Whether two machines have equal rows."""
    return one.nodes == other.nodes and one.attempts == other.attempts and one.run == other.run


@dataclass(frozen=True)
class Seen:
    """What one ``advance`` led to: labels of attempts, nodes, and a time."""

    start: list[tuple[str, int, int]]
    stop: list[Node]
    wake_at: datetime | None


class Play:
    """One run. Whatever happens to it is followed by ``tick``, which makes the changes durable."""

    def __init__(
        self,
        spec: PipelineSpec,
        params: Mapping[str, Any] | None = None,
        *,
        make: Callable[[PipelineSpec, RunSnapshot], RunMachine] = RunMachine,
        **run: Any,
    ) -> None:
        self.spec = spec
        self.now = NOW
        self.ledger = Ledger(spec, new_run(spec, params, **run))
        self._make = make
        self.machine = make(spec, self.ledger.snapshot())
        self.requests: dict[tuple[str, int, int], Any] = {}
        self._signals = 0

    def begin(self) -> Seen:
        """The run starts."""
        self.machine.begin(self.now)
        return self.tick()

    def tick(self, after_s: float = 0) -> Seen:
        """The rules are applied, and what changed is durable."""
        self.now += timedelta(seconds=after_s)
        seen = self._see(self.machine.advance(self.now))
        self.save()
        return seen

    def save(self) -> None:
        """What changed is durable."""
        changes = self.machine.take_changes()
        if changes is not None:
            self.ledger.store(changes)

    def take_over(self, *, survivors: bool = False) -> Seen:
        """Another owner takes the run from its durable rows. Open attempts are lost, or all survive."""
        self.machine = self._make(self.spec, self.ledger.snapshot())
        self.machine.begin(self.now)
        for signal in self.ledger.signals:
            self.machine.signal(signal, self.now)
        if not survivors:
            for row, entry in list(self.machine.open_attempts()):
                outcome = AttemptOutcome(AttemptState.LOST, error="gone")
                assert self.machine.attempt_ended(row.node, entry.attempt, outcome, self.now)
        return self.tick()

    def end(self, step: str, state: AttemptState = AttemptState.SUCCEEDED, item: int = WHOLE_STEP, **more: Any) -> bool:
        """The node's current attempt ends, without a tick."""
        if state is AttemptState.SUCCEEDED:
            more.setdefault("output", stored(1))
        else:
            more.setdefault("error", f"{state} {step}")
        node = (step, item)
        return self.machine.attempt_ended(
            node, self.machine.nodes[node].attempt, AttemptOutcome(state, **more), self.now
        )

    def ends(
        self, step: str, state: AttemptState = AttemptState.SUCCEEDED, item: int = WHOLE_STEP, **more: Any
    ) -> Seen:
        """The node's current attempt ends."""
        assert self.end(step, state, item, **more)
        return self.tick()

    def tell(self, kind: SignalKind, step: str = "", by: str = "ann", comment: str = "") -> Seen:
        """Somebody says something."""
        self.hear(kind, step, by, comment)
        return self.tick()

    def hear(self, kind: SignalKind, step: str = "", by: str = "ann", comment: str = "") -> Signal:
        """Somebody says something, without a tick."""
        self._signals += 1
        signal = Signal(self._signals, RUN, kind, step, by, comment, self.now)
        self.ledger.signals.append(signal)
        self.machine.signal(signal, self.now)
        return signal

    @property
    def run(self) -> PipelineRun:
        """As it is durable."""
        return self.ledger.run

    def row(self, step: str, item: int = WHOLE_STEP) -> StepRun:
        """A durable row."""
        return self.ledger.step_runs[step, item]

    def states(self, step: str) -> list[State]:
        """Of the items of a fan-out."""
        return [self.ledger.state(step, item) for item in range(self.row(step).items or 0)]

    def _see(self, actions: Actions) -> Seen:
        for request in actions.start:
            key = (request.step, request.item, request.attempt)
            assert key not in self.requests or key not in self.ledger.attempts, f"{key} starts twice"
            self.requests[key] = request
        return Seen([(r.step, r.item, r.attempt) for r in actions.start], actions.stop, actions.wake_at)


def begun(steps: dict[str, Any], finally_: dict[str, Any] | None = None, **fields: Any) -> Play:
    """A run of these steps that has begun."""
    play = Play(spec_of(steps, finally_, **fields))
    play.begin()
    return play


def labels(seen: Seen) -> list[str]:
    """``step``, ``step[item]``, each with ``#attempt`` from the second on."""
    return [
        step + ("" if item == WHOLE_STEP else f"[{item}]") + ("" if attempt == 1 else f"#{attempt}")
        for step, item, attempt in seen.start
    ]
