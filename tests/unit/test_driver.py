"""Runs driven to their end: by example, and for random pipelines, outcomes, crashes and take-overs."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import Fenced
from mlplat.pipelines.driver import MAX_ITEMS, RunDriver
from mlplat.pipelines.model import (
    WHOLE_STEP,
    Attempt,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    Node,
    PipelineRun,
    RunSnapshot,
    State,
    StepRun,
)
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.transitions import Transition

RUN = "run1"
S, F, L = AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST


class Crash(Exception):
    """The driver's process dies here."""


@dataclass(frozen=True)
class Trouble:
    """What happens at one commit: the process dies "before" or "after" it is durable, or a "takeover" follows it."""

    kind: str


class Rows:
    """What was committed. Checks on every commit that no rule was broken."""

    def __init__(self, spec: PipelineSpec, params: Mapping[str, Any], trouble: Mapping[int, Trouble]) -> None:
        self.spec = spec
        self.epoch = 0
        self.run = PipelineRun(
            RUN, spec.name, spec.digest, dict(params), State.QUEUED, None, None, 0, "", _now(), None, None
        )
        self.step_runs = {(name, WHOLE_STEP): StepRun(name, WHOLE_STEP, State.PENDING) for name in spec.steps}
        self.attempts: dict[tuple[str, int, int], Attempt] = {}
        self.taken_over = asyncio.Event()
        self._trouble = dict(trouble)
        self._commits = 0

    def snapshot(self) -> RunSnapshot:
        rows = sorted(self.step_runs.values(), key=lambda row: row.node)
        return RunSnapshot(
            copy.copy(self.run), self.spec.to_json(), copy.deepcopy(rows), copy.deepcopy(list(self.attempts.values()))
        )

    async def commit(self, transition: Transition) -> None:
        await asyncio.sleep(0)
        if transition.epoch != self.epoch:
            raise Fenced("the epoch is over")
        self._commits += 1
        trouble = self._trouble.get(self._commits)
        if trouble is not None and trouble.kind == "before":
            raise Crash
        self._store(transition)
        if trouble is not None and trouble.kind == "after":
            raise Crash
        if trouble is not None and trouble.kind == "takeover":
            self.epoch += 1
            self.taken_over.set()

    def _store(self, transition: Transition) -> None:
        assert not self.run.state.is_final, "a run that is over changes no more"
        for row in {row.node: row for row in transition.step_runs}.values():
            known = self.step_runs.get(row.node)
            assert known is None or not known.state.is_final, f"{row.node} was final"
            self.step_runs[row.node] = copy.deepcopy(row)
        for attempt in transition.attempts:
            key = (attempt.step, attempt.item, attempt.attempt)
            known_attempt = self.attempts.get(key)
            assert known_attempt is None or known_attempt.state is AttemptState.RUNNING, f"{key} was over"
            if known_attempt is None:
                assert attempt.state is AttemptState.RUNNING
                self._check_start(attempt)
            self.attempts[key] = copy.deepcopy(attempt)
        if transition.run is not None:
            self.run.state, self.run.error = transition.run.state, transition.run.error

    def _check_start(self, attempt: Attempt) -> None:
        """The next number, alone, and not before the step's needs succeeded."""
        earlier = self.of((attempt.step, attempt.item))
        assert [entry.attempt for entry in earlier] == list(range(1, attempt.attempt))
        assert all(entry.state in {F, L} for entry in earlier)
        for need in self.spec.steps[attempt.step].needs:
            assert self.step_runs[need, WHOLE_STEP].state is State.SUCCEEDED

    def of(self, node: Node) -> list[Attempt]:
        """The attempts of a node, by number."""
        found = [entry for entry in self.attempts.values() if (entry.step, entry.item) == node]
        return sorted(found, key=lambda entry: entry.attempt)

    def state(self, step: str, item: int = WHOLE_STEP) -> State:
        return self.step_runs[step, item].state

    def error(self, step: str, item: int = WHOLE_STEP) -> str:
        return self.step_runs[step, item].error or ""


class Workers:
    """Fake attempts: outcomes by node, and values from the arguments; a success when nothing else is said."""

    def __init__(
        self,
        rows: Rows,
        outcomes: Mapping[Node, list[AttemptState]] | None = None,
        compute: Callable[[AttemptRequest], Any] = lambda request: request.attempt,
        turns: Callable[[AttemptRequest], int] = lambda request: 0,
    ) -> None:
        self._rows = rows
        self._outcomes = outcomes or {}
        self._compute = compute
        self._turns = turns
        self.requests: list[AttemptRequest] = []
        self.lost: list[str] = []

    async def launch(self, request: AttemptRequest) -> AttemptOutcome:
        assert (request.step, request.item, request.attempt) in self._rows.attempts, "launched before it was committed"
        self.requests.append(request)
        for _turn in range(self._turns(request)):
            await asyncio.sleep(0)
        script = self._outcomes.get((request.step, request.item), [])
        state = script[request.attempt - 1] if request.attempt <= len(script) else S
        if state is S:
            return AttemptOutcome(S, {"kind": "json", "value": self._compute(request)})
        return AttemptOutcome(state, error=f"{state} {request.attempt}")

    async def on_lost(self, label: str) -> None:
        self.lost.append(label)

    def values(self, step: str) -> list[Mapping[str, Any]]:
        """The arguments of a step's attempts, as they were launched."""
        return [request.arguments for request in self.requests if request.step == step]


def _now() -> datetime:
    return datetime.now(UTC)


def spec_of(steps: Mapping[str, Any], **parameters: Any) -> PipelineSpec:
    """A pipeline whose steps retry at once; ``attempts`` in a step is its ``max_attempts``."""
    document: dict[str, Any] = {"name": "p", "parameters": parameters, "steps": {}}
    for name, step in steps.items():
        entry = {key: value for key, value in step.items() if key != "attempts"}
        retry = {"max_attempts": step.get("attempts", 1), "initial_s": 0}
        document["steps"][name] = {"uses": "m:f", "retry": retry} | entry
    return PipelineSpec.model_validate(document)


async def drive(rows: Rows, workers: Workers) -> State:
    """Drives under ever higher epochs until an owner brings the run to its end."""
    tasks: list[asyncio.Task[State]] = []
    try:
        for _owner in range(100):
            rows.epoch += 1
            rows.taken_over.clear()
            driver = RunDriver(rows.snapshot(), rows.epoch, workers.launch, rows.commit, workers.on_lost)
            tasks.append(asyncio.create_task(driver.drive()))
            taken_over = asyncio.create_task(rows.taken_over.wait())
            await asyncio.wait([tasks[-1], taken_over], return_when=asyncio.FIRST_COMPLETED)
            taken_over.cancel()
            if rows.run.state.is_final:
                break
            if tasks[-1].done():
                assert isinstance(tasks[-1].exception(), Fenced if rows.taken_over.is_set() else Crash)
    finally:
        results = await asyncio.gather(*tasks, return_exceptions=True)
    strange = [result for result in results if not isinstance(result, State | Crash | Fenced)]
    assert not strange, strange
    assert rows.run.state.is_final
    return rows.run.state


async def run(
    steps: Mapping[str, Any],
    outcomes: Mapping[Node, list[AttemptState]] | None = None,
    compute: Callable[[AttemptRequest], Any] = lambda request: request.attempt,
) -> tuple[Rows, Workers]:
    """A run without trouble."""
    rows = Rows(spec_of(steps), {}, {})
    workers = Workers(rows, outcomes, compute)
    await drive(rows, workers)
    return rows, workers


def echo(request: AttemptRequest) -> Any:
    return request.arguments.get("x")


async def test_a_chain_runs_in_order_and_passes_outputs_on() -> None:
    steps = {
        "b": {"with": {"x": "${{ steps.a.output.n }}"}},
        "a": {"with": {"x": {"n": 7}}},
        "c": {"with": {"text": "b gave ${{ steps.b.output }}"}},
    }
    rows, workers = await run(steps, compute=echo)
    assert rows.run.state is State.SUCCEEDED
    assert [request.step for request in workers.requests] == ["a", "b", "c"]
    assert workers.values("c") == [{"text": "b gave 7"}]


async def test_a_request_carries_everything_a_worker_needs() -> None:
    resources = {"cpus": 2.5, "gpus": 1, "memory_mb": 64}
    rows = Rows(spec_of({"a": {"with": {"x": "${{ params.n }}"}, "attempts": 3, "resources": resources}}), {"n": 4}, {})
    workers = Workers(rows)
    await drive(rows, workers)
    assert workers.requests == [AttemptRequest("p", RUN, "a", -1, 1, "m:f", {"x": 4}, 3, 2.5, 1.0, 64)]
    assert workers.requests[0].label == "run1/a/-1/1"


async def test_a_failure_is_retried_and_the_run_succeeds() -> None:
    rows, _workers = await run({"a": {"attempts": 3}}, {("a", -1): [F, F]})
    assert rows.run.state is State.SUCCEEDED
    assert [entry.state for entry in rows.of(("a", -1))] == [F, F, S]
    assert rows.step_runs["a", -1].failures == 2
    assert rows.step_runs["a", -1].error is None


async def test_used_up_attempts_fail_the_run_and_skip_what_needs_the_step() -> None:
    steps = {"a": {"attempts": 2}, "b": {"needs": ["a"]}, "c": {"needs": ["b"]}, "d": {}}
    rows, workers = await run(steps, {("a", -1): [F, F, F]})
    assert rows.run.state is State.FAILED
    assert rows.run.error == "step 'a' failed: FAILED 2"
    assert [rows.state(step) for step in "abcd"] == [State.FAILED, State.SKIPPED, State.SKIPPED, State.SUCCEEDED]
    assert (rows.error("b"), rows.error("c")) == ("a did not succeed", "b did not succeed")
    assert [request.label for request in workers.requests] == ["run1/a/-1/1", "run1/d/-1/1", "run1/a/-1/2"]


async def test_a_lost_attempt_is_reported_and_replaced_for_free() -> None:
    rows, workers = await run({"a": {"attempts": 1}}, {("a", -1): [L, L]})
    assert rows.run.state is State.SUCCEEDED
    assert [entry.state for entry in rows.of(("a", -1))] == [L, L, S]
    assert rows.step_runs["a", -1].failures == 0
    assert workers.lost == ["run1/a/-1/1", "run1/a/-1/2"]


async def test_a_fan_out_starts_in_order_and_lists_outputs_in_order() -> None:
    steps = {
        "f": {"foreach": ["c", "a", "b"], "with": {"x": "${{ item }}"}},
        "after": {"with": {"x": "${{ steps.f.output }}"}},
    }
    rows = Rows(spec_of(steps), {}, {})
    # The first item ends last.
    workers = Workers(rows, compute=echo, turns=lambda request: 20 - 5 * request.item)
    assert await drive(rows, workers) is State.SUCCEEDED
    assert [request.item for request in workers.requests] == [0, 1, 2, WHOLE_STEP]
    assert workers.values("after") == [{"x": ["c", "a", "b"]}]
    assert rows.step_runs["f", -1].items == 3


async def test_a_fan_out_over_nothing_succeeds_with_an_empty_list() -> None:
    steps = {
        "load": {"with": {"x": []}},
        "f": {"foreach": "${{ steps.load.output }}"},
        "after": {"with": {"x": "${{ steps.f.output }}"}},
    }
    rows, workers = await run(steps, compute=echo)
    assert rows.run.state is State.SUCCEEDED
    assert workers.values("f") == []
    assert workers.values("after") == [{"x": []}]


async def test_one_failed_item_fails_the_fan_out_and_skips_what_needs_it() -> None:
    steps = {"f": {"foreach": [1, 2, 3], "attempts": 2}, "after": {"needs": ["f"]}}
    rows, _workers = await run(steps, {("f", 1): [F, F]})
    assert rows.run.state is State.FAILED
    assert rows.state("f") is State.FAILED
    assert rows.error("f") == "item 1: FAILED 2"
    assert [rows.state("f", item) for item in range(3)] == [State.SUCCEEDED, State.FAILED, State.SUCCEEDED]
    assert rows.state("after") is State.SKIPPED


async def test_items_that_wait_for_a_retry_are_skipped_once_another_failed() -> None:
    steps = {"f": {"foreach": [1, 2], "attempts": 2, "retry": {"max_attempts": 2, "initial_s": 3600}}}
    rows = Rows(spec_of(steps), {}, {})
    rows.step_runs["f", -1] = StepRun("f", -1, State.RUNNING, items=2)
    rows.step_runs["f", 0] = StepRun("f", 0, State.PENDING, attempt=1, failures=1)
    rows.attempts["f", 0, 1] = Attempt("f", 0, 1, F, _now(), _now())
    rows.step_runs["f", 1] = StepRun("f", 1, State.PENDING)
    # Item 0 fails for good while item 1 waits for an hour; nobody sits that hour out.
    await drive(rows, Workers(rows, {("f", 0): [F, F], ("f", 1): [F]}))
    assert [rows.state("f", item) for item in range(2)] == [State.FAILED, State.SKIPPED]
    assert rows.error("f", 1) == "f[0] failed"


@pytest.mark.parametrize(
    ("value", "type_name"), [({"a": 1}, "dict"), ("abc", "str"), (3, "int"), (None, "NoneType"), (True, "bool")]
)
async def test_a_foreach_that_gives_no_list_fails_the_step(value: Any, type_name: str) -> None:
    steps = {
        "load": {"with": {"x": value}},
        "f": {"foreach": "${{ steps.load.output }}"},
        "after": {"with": {"x": "${{ steps.f.output }}"}},
    }
    rows, _workers = await run(steps, compute=echo)
    assert rows.run.state is State.FAILED
    assert rows.error("f") == f"foreach must give a list, not {type_name}"
    assert rows.state("after") is State.SKIPPED


async def test_a_foreach_with_too_many_items_fails_the_step() -> None:
    steps = {"load": {"with": {"x": [0] * (MAX_ITEMS + 1)}}, "f": {"foreach": "${{ steps.load.output }}"}}
    rows, _workers = await run(steps, compute=echo)
    assert rows.error("f") == f"foreach gave {MAX_ITEMS + 1} items, at most {MAX_ITEMS} are allowed"


async def test_an_expression_that_fails_at_run_time_fails_the_step_without_an_attempt() -> None:
    steps = {"a": {"attempts": 3}, "b": {"with": {"x": "${{ length(steps.a.output) }}"}, "attempts": 3}}
    rows, workers = await run(steps)
    assert rows.run.state is State.FAILED
    assert rows.state("b") is State.FAILED
    assert "length(steps.a.output)" in rows.error("b")
    assert rows.of(("b", -1)) == []
    assert workers.values("b") == []


async def test_an_expression_that_fails_for_one_item_fails_the_fan_out() -> None:
    steps = {"f": {"foreach": [["ok"], 5], "with": {"x": "${{ length(item) }}"}}}
    rows, _workers = await run(steps, compute=echo)
    assert rows.state("f", 1) is State.FAILED
    assert rows.error("f").startswith("item 1: expression 'length(item)' failed")


async def test_a_retry_waits_until_its_time() -> None:
    wait = 0.05
    retry = {"max_attempts": 2, "initial_s": wait, "jitter": 0}
    rows, _workers = await run({"a": {"retry": retry}}, {("a", -1): [F]})
    first, second = rows.of(("a", -1))
    assert first.finished_at is not None
    assert (second.started_at - first.finished_at).total_seconds() >= wait * 0.99


async def test_a_retry_that_waits_does_not_hold_others_up() -> None:
    rows = Rows(spec_of({"a": {"retry": {"max_attempts": 2, "initial_s": 0.05, "jitter": 0}}, "b": {}}), {}, {})
    workers = Workers(rows, {("a", -1): [F]}, turns=lambda request: 5 if request.step == "b" else 0)
    await drive(rows, workers)
    end_of_b = rows.of(("b", -1))[0].finished_at
    assert end_of_b is not None
    assert end_of_b < rows.of(("a", -1))[1].started_at


async def test_a_new_owner_declares_running_attempts_lost_and_starts_the_next() -> None:
    rows = Rows(spec_of({"a": {}}), {}, {})
    rows.run.state = State.RUNNING
    rows.step_runs["a", -1] = StepRun("a", -1, State.RUNNING, attempt=1, started_at=_now())
    rows.attempts["a", -1, 1] = Attempt("a", -1, 1, AttemptState.RUNNING, _now())
    workers = Workers(rows)
    assert await drive(rows, workers) is State.SUCCEEDED
    assert [(entry.state, entry.error) for entry in rows.of(("a", -1))] == [(L, "its executor was lost"), (S, None)]
    assert workers.lost == ["run1/a/-1/1"]


async def test_a_new_owner_keeps_what_has_succeeded() -> None:
    rows = Rows(spec_of({"a": {}, "b": {"with": {"x": "${{ steps.a.output }}"}}}), {}, {})
    rows.run.state = State.RUNNING
    rows.step_runs["a", -1] = StepRun("a", -1, State.SUCCEEDED, attempt=1, output={"kind": "json", "value": "kept"})
    workers = Workers(rows, compute=echo)
    await drive(rows, workers)
    assert workers.values("a") == []
    assert workers.values("b") == [{"x": "kept"}]


async def test_a_fenced_driver_raises_and_launches_nothing_more() -> None:
    rows = Rows(spec_of({"a": {}}), {}, {})
    rows.epoch = 2
    workers = Workers(rows)
    driver = RunDriver(rows.snapshot(), 1, workers.launch, rows.commit, workers.on_lost)
    with pytest.raises(Fenced):
        await driver.drive()
    assert workers.requests == []
    assert rows.state("a") is State.PENDING


async def test_attempts_are_cancelled_when_their_driver_is_thrown_away() -> None:
    rows = Rows(spec_of({"a": {}}), {}, {})
    rows.epoch = 1
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def launch(request: AttemptRequest) -> AttemptOutcome:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError(request)

    driver = RunDriver(rows.snapshot(), 1, launch, rows.commit, Workers(rows).on_lost)
    task = asyncio.create_task(driver.drive())
    await started.wait()
    assert driver.active_attempts == 1
    task.cancel()
    await asyncio.wait([task])
    await asyncio.wait_for(cancelled.wait(), 5)
    assert rows.of(("a", -1))[0].state is AttemptState.RUNNING


async def test_a_committed_transition_does_not_change_afterwards() -> None:
    kept: list[tuple[Transition, str]] = []
    rows = Rows(spec_of({"a": {"attempts": 2}, "f": {"foreach": [1, 2], "needs": ["a"]}}), {}, {})

    async def commit(transition: Transition) -> None:
        kept.append((transition, repr(transition)))
        await rows.commit(transition)

    rows.epoch = 1
    workers = Workers(rows, {("a", -1): [F]})
    assert await RunDriver(rows.snapshot(), 1, workers.launch, commit, workers.on_lost).drive() is State.SUCCEEDED
    assert all(repr(transition) == text for transition, text in kept)


@st.composite
def pipelines(draw: st.DrawFn) -> PipelineSpec:
    """Random graphs with fan-outs, some of which go over the output of an earlier step."""
    steps: dict[str, dict[str, Any]] = {}
    for index in range(draw(st.integers(1, 6))):
        earlier = list(steps)
        needs = draw(st.lists(st.sampled_from(earlier), max_size=3, unique=True)) if earlier else []
        step: dict[str, Any] = {"needs": needs, "attempts": draw(st.integers(1, 3))}
        kind = draw(st.sampled_from(["plain", "plain", "list", "output"]))
        if kind == "list":
            step["foreach"] = list(range(draw(st.integers(0, 3))))
            step["with"] = {"x": "${{ item }}"}
        elif kind == "output" and needs:
            step["foreach"] = f"${{{{ steps.{needs[0]}.output }}}}"
        steps[f"s{index}"] = step
    return spec_of(dict(draw(st.permutations(list(steps.items())))))


nodes = st.tuples(st.sampled_from([f"s{index}" for index in range(6)]), st.integers(-1, 2))
scripts = st.dictionaries(nodes, st.lists(st.sampled_from([S, S, F, F, L]), max_size=6), max_size=12)
troubles = st.dictionaries(
    st.integers(1, 25), st.builds(Trouble, st.sampled_from(["before", "after", "takeover"])), max_size=6
)


def output_of(request: AttemptRequest) -> Any:
    """A short list, so that a later step may fan out over it."""
    return [request.step, request.item]


@settings(deadline=None, max_examples=500)
@given(pipelines(), scripts, troubles, st.integers(0, 1_000))
def test_no_crash_and_no_takeover_breaks_a_rule(
    spec: PipelineSpec, outcomes: dict[Node, list[AttemptState]], trouble: dict[int, Trouble], seed: int
) -> None:
    async def scenario() -> tuple[Rows, Workers]:
        rows = Rows(spec, {}, trouble)
        workers = Workers(rows, outcomes, output_of, lambda request: crc32(f"{seed}/{request.label}".encode()) % 7)
        await asyncio.wait_for(drive(rows, workers), 30)
        return rows, workers

    rows, workers = asyncio.run(scenario())
    launched = Counter(request.label for request in workers.requests)
    assert set(launched.values()) <= {1}, "an attempt is launched once"
    whole = {step: rows.step_runs[step, WHOLE_STEP] for step in spec.steps}
    failed = [step for step in spec.steps if whole[step].state is State.FAILED]
    assert rows.run.state is (State.FAILED if failed else State.SUCCEEDED)
    for step, definition in spec.steps.items():
        blocked = any(whole[need].state is not State.SUCCEEDED for need in definition.needs)
        assert (whole[step].state is State.SKIPPED) == blocked
        if definition.foreach is not None and whole[step].items is not None:
            items = [row for row in rows.step_runs.values() if row.step == step and row.item != WHOLE_STEP]
            assert len(items) == whole[step].items
            assert (whole[step].state is State.SUCCEEDED) == all(row.state is State.SUCCEEDED for row in items)
    for node, row in rows.step_runs.items():
        assert row.state.is_final
        states = [entry.state for entry in rows.of(node)]
        assert [entry.attempt for entry in rows.of(node)] == list(range(1, row.attempt + 1))
        assert states.count(S) <= 1
        assert states.count(F) == row.failures <= spec.steps[node[0]].retry.max_attempts
        assert AttemptState.RUNNING not in states
        if row.state is State.SUCCEEDED and spec.steps[node[0]].foreach is None:
            assert states[-1] is S
            assert row.output == {"kind": "json", "value": [node[0], node[1]]}
        if states.count(F) == spec.steps[node[0]].retry.max_attempts:
            assert row.state is State.FAILED


@settings(deadline=None, max_examples=50)
@given(pipelines(), scripts)
def test_without_trouble_the_scripts_alone_say_how_a_run_ends(
    spec: PipelineSpec, outcomes: dict[Node, list[AttemptState]]
) -> None:
    def once(turns: Callable[[AttemptRequest], int]) -> Rows:
        async def scenario() -> Rows:
            rows = Rows(spec, {}, {})
            await drive(rows, Workers(rows, outcomes, output_of, turns))
            return rows

        return asyncio.run(scenario())

    first, second = once(lambda request: 0), once(lambda request: 5 - request.item)
    assert first.run.state is second.run.state
    assert {step: first.state(step) for step in spec.steps} == {step: second.state(step) for step in spec.steps}
