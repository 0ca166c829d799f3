"""The state machine of a run held against a reference, for random pipelines, outcomes, crashes and cancellations."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines.machine import MAX_STARTS, RunMachine
from mlplat.pipelines.model import (
    WHOLE_STEP,
    AttemptOutcome,
    AttemptState,
    Node,
    RunSnapshot,
    SignalKind,
    State,
)
from mlplat.pipelines.spec import PipelineSpec
from tests.unit.playing import NOW, OPEN, RUN, Ledger, Play, Seen, same_state, spec_of, stored
from tests.unit.reference import Reference, Sketch

MAX_ROUNDS = 1_000
S, F, L, C = AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.CANCELLED


# -- random pipelines ------------------------------------------------------------------------------


@st.composite
def sketches(draw: st.DrawFn) -> dict[str, Sketch]:
    """Up to six steps and two finally steps, each of which needs some before it, in a shuffled order."""
    found: dict[str, Sketch] = {}
    for section, most in (("s", 6), ("z", 2)):
        names: list[str] = []
        for index in range(draw(st.integers(section == "s", most))):
            needs = tuple(draw(st.lists(st.sampled_from(names), max_size=3, unique=True))) if names else ()
            kind = draw(st.sampled_from(["plain", "plain", "plain", "fan", "fan", "approval"]))
            items = draw(st.lists(st.sampled_from([True] * 9 + [False]), max_size=4)) if kind == "fan" else None
            names.append(f"{section}{index}")
            found[names[-1]] = Sketch(
                needs, draw(st.sampled_from([None, None, None, True, False])), None if items is None else tuple(items),
                draw(st.integers(1, 3)) if items is not None and draw(st.booleans()) else None,
                draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.0, 5.0])), kind == "approval",
                section == "z", draw(st.booleans()),
            )  # fmt: skip
    return dict(draw(st.permutations(list(found.items()))))


def definition_of(steps: Mapping[str, Sketch], timeout_s: float | None) -> PipelineSpec:
    """The pipeline that is sketched."""
    found: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    for name, sketch in steps.items():
        entry: dict[str, Any] = {"needs": list(sketch.needs)}
        entry["retry"] = {"max_attempts": sketch.attempts, "initial_s": sketch.wait_s, "factor": 1, "jitter": 0}
        if sketch.when is not None:
            entry["when"] = f"${{{{ `{str(sketch.when).lower()}` }}}}"
        if sketch.approval:
            entry["approval"] = {}
        if sketch.items is not None:
            entry["foreach"] = ["text" if good else 5 for good in sketch.items]
            entry["with"] = {"x": "${{ length(item) }}"}  # which a number has not
            entry["max_parallel"] = sketch.width
        found[sketch.is_finally][name] = entry
    return spec_of(found[False], found[True], **({} if timeout_s is None else {"timeout_s": timeout_s}))


# -- random fates ----------------------------------------------------------------------------------


class Fate:
    """Lets things happen to a run until it is over, and compares it with the reference after each.

    Args:
        trouble: how often in a hundred rounds an owner dies.
    """

    def __init__(self, steps: Mapping[str, Sketch], timeout_s: float | None, seed: int, trouble: int) -> None:
        self.steps = steps
        self.random = Random(seed)
        self.trouble = trouble
        self.stop_odds = self.random.choice([0, 0, 2, 10])
        self.play = Play(definition_of(steps, timeout_s))
        self.reference = Reference(steps, timeout_s)
        self.asked: set[Node] = set()  # attempts that were told to stop
        self.late: list[tuple[Node, int]] = []

    def run(self) -> None:
        self.play.machine.begin(self.play.now)
        self.compare(self.tick())
        for _round in range(MAX_ROUNDS):
            if self.play.run.state.is_final:
                self.check_end()
                return
            self.happen()
        raise AssertionError("the run does not end")

    @property
    def now(self) -> float:
        return (self.play.now - NOW).total_seconds()

    def tick(self) -> Seen:
        seen = self.play.tick()
        self.asked |= set(seen.stop)
        return seen

    def compare(self, seen: Seen) -> None:
        """After a tick that is durable."""
        self.reference.settle(self.now, set(seen.start))
        assert set(seen.start) == self.reference.started
        assert len(seen.start) == len(set(seen.start))
        machine = {node: (str(row.state), row.attempt, row.failures, row.items) for node, row in
                   self.play.machine.nodes.items()}  # fmt: skip
        wanted = {}
        for node, cell in self.reference.cells.items():
            state = self.play.machine.nodes[node].state if cell.state in {"QUEUED", "RUNNING"} else cell.state
            assert state in {"QUEUED", "RUNNING"} or state == cell.state
            wanted[node] = (str(state), cell.attempt, cell.failures, cell.items)
        assert machine == wanted
        assert str(self.play.run.state) == self.reference.state
        self.check_wake(seen)
        self.check_restore(seen)

    def check_wake(self, seen: Seen) -> None:
        """It wants to be called at the next retry or at the timeout, and never at a time that is gone."""
        times = [cell.retry_at for cell in self.reference.cells.values() if cell.state == "PENDING" and cell.retry_at]
        times = [at for at in times if at > self.now]
        if self.reference.timeout_s is not None and self.reference.stopping is None:
            times += [self.reference.timeout_s] * (not self.reference.is_main_over())
        if self.reference.state == "RUNNING":
            assert seen.wake_at == (NOW + timedelta(seconds=min(times)) if times else None)

    def check_restore(self, seen: Seen) -> None:
        """A machine that is made of the durable rows is the same machine."""
        play = self.play
        if play.run.state.is_final or self.random.randrange(3):
            return
        twin = RunMachine(play.spec, play.ledger.snapshot())
        twin.begin(play.now)
        actions = twin.advance(play.now)
        assert (actions.start, actions.wake_at, twin.take_changes()) == ([], seen.wake_at, None)
        assert {node for node in self.asked if self.is_open(node)} == set(actions.stop)
        for row in play.machine.nodes.values():
            if row.state is State.PENDING and row.retry_at is None:
                twin.nodes[row.node].retry_at = None  # due, and not touched since
        assert same_state(play.machine, twin)
        if not self.random.randrange(2):
            play.machine = twin

    def happen(self) -> None:
        """One thing happens, or several at once."""
        backup = copy.deepcopy(self.reference)
        for _event in range(self.random.choice([1, 1, 1, 2, 4])):
            self.event()
        if self.random.randrange(100) >= self.trouble:
            self.compare(self.tick())
            return
        if self.random.randrange(2):  # the owner dies before the change is durable
            self.play.machine.advance(self.play.now)
            self.reference = backup
        else:  # or after, without acting on it
            self.compare(self.tick())
            self.asked -= self.asked  # which a new owner does again
        if not self.play.run.state.is_final:
            self.take_over()

    def take_over(self) -> None:
        play = self.play
        play.machine = RunMachine(play.spec, play.ledger.snapshot())
        play.machine.begin(play.now)
        for signal in play.ledger.signals:
            self.hear(signal.kind, signal.step)
            play.machine.signal(signal, play.now)
        for row, entry in list(play.machine.open_attempts()):
            if not self.steps[row.step].survives:
                assert play.machine.attempt_ended(row.node, entry.attempt, AttemptOutcome(L, error="gone"), play.now)
                self.reference.end(row.node, "LOST", self.now)
        self.compare(self.tick())

    def event(self) -> None:
        open_nodes = [row.node for row, _entry in self.play.machine.open_attempts()]
        durable = [node for node in open_nodes if self.is_open(node)]
        asking = [n for n, s in self.steps.items() if s.approval and self.play.ledger.state(n) is State.QUEUED]
        chance = self.random.randrange(100)
        if chance < self.stop_odds:
            self.say(SignalKind.CANCEL, "")
        elif asking and chance < 40:
            self.say(self.random.choice([SignalKind.APPROVE, SignalKind.REJECT]), self.random.choice(asking))
        elif chance < 45:
            self.say(SignalKind.APPROVE, self.random.choice(list(self.steps)))
        elif chance < 50 and self.late:
            node, attempt = self.random.choice(self.late)
            if self.play.machine.nodes[node].attempt != attempt:
                assert not self.play.machine.attempt_ended(node, attempt, AttemptOutcome(S, stored(0)), self.play.now)
        elif chance < 60 and durable:
            node = self.random.choice(durable)
            attempt = self.play.machine.nodes[node].attempt
            self.play.machine.attempt_started(node, attempt, self.play.now, "node")
        elif durable and chance < 95:
            self.end(self.random.choice(durable))
        else:
            self.play.now += timedelta(seconds=self.random.choice([0.5, 1, 5, 20]))

    def end(self, node: Node) -> None:
        attempt = self.play.machine.nodes[node].attempt
        odds = [C, C, C, S, F, L] if node in self.asked else [S, S, S, S, F, F, L]
        state = self.random.choice([*odds, C] if not self.random.randrange(20) else odds)
        outcome = AttemptOutcome(state, stored(1) if state is S else None, None if state is S else f"{state}")
        assert self.play.machine.attempt_ended(node, attempt, outcome, self.play.now)
        assert not self.play.machine.attempt_ended(node, attempt, outcome, self.play.now)
        self.reference.end(node, str(state), self.now)
        self.late.append((node, attempt))

    def say(self, kind: SignalKind, step: str) -> None:
        """Durable at once, and heard."""
        from_play = self.play.hear(kind, step)
        self.hear(from_play.kind, from_play.step)

    def hear(self, kind: SignalKind, step: str) -> None:
        if kind is SignalKind.CANCEL:
            self.reference.stop("CANCELLED")
        else:
            self.reference.decide(step, kind is SignalKind.APPROVE)

    def is_open(self, node: Node) -> bool:
        """Whether the node has a durable attempt under way."""
        row = self.play.machine.nodes.get(node)
        entry = None if row is None else self.play.ledger.attempts.get((*node, row.attempt))
        return entry is not None and entry.state in OPEN

    def check_end(self) -> None:
        ledger = self.play.ledger
        for name, step in self.play.spec.all_steps.items():
            count = ledger.step_runs[name, WHOLE_STEP].items or 0
            for item in range(-1, count):
                row = ledger.step_runs[name, item]
                states = [entry.state for entry in ledger.of(row.node)]
                assert row.state.is_final
                assert [entry.attempt for entry in ledger.of(row.node)] == list(range(1, row.attempt + 1))
                assert not OPEN & set(states)
                assert (states.count(S) == 1) == (row.state is State.SUCCEEDED and bool(states))
                assert row.failures <= step.retry.max_attempts
        assert set(ledger.attempts) <= set(self.play.requests)


@settings(deadline=None, max_examples=300)
@given(sketches(), st.sampled_from([None, None, 30.0]), st.integers(0, 2**32))
def test_the_machine_does_what_the_reference_does(steps: dict[str, Sketch], timeout_s: float | None, seed: int) -> None:
    Fate(steps, timeout_s, seed, trouble=0).run()


@settings(deadline=None, max_examples=300)
@given(sketches(), st.sampled_from([None, None, 30.0]), st.integers(0, 2**32))
def test_no_crash_breaks_a_rule(steps: dict[str, Sketch], timeout_s: float | None, seed: int) -> None:
    Fate(steps, timeout_s, seed, trouble=15).run()


# -- large runs ------------------------------------------------------------------------------------


class Counting(RunMachine):
    """Counts the steps that it looks at."""

    examined = 0

    def _examine(self, *args: Any) -> None:
        self.examined += 1
        super()._examine(*args)


def calls_of(work: Callable[[], object]) -> int:
    """Functions that were called meanwhile, whether Python's or C's: a measure of work that no load changes."""
    count = 0

    def see(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


WIDE = {f"s{index}": {"needs": [] if index == 0 else ["s0"]} for index in range(10_000)}
DEEP = {f"s{index}": {"needs": [f"s{index - 1}"] if index else []} for index in range(10_000)}
#: Twenty layers of 500, each a fan-in to one step that the next layer needs.
LAYERS = {
    f"s{index}": {"needs": [f"s{number}" for number in range(index - 499, index)] if index % 500 == 499
                  else [f"s{index // 500 * 500 - 1}"] if index >= 500 else []}
    for index in range(10_000)
}  # fmt: skip
FAN = {"s0": {"foreach": "${{ params.items }}", "max_parallel": 100}}


def new_machine(spec: PipelineSpec, params: Mapping[str, Any]) -> Counting:
    ledger = Ledger(spec, Play(spec, params).run)
    machine = Counting(spec, RunSnapshot(ledger.run, {}))
    machine.begin(NOW)
    return machine


def started_by(machine: RunMachine) -> list[Node]:
    """What ``advance`` starts, in as many rounds as it takes. No round takes long."""
    found: list[Node] = []
    while True:
        actions = machine.advance(NOW)
        assert len(actions.start) <= MAX_STARTS
        found += [request.node for request in actions.start]
        if actions.wake_at != NOW:
            return found


@pytest.mark.parametrize(
    ("steps", "attempts"), [(WIDE, 10_000), (DEEP, 10_000), (LAYERS, 10_000), (FAN, 10_000)],
    ids=["wide", "deep", "layers", "fan-out"],
)  # fmt: skip
def test_a_tick_costs_what_happened_and_not_what_there_is(steps: dict[str, Any], attempts: int) -> None:
    parameters = {"items": {"type": "str", "default": ""}}
    machine = new_machine(spec_of(steps, parameters=parameters), {"items": list(range(10_000))})
    started_by(machine)
    machine.examined = 0
    open_attempts = [row.node for row, _entry in machine.open_attempts()]
    ended, worst = 0, 0.0
    while open_attempts:
        node = open_attempts.pop()
        assert machine.attempt_ended(node, 1, AttemptOutcome(S, stored(1)), NOW)
        before = machine.examined
        started = started_by(machine)
        happened = 1 + len(started)
        worst = max(worst, (machine.examined - before) / happened)
        open_attempts += started
        ended += 1
    assert machine.run.state is State.SUCCEEDED
    assert ended == attempts
    assert worst <= 2


@pytest.mark.parametrize("size", [100, 3_000])
def test_the_work_of_a_tick_does_not_grow_with_the_run(size: int) -> None:
    steps: dict[str, Any] = {f"s{index}": {} for index in range(size)}
    steps |= {"last": {"needs": [f"s{index}" for index in range(size)]}}
    machine = new_machine(spec_of(steps | {"f": {"foreach": list(range(size))}}), {})
    started_by(machine)
    machine.take_changes()

    def tick(node: Node, state: AttemptState) -> None:
        machine.attempt_ended(node, machine.nodes[node].attempt, AttemptOutcome(state, stored(1)), NOW)
        machine.advance(NOW)
        machine.take_changes()

    assert calls_of(lambda: tick(("s5", WHOLE_STEP), S)) <= 100
    assert calls_of(lambda: tick(("s6", WHOLE_STEP), L)) <= 200
    assert calls_of(lambda: tick(("f", 7), S)) <= 100
    assert calls_of(lambda: tick(("f", 8), L)) <= 200
    assert calls_of(lambda: machine.advance(NOW)) <= 30


def test_all_to_all_joins_cost_each_edge_once() -> None:
    layers, width = 8, 60
    steps = {
        f"s{layer}_{index}": {"needs": [f"s{layer - 1}_{number}" for number in range(width)] if layer else []}
        for layer in range(layers)
        for index in range(width)
    }
    machine = new_machine(spec_of(steps), {})
    started = [request.node for request in machine.advance(NOW).start]
    machine.examined = 0

    def play() -> None:
        while started:
            assert machine.attempt_ended(started.pop(), 1, AttemptOutcome(S, stored(1)), NOW)
            started.extend(request.node for request in machine.advance(NOW).start)

    calls = calls_of(play)
    edges, nodes = (layers - 1) * width**2, layers * width
    assert machine.run.state is State.SUCCEEDED
    assert machine.examined == nodes - width
    assert calls <= 3 * edges + 200 * nodes


def test_a_restored_large_run_starts_nothing_twice() -> None:
    spec = spec_of(WIDE)
    play = Play(spec)
    play.begin()
    play.end("s0")
    while play.tick().start:
        pass
    for index in range(1, 10_000, 2):
        play.end(f"s{index}")
    play.tick()
    twin = RunMachine(spec, play.ledger.snapshot())
    assert twin.advance(play.now).start == []
    assert len(list(twin.open_attempts())) == 4_999
    assert play.run.run_id == RUN
