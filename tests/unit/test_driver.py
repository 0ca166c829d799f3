"""Runs driven to their end: by example, and for random pipelines, outcomes, crashes and take-overs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import Fenced
from mlplat.pipelines.driver import Progressed, Request, Started, _Ended
from mlplat.pipelines.model import (
    WHOLE_STEP,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    Node,
    SignalKind,
    State,
    StepRun,
)
from mlplat.pipelines.spec import PipelineSpec
from tests.unit.driving import FakeWorld, Rows, drive, driver_of
from tests.unit.playing import NOW, OPEN, spec_of, stored

S, F, L, C = AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.CANCELLED


async def run(
    steps: Mapping[str, Any],
    outcomes: Mapping[Node, list[AttemptState]] | None = None,
    compute: Callable[[AttemptRequest], Any] = lambda request: request.attempt,
    **fields: Any,
) -> tuple[Rows, FakeWorld]:
    """A run without trouble."""
    rows = Rows(spec_of(steps, **fields))
    world = FakeWorld(rows, outcomes, compute)
    await drive(rows, world)
    return rows, world


def echo(request: AttemptRequest) -> Any:
    return request.arguments.get("x")


async def until(condition: Callable[[], bool]) -> None:
    """Lets the others go first until it holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


# -- what a driver does ----------------------------------------------------------------------------


async def test_a_chain_runs_in_order_and_passes_outputs_on() -> None:
    steps = {
        "b": {"with": {"x": "${{ steps.a.output.n }}"}},
        "a": {"with": {"x": {"n": 7}}},
        "c": {"with": {"text": "b gave ${{ steps.b.output }}"}},
    }
    rows, world = await run(steps, compute=echo)
    assert rows.ledger.run.state is State.SUCCEEDED
    assert [request.step for request in world.requests] == ["a", "b", "c"]
    assert world.values("c") == [{"text": "b gave 7"}]


async def test_a_retry_waits_until_its_time_and_holds_nobody_up() -> None:
    retry = {"max_attempts": 2, "initial_s": 0.05, "jitter": 0}
    rows = Rows(spec_of({"a": {"retry": retry}, "b": {}}))
    world = FakeWorld(rows, {("a", -1): [F]}, turns=lambda request: 5 if request.step == "b" else 0)
    await drive(rows, world)
    first, second = rows.ledger.of(("a", -1))
    [other] = rows.ledger.of(("b", -1))
    assert first.finished_at is not None
    assert other.finished_at is not None
    assert (second.queued_at - first.finished_at).total_seconds() >= 0.05 * 0.99
    assert other.finished_at < second.queued_at


async def test_a_lost_attempt_is_told_and_replaced() -> None:
    rows, world = await run({"a": {}}, {("a", -1): [L, L]})
    assert [entry.state for entry in rows.ledger.of(("a", -1))] == [L, L, S]
    assert world.lost_labels == ["run1/a/-1/1", "run1/a/-1/2"]


async def test_an_attempt_that_failed_before_it_began_is_told_too() -> None:
    class Failing(FakeWorld):
        async def run(self, request: Request) -> AttemptOutcome:
            return AttemptOutcome(F, error="the attempt's process died")

    rows = Rows(spec_of({"a": {}}))
    world = Failing(rows)
    assert await drive(rows, world) is State.FAILED
    assert world.lost_labels == ["run1/a/-1/1"]


async def test_a_world_that_breaks_fails_the_attempt_and_does_not_hang_the_run() -> None:
    class Broken(FakeWorld):
        async def run(self, request: Request) -> AttemptOutcome:
            raise ZeroDivisionError("what nobody thought of")

    rows = Rows(spec_of({"a": {}}, {"clean": {}}))
    assert await asyncio.wait_for(drive(rows, Broken(rows)), 10) is State.FAILED
    assert rows.ledger.run.error == "step 'a' failed: internal error: ZeroDivisionError: what nobody thought of"


async def test_what_postgres_refuses_is_taken_out_of_errors() -> None:
    class Odd(FakeWorld):
        async def run(self, request: Request) -> AttemptOutcome:
            return AttemptOutcome(F, error="a\x00b \ud800", started_at=NOW)

    rows = Rows(spec_of({"a": {}}))
    await drive(rows, Odd(rows))
    assert rows.ledger.step_runs["a", -1].error == "a\ufffdb ?"


async def test_notices_of_attempts_are_kept() -> None:
    rows = Rows(spec_of({"a": {}}))
    world = FakeWorld(rows, turns=lambda _request: None)
    driver = driver_of(rows, world)
    task = asyncio.create_task(driver.drive())
    await until(lambda: bool(world.requests))
    driver.post(Started(("a", -1), 1, NOW, "node-1"))
    driver.post(Progressed(("a", -1), 1, {"done": 0.5, "text": "half\x00 \ud800"}))
    await until(lambda: rows.ledger.attempts["a", -1, 1].progress == {"done": 0.5, "text": "half\ufffd ?"})
    assert rows.ledger.attempts["a", -1, 1].node == "node-1"
    assert rows.ledger.step_runs["a", -1].state is State.RUNNING
    driver.post(rows.say(SignalKind.CANCEL))
    assert await asyncio.wait_for(task, 10) is State.CANCELLED


async def test_a_fenced_driver_raises_and_launches_nothing_more() -> None:
    rows = Rows(spec_of({"a": {}}))
    world = FakeWorld(rows)
    driver = driver_of(rows, world)
    rows.epoch += 1
    with pytest.raises(Fenced):
        await driver.drive()
    assert world.requests == []
    assert rows.ledger.step_runs == {}


async def test_light_attempts_die_with_their_driver() -> None:
    rows = Rows(spec_of({"a": {}}))
    world = FakeWorld(rows, turns=lambda _request: None)
    driver = driver_of(rows, world)
    task = asyncio.create_task(driver.drive())
    await until(lambda: bool(world.requests))
    assert driver.active_attempts == 1
    task.cancel()
    await asyncio.wait([task])
    await until(lambda: world.killed == ["run1/a/-1/1"])
    assert rows.ledger.of(("a", -1))[0].state is AttemptState.QUEUED


async def test_a_committed_transition_does_not_change_afterwards() -> None:
    rows = Rows(spec_of({"a": {"attempts": 2}, "f": {"foreach": [1, 2], "needs": ["a"]}}))
    texts: list[str] = []
    world = FakeWorld(rows, {("a", -1): [F]})
    driver = driver_of(rows, world)
    commit = rows.commit

    async def keep(transition: Any) -> None:
        texts.append(repr(transition.row))
        await commit(transition)

    driver._commit = keep
    assert await driver.drive() is State.SUCCEEDED
    assert [repr(transition.row) for transition in rows.transitions] == texts


async def test_an_end_that_comes_again_or_too_late_is_counted_and_changes_nothing() -> None:
    class Repeating(FakeWorld):
        """What was said of earlier attempts is said again with each end."""

        async def run(self, request: Request) -> AttemptOutcome:
            outcome = await super().run(request)
            for earlier in self.requests[:-1]:
                for state in (S, F, L):
                    late = AttemptOutcome(state, stored("late"), f"late {state}", started_at=NOW)
                    driver.post(_Ended(earlier, late))
                driver.post(Started(earlier.node, earlier.attempt, NOW, "nowhere"))
                driver.post(Progressed(earlier.node, earlier.attempt, {"done": 0.1, "text": "late"}))
            driver.post(Started(("nobody", 7), 1, NOW, "nowhere"))
            driver.post(Progressed(("nobody", 7), 1, {"done": 0.1, "text": "late"}))
            assert not driver.is_durable("nobody")
            return outcome

    rows = Rows(spec_of({"a": {"attempts": 3}, "b": {"needs": ["a"]}}))
    world = Repeating(rows, {("a", -1): [F, F]}, turns=lambda _request: 3)
    driver = driver_of(rows, world)
    assert await driver.drive() is State.SUCCEEDED
    assert [entry.state for entry in rows.ledger.of(("a", -1))] == [F, F, S]
    assert rows.ledger.step_runs["a", -1].output == stored(3)
    assert not [entry for entry in rows.ledger.attempts.values() if entry.progress or entry.node == "nowhere"]
    assert driver.stale_ends == 3 * (1 + 2 + 3)


# -- take-overs ------------------------------------------------------------------------------------


async def _hand_over(rows: Rows, world: FakeWorld) -> asyncio.Task[State]:
    """An owner starts everything and dies; another one drives from now on."""
    first = asyncio.create_task(driver_of(rows, world).drive())
    await until(lambda: bool(world.requests))
    first.cancel()
    await asyncio.wait([first])
    return asyncio.create_task(driver_of(rows, world).drive())


async def test_a_new_owner_replaces_a_light_attempt() -> None:
    rows = Rows(spec_of({"a": {}}))
    world = FakeWorld(rows, turns=lambda request: None if request.attempt == 1 else 0)
    assert await asyncio.wait_for(await _hand_over(rows, world), 10) is State.SUCCEEDED
    assert [(entry.state, entry.error) for entry in rows.ledger.of(("a", -1))] == [
        (L, "its executor was lost"), (S, None),
    ]  # fmt: skip
    assert world.lost_labels == ["run1/a/-1/1"]


async def test_a_new_owner_joins_a_durable_attempt() -> None:
    rows = Rows(spec_of({"a": {"durable": True}}))
    world = FakeWorld(rows, turns=lambda _request: 50)
    assert await asyncio.wait_for(await _hand_over(rows, world), 10) is State.SUCCEEDED
    assert [entry.state for entry in rows.ledger.of(("a", -1))] == [S]
    assert (world.labels, world.lost_labels, world.killed) == (["run1/a/-1/1"], [], [])
    assert world.acknowledged == ["run1/a/-1/1"]


async def test_a_new_owner_stops_a_durable_attempt_that_its_predecessor_did_not() -> None:
    rows = Rows(spec_of({"a": {"durable": True}}, {"clean": {}}))
    world = FakeWorld(rows, turns=lambda request: None if request.step == "a" else 0)
    first = driver_of(rows, world)
    task = asyncio.create_task(first.drive())
    await until(lambda: bool(world.requests))
    rows._trouble[2] = "after"  # the cancellation is durable, and nothing is done about it
    first.post(rows.say(SignalKind.CANCEL))
    await asyncio.wait([task])
    assert (rows.ledger.run.stopping, world.stopped) == (State.CANCELLED, [])
    assert await asyncio.wait_for(drive(rows, world), 10) is State.CANCELLED
    assert world.stopped == ["run1/a/-1/1"]
    assert rows.ledger.state("clean") is State.SUCCEEDED


async def test_a_new_owner_keeps_what_has_succeeded() -> None:
    rows = Rows(spec_of({"a": {}, "b": {"with": {"x": "${{ steps.a.output }}"}}}), trouble={2: "after"})
    world = FakeWorld(rows, compute=lambda request: f"{request.label}!")
    await drive(rows, world)
    assert world.values("b") == [{"x": "run1/a/-1/1!"}]
    assert [entry.state for entry in rows.ledger.of(("b", -1))] == [L, S]


# -- stopping --------------------------------------------------------------------------------------


async def test_cancelling_stops_attempts_and_runs_the_finally_steps() -> None:
    rows = Rows(spec_of({"a": {}, "b": {"needs": ["a"]}}, {"clean": {}}))
    world = FakeWorld(rows, turns=lambda request: None if request.step == "a" else 0)
    driver = driver_of(rows, world)
    task = asyncio.create_task(driver.drive())
    await until(lambda: bool(world.requests))
    driver.post(rows.say(SignalKind.CANCEL))
    assert await asyncio.wait_for(task, 10) is State.CANCELLED
    assert (world.stopped, world.labels) == (["run1/a/-1/1"], ["run1/a/-1/1", "run1/clean/-1/1"])


async def test_a_run_times_out() -> None:
    rows = Rows(spec_of({"a": {}}, timeout_s=0.05))
    world = FakeWorld(rows, turns=lambda _request: None)
    assert await asyncio.wait_for(drive(rows, world), 10) is State.FAILED
    assert rows.ledger.run.error == "timed out after 0.05 s"
    assert world.stopped == ["run1/a/-1/1"]


async def test_an_attempt_that_is_stopped_while_its_cache_is_looked_up_does_not_start() -> None:
    rows = Rows(spec_of({"a": {"cache": True}}))
    world = FakeWorld(rows)
    world.looking_up.clear()
    driver = driver_of(rows, world)
    task = asyncio.create_task(driver.drive())
    await until(lambda: bool(rows.ledger.attempts))
    driver.post(rows.say(SignalKind.CANCEL))
    await until(lambda: world.stopped == ["run1/a/-1/1"])
    world.looking_up.set()
    assert await asyncio.wait_for(task, 10) is State.CANCELLED
    assert world.requests == []


async def test_what_was_said_before_the_run_began_is_heard() -> None:
    rows = Rows(spec_of({"a": {}}))
    rows.say(SignalKind.CANCEL)
    world = FakeWorld(rows)
    assert await drive(rows, world) is State.CANCELLED
    assert world.requests == []


# -- caches, sub-pipelines, reuse ------------------------------------------------------------------


async def test_an_output_is_cached_and_found_again() -> None:
    steps = {"a": {"cache": True, "with": {"x": [1, 2]}, "attempts": 2}}
    rows, world = await run(steps, {("a", -1): [F]}, echo)
    [kept] = rows.cached
    assert (kept.step, kept.item, kept.output) == ("a", -1, stored([1, 2]))
    again = Rows(spec_of(steps))
    world = FakeWorld(again)
    world.cache[kept.key] = (kept.output, "run0")
    assert await drive(again, world) is State.SUCCEEDED
    assert (world.requests, again.cached) == ([], [])
    assert again.ledger.step_runs["a", -1].reused_from == "run0"


async def test_other_code_other_arguments_and_another_version_are_other_keys() -> None:
    keys = set()
    for code, value, version in (("c", 1, ""), ("d", 1, ""), ("c", 2, ""), ("c", 1, "v2"), ("c", "1", "")):
        rows = Rows(spec_of({"a": {"cache": {"version": version}, "with": {"x": value}}}))
        world = FakeWorld(rows)
        world.code = code
        await drive(rows, world)
        keys.add(rows.cached[0].key)
    assert len(keys) == 5


async def test_code_that_nobody_knows_is_not_cached() -> None:
    rows = Rows(spec_of({"a": {"cache": True}}))
    world = FakeWorld(rows)
    world.code = None
    assert await drive(rows, world) is State.SUCCEEDED
    assert rows.cached == []


async def test_a_sub_pipeline_is_committed_with_its_attempt_and_joined_by_a_new_owner() -> None:
    inner = {"name": "inner", "parameters": {"x": {"type": "int"}}, "steps": {"s": {"uses": "m:f"}}}
    rows = Rows(spec_of({"sub": {"pipeline": inner, "with": {"x": 3}}}), submitted_by="ann")
    world = FakeWorld(rows, turns=lambda _request: 50)
    assert await asyncio.wait_for(await _hand_over(rows, world), 10) is State.SUCCEEDED
    [child] = rows.children
    assert child["run_id"] == rows.ledger.attempts["sub", -1, 1].child_id
    assert (child["name"], child["params"], child["submitted_by"]) == ("inner", {"x": 3}, "ann")
    assert child["source"] == "step:run1/sub/-1/1"
    assert world.labels == ["run1/sub/-1/1"]


async def test_results_of_an_earlier_run_are_written_with_the_first_transition() -> None:
    rows = Rows(spec_of({"a": {}, "b": {"with": {"x": "${{ steps.a.output }}"}}}), resumed_from="run0")
    world = FakeWorld(rows, compute=echo)
    reuse = {("a", -1): StepRun("a", -1, State.SUCCEEDED, output=stored("kept"), finished_at=NOW - timedelta(days=1))}
    assert await driver_of(rows, world, reuse=reuse).drive() is State.SUCCEEDED
    assert world.values("b") == [{"x": "kept"}]
    assert (rows.ledger.step_runs["a", -1].reused_from, rows.ledger.step_runs["a", -1].seq) == ("run0", 1)


# -- random runs -----------------------------------------------------------------------------------


@st.composite
def pipelines(draw: st.DrawFn) -> PipelineSpec:
    """Random graphs with fan-outs, some of which go over the output of an earlier step, and a finally step."""
    steps: dict[str, dict[str, Any]] = {}
    for index in range(draw(st.integers(1, 6))):
        earlier = list(steps)
        needs = draw(st.lists(st.sampled_from(earlier), max_size=3, unique=True)) if earlier else []
        step: dict[str, Any] = {"needs": needs, "attempts": draw(st.integers(1, 3)), "durable": draw(st.booleans())}
        kind = draw(st.sampled_from(["plain", "plain", "list", "output"]))
        if kind == "list":
            step["foreach"] = list(range(draw(st.integers(0, 3))))
            step["with"] = {"x": "${{ item }}"}
            step["max_parallel"] = draw(st.sampled_from([None, 1, 2]))
        elif kind == "output" and needs:
            step["foreach"] = f"${{{{ steps.{needs[0]}.output }}}}"
        steps[f"s{index}"] = step
    finally_: dict[str, Any] = {"z": {}} if draw(st.booleans()) else {}
    return spec_of(dict(draw(st.permutations(list(steps.items())))), finally_)


nodes = st.tuples(st.sampled_from([f"s{index}" for index in range(6)]), st.integers(-1, 2))
scripts = st.dictionaries(nodes, st.lists(st.sampled_from([S, S, F, F, L]), max_size=6), max_size=12)
troubles = st.dictionaries(st.integers(1, 25), st.sampled_from(["before", "after", "takeover"]), max_size=6)


def output_of(request: AttemptRequest) -> Any:
    """A short list, so that a later step may fan out over it."""
    return [request.step, request.item]


@settings(deadline=None, max_examples=300)
@given(pipelines(), scripts, troubles, st.integers(0, 1_000))
def test_no_crash_and_no_takeover_breaks_a_rule(
    spec: PipelineSpec, outcomes: dict[Node, list[AttemptState]], trouble: dict[int, str], seed: int
) -> None:
    async def scenario() -> tuple[Rows, FakeWorld]:
        rows = Rows(spec, trouble=trouble)
        turns = lambda request: crc32(f"{seed}/{request.step}/{request.item}/{request.attempt}".encode()) % 7  # noqa: E731
        world = FakeWorld(rows, outcomes, output_of, turns)
        await asyncio.wait_for(drive(rows, world), 30)
        return rows, world

    rows, world = asyncio.run(scenario())
    assert set(Counter(world.labels).values()) <= {1}, "an attempt is launched once"
    ledger = rows.ledger
    whole = {step: ledger.step_runs[step, WHOLE_STEP] for step in spec.all_steps}
    failed = [step for step in spec.steps if whole[step].state is State.FAILED]
    assert ledger.run.state is (State.FAILED if failed else State.SUCCEEDED)
    for step, definition in spec.all_steps.items():
        blocked = any(whole[need].state is not State.SUCCEEDED for need in definition.needs)
        assert (whole[step].state is State.SKIPPED) == blocked
    for node, row in ledger.step_runs.items():
        states = [entry.state for entry in ledger.of(node)]
        assert row.state.is_final
        assert len(states) == row.attempt
        assert states.count(S) <= 1
        assert states.count(F) == row.failures <= spec.all_steps[node[0]].retry.max_attempts
        assert not OPEN & set(states)
        if row.state is State.SUCCEEDED and spec.all_steps[node[0]].foreach is None:
            assert (states[-1], row.output) == (S, stored([*node]))


@settings(deadline=None, max_examples=50)
@given(pipelines(), scripts)
def test_without_trouble_the_scripts_alone_say_how_a_run_ends(
    spec: PipelineSpec, outcomes: dict[Node, list[AttemptState]]
) -> None:
    def once(turns: Callable[[Request], int]) -> Rows:
        async def scenario() -> Rows:
            rows = Rows(spec)
            await drive(rows, FakeWorld(rows, outcomes, output_of, turns))
            return rows

        return asyncio.run(scenario())

    first, second = once(lambda _request: 0), once(lambda request: 5 - request.item)
    assert first.ledger.run.state is second.ledger.run.state
    assert {step: first.ledger.state(step) for step in spec.steps} == {
        step: second.ledger.state(step) for step in spec.steps
    }
