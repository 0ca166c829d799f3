"""What the planner decides, by example and for random graphs and outcomes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines.model import WHOLE_STEP, AttemptOutcome, AttemptState, Node, State, StepRun
from mlplat.pipelines.planner import (
    MAX_LOST,
    Decision,
    Expand,
    Finish,
    Settle,
    Start,
    StepRules,
    Wait,
    plan,
    settle_attempt,
)
from mlplat.pipelines.spec import Retry

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NO_WAIT = Retry(max_attempts=1, initial_s=0)
OK = AttemptOutcome(AttemptState.SUCCEEDED, output={"kind": "json", "value": 1})
FAILED = AttemptOutcome(AttemptState.FAILED, error="boom\n\ntraceback")
LOST = AttemptOutcome(AttemptState.LOST, error="gone")


def rules_of(**needs: str) -> dict[str, StepRules]:
    """Plain steps; ``needs`` are names with spaces between."""
    return {name: StepRules(frozenset(text.split()), False, NO_WAIT) for name, text in needs.items()}


def nodes_of(**states: State) -> dict[Node, StepRun]:
    return {(name, WHOLE_STEP): StepRun(name, WHOLE_STEP, state) for name, state in states.items()}


def fan_out(*states: State, items: int | None = None) -> tuple[dict[str, StepRules], dict[Node, StepRun]]:
    """An expanded fan-out ``f`` with items in these states."""
    nodes = {("f", WHOLE_STEP): StepRun("f", WHOLE_STEP, State.RUNNING, items=len(states) if items is None else items)}
    for index, state in enumerate(states):
        nodes["f", index] = StepRun("f", index, state, error="boom" if state is State.FAILED else None)
    return {"f": StepRules(frozenset(), True, NO_WAIT)}, nodes


def test_steps_without_needs_start_together_in_the_order_of_the_definition() -> None:
    nodes = nodes_of(b=State.PENDING, a=State.PENDING)
    assert plan(NOW, rules_of(b="", a=""), nodes) == [Start(("b", -1)), Start(("a", -1))]


def test_a_step_waits_until_all_its_needs_succeeded() -> None:
    rules = rules_of(a="", b="", c="a b")
    assert plan(NOW, rules, nodes_of(a=State.SUCCEEDED, b=State.RUNNING, c=State.PENDING)) == []
    assert plan(NOW, rules, nodes_of(a=State.SUCCEEDED, b=State.SUCCEEDED, c=State.PENDING)) == [Start(("c", -1))]


@pytest.mark.parametrize("state", [State.FAILED, State.SKIPPED, State.CANCELLED])
def test_a_step_is_skipped_when_a_need_did_not_succeed(state: State) -> None:
    nodes = nodes_of(a=state, b=State.PENDING, c=State.PENDING)
    assert plan(NOW, rules_of(a="", b="", c="a b"), nodes) == [
        Start(("b", -1)),
        Settle(("c", -1), State.SKIPPED, "a did not succeed"),
    ]


def test_independent_steps_go_on_after_a_failure() -> None:
    nodes = nodes_of(a=State.FAILED, b=State.SUCCEEDED, c=State.PENDING)
    assert plan(NOW, rules_of(a="", b="", c="b"), nodes) == [Start(("c", -1))]


def test_the_run_succeeds_when_every_step_did() -> None:
    assert plan(NOW, rules_of(a="", b="a"), nodes_of(a=State.SUCCEEDED, b=State.SUCCEEDED)) == [Finish(State.SUCCEEDED)]


def test_the_run_fails_with_the_first_line_of_the_first_failed_step() -> None:
    nodes = nodes_of(a=State.SUCCEEDED, b=State.FAILED, c=State.SKIPPED)
    nodes["b", -1].error = "ValueError: no\n\nTraceback"
    assert plan(NOW, rules_of(a="", b="", c="b"), nodes) == [Finish(State.FAILED, "step 'b' failed: ValueError: no")]


def test_a_failed_step_without_an_error_still_ends_the_run() -> None:
    assert plan(NOW, rules_of(a=""), nodes_of(a=State.FAILED)) == [Finish(State.FAILED, "step 'a' failed: failed")]


def test_the_run_is_not_over_while_a_step_runs() -> None:
    assert plan(NOW, rules_of(a="", b=""), nodes_of(a=State.FAILED, b=State.RUNNING)) == []


def test_a_retry_waits_for_its_time_and_starts_on_it() -> None:
    nodes = nodes_of(a=State.PENDING)
    nodes["a", -1].retry_at = NOW + timedelta(seconds=5)
    assert plan(NOW, rules_of(a=""), nodes) == [Wait(NOW + timedelta(seconds=5))]
    assert plan(NOW + timedelta(seconds=5), rules_of(a=""), nodes) == [Start(("a", -1))]


def test_there_is_one_wait_for_the_earliest_retry_and_it_comes_last() -> None:
    nodes = nodes_of(a=State.PENDING, b=State.PENDING, c=State.PENDING)
    nodes["a", -1].retry_at = NOW + timedelta(seconds=9)
    nodes["b", -1].retry_at = NOW + timedelta(seconds=3)
    assert plan(NOW, rules_of(a="", b="", c=""), nodes) == [Start(("c", -1)), Wait(NOW + timedelta(seconds=3))]


def test_a_fan_out_is_expanded_before_anything_of_it_starts() -> None:
    rules = {"f": StepRules(frozenset(), True, NO_WAIT)}
    assert plan(NOW, rules, nodes_of(f=State.PENDING)) == [Expand("f")]


def test_a_fan_out_is_not_expanded_before_its_needs_succeeded() -> None:
    rules = rules_of(a="") | {"f": StepRules(frozenset({"a"}), True, NO_WAIT)}
    assert plan(NOW, rules, nodes_of(a=State.RUNNING, f=State.PENDING)) == []


def test_items_start_in_order() -> None:
    rules, nodes = fan_out(State.PENDING, State.PENDING, State.PENDING)
    assert plan(NOW, rules, nodes) == [Start(("f", 0)), Start(("f", 1)), Start(("f", 2))]


def test_an_empty_fan_out_succeeds_at_once() -> None:
    rules, nodes = fan_out()
    assert plan(NOW, rules, nodes) == [Settle(("f", -1), State.SUCCEEDED)]


def test_a_fan_out_succeeds_when_all_its_items_did() -> None:
    rules, nodes = fan_out(State.SUCCEEDED, State.RUNNING)
    assert plan(NOW, rules, nodes) == []
    nodes["f", 1].state = State.SUCCEEDED
    assert plan(NOW, rules, nodes) == [Settle(("f", -1), State.SUCCEEDED)]


def test_after_a_failed_item_the_waiting_ones_are_skipped_and_the_running_ones_awaited() -> None:
    rules, nodes = fan_out(State.RUNNING, State.FAILED, State.PENDING)
    assert plan(NOW, rules, nodes) == [Settle(("f", 2), State.SKIPPED, "f[1] failed")]
    nodes["f", 2].state = State.SKIPPED
    assert plan(NOW, rules, nodes) == []
    nodes["f", 0].state = State.SUCCEEDED
    assert plan(NOW, rules, nodes) == [Settle(("f", -1), State.FAILED, "item 1: boom")]


def test_a_failed_attempt_is_tried_again_after_its_backoff() -> None:
    row = StepRun("a", -1, State.RUNNING, attempt=1)
    settle_attempt(NOW, "run", row, FAILED, Retry(max_attempts=2, initial_s=4, jitter=0))
    assert (row.state, row.failures, row.retry_at) == (State.PENDING, 1, NOW + timedelta(seconds=4))
    assert row.error == "boom\n\ntraceback"
    assert row.finished_at is None


def test_the_last_failure_is_final() -> None:
    row = StepRun("a", -1, State.RUNNING, attempt=2, failures=1)
    settle_attempt(NOW, "run", row, FAILED, Retry(max_attempts=2))
    assert (row.state, row.failures, row.finished_at) == (State.FAILED, 2, NOW)


def test_a_success_keeps_the_output_and_forgets_the_error() -> None:
    row = StepRun("a", -1, State.RUNNING, attempt=2, failures=1, error="boom")
    settle_attempt(NOW, "run", row, OK, NO_WAIT)
    assert (row.state, row.output, row.error, row.finished_at) == (State.SUCCEEDED, OK.output, None, NOW)


def test_a_lost_attempt_does_not_count_against_the_retries() -> None:
    row = StepRun("a", -1, State.RUNNING, attempt=1)
    settle_attempt(NOW, "run", row, LOST, NO_WAIT)
    assert (row.state, row.failures, row.retry_at) == (State.PENDING, 0, NOW)


def test_losing_attempts_without_end_counts_in_the_end() -> None:
    row = StepRun("a", -1, State.PENDING)
    while row.state is State.PENDING:
        row.state, row.attempt = State.RUNNING, row.attempt + 1
        settle_attempt(NOW, "run", row, LOST, NO_WAIT)
    assert (row.state, row.attempt, row.failures) == (State.FAILED, MAX_LOST + 1, 1)


def test_only_a_running_node_can_be_settled() -> None:
    with pytest.raises(AssertionError):
        settle_attempt(NOW, "run", StepRun("a", -1, State.PENDING), OK, NO_WAIT)


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, StepRules]:
    """Steps s0, s1, …, each of which needs some that come before it, in a shuffled order."""
    count = draw(st.integers(1, 7))
    rules: dict[str, StepRules] = {}
    for index in range(count):
        earlier = [f"s{number}" for number in range(index)]
        needs = frozenset(draw(st.lists(st.sampled_from(earlier), max_size=3))) if earlier else frozenset[str]()
        retry = Retry(max_attempts=draw(st.integers(1, 3)), initial_s=draw(st.sampled_from([0.0, 1.0])))
        rules[f"s{index}"] = StepRules(needs, draw(st.booleans()), retry)
    return dict(draw(st.permutations(list(rules.items()))))


class Simulation:
    """Runs plans to the end, with outcomes that a test draws, and checks every rule on the way."""

    def __init__(self, rules: Mapping[str, StepRules]) -> None:
        self.rules = rules
        self.nodes = {(name, WHOLE_STEP): StepRun(name, WHOLE_STEP, State.PENDING) for name in rules}
        self.now = NOW
        self.outcomes: dict[Node, list[AttemptState]] = {}

    def run(self, data: st.DataObject) -> Finish:
        for _round in range(2_000):
            decisions = self._plan()
            waits = [decision for decision in decisions if isinstance(decision, Wait)]
            assert len(waits) <= 1
            for decision in decisions:
                if isinstance(decision, Finish):
                    assert decisions == [decision]
                    return decision
                self._apply(decision, data)
            running = sorted(node for node, row in self.nodes.items() if self._is_attempt(row))
            if running and (decisions in ([], waits) or data.draw(st.booleans())):
                self._settle(data.draw(st.sampled_from(running)), data)
            elif decisions == waits:
                assert waits, f"stuck: {self.nodes}"
                assert waits[0].until > self.now
                self.now = waits[0].until
        raise AssertionError("the run does not end")

    def _plan(self) -> list[Decision]:
        before = copy.deepcopy(self.nodes)
        decisions = plan(self.now, self.rules, self.nodes)
        assert plan(self.now, self.rules, self.nodes) == decisions
        assert self.nodes == before
        return decisions

    def _is_attempt(self, row: StepRun) -> bool:
        return row.state is State.RUNNING and not (row.item == WHOLE_STEP and self.rules[row.step].is_fan_out)

    def _apply(self, decision: Decision, data: st.DataObject) -> None:
        match decision:
            case Start((step, item)):
                row = self.nodes[step, item]
                assert row.state is State.PENDING
                assert row.retry_at is None or row.retry_at <= self.now
                self._require_needs(step)
                row.state, row.attempt, row.retry_at = State.RUNNING, row.attempt + 1, None
            case Expand(step):
                self._require_needs(step)
                row = self.nodes[step, WHOLE_STEP]
                assert row.items is None
                row.state, row.items = State.RUNNING, data.draw(st.integers(0, 3))
                for item in range(row.items):
                    self.nodes[step, item] = StepRun(step, item, State.PENDING)
            case Settle(node, state, error):
                row = self.nodes[node]
                assert not row.state.is_final
                row.state, row.error = state, error

    def _require_needs(self, step: str) -> None:
        for need in self.rules[step].needs:
            assert self.nodes[need, WHOLE_STEP].state is State.SUCCEEDED

    def _settle(self, node: Node, data: st.DataObject) -> None:
        state = data.draw(st.sampled_from([AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST]))
        self.outcomes.setdefault(node, []).append(state)
        settle_attempt(
            self.now, "run", self.nodes[node], AttemptOutcome(state, None, "boom"), self.rules[node[0]].retry
        )


@settings(deadline=None, max_examples=150)
@given(graphs(), st.data())
def test_every_run_ends_and_obeys_the_rules(rules: dict[str, StepRules], data: st.DataObject) -> None:
    simulation = Simulation(rules)
    end = simulation.run(data)
    whole = {step: simulation.nodes[step, WHOLE_STEP] for step in rules}
    assert all(row.state.is_final for row in simulation.nodes.values())
    failed = [step for step in rules if whole[step].state is State.FAILED]
    assert end.state is (State.FAILED if failed else State.SUCCEEDED)
    for step, rule in rules.items():
        blocked = any(whole[need].state is not State.SUCCEEDED for need in rule.needs)
        assert (whole[step].state is State.SKIPPED) == blocked
    for node, row in simulation.nodes.items():
        outcomes = simulation.outcomes.get(node, [])
        assert row.attempt == len(outcomes)
        assert row.failures == outcomes.count(AttemptState.FAILED) <= rules[node[0]].retry.max_attempts
        assert AttemptState.SUCCEEDED not in outcomes[:-1]
        if outcomes:
            assert (row.state is State.SUCCEEDED) == (outcomes[-1] is AttemptState.SUCCEEDED)
        elif node[1] != WHOLE_STEP:
            assert row.state is State.SKIPPED
            assert whole[node[0]].state is State.FAILED
