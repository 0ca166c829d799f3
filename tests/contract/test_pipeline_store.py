"""What everybody reads of pipeline runs, and what people say to them."""

from __future__ import annotations

from typing import Any

import pytest

from mlplat.errors import InvalidInput, NotFound, PermissionDenied
from mlplat.pipelines.model import WHOLE_STEP, SignalKind, State, StepRun
from tests.contract.pipelines import Pipelines, change, spec_of, transition

ASKING = {"ask": {"approval": {"approvers": ["ann", "bob"], "not_submitter": True}}, "go": {"uses": "os:getcwd"}}


async def test_runs_are_listed_newest_first_by_page(pipelines: Pipelines) -> None:
    ids = [await pipelines.add() for _ in range(5)]
    newest_first = ids[::-1]
    assert [run.run_id for run in await pipelines.store.find_runs(10)] == newest_first
    assert [run.run_id for run in await pipelines.store.find_runs(2, 1)] == newest_first[1:3]
    assert await pipelines.store.find_runs(2, 5) == []


async def test_runs_are_listed_by_what_they_are(pipelines: Pipelines) -> None:
    find = pipelines.store.find_runs
    one = await pipelines.add(None, spec_of("one"), submitted_by="ann")
    two = await pipelines.add(None, spec_of("two"), submitted_by="bob", source="schedule:x")
    assert [run.run_id for run in await find(10, name="one")] == [one]
    assert [run.run_id for run in await find(10, submitted_by="bob")] == [two]
    assert [run.run_id for run in await find(10, source="schedule:x", name="two")] == [two]
    assert [run.run_id for run in await find(10, source="")] == [one]
    assert await find(10, state=State.RUNNING) == []
    assert len(await find(10, state=State.QUEUED)) == 2


async def test_runs_are_counted_by_state(pipelines: Pipelines) -> None:
    for state in (State.RUNNING, State.RUNNING, State.FAILED):
        run_id, epoch = await pipelines.run()
        await pipelines.writer.write(transition(run_id, epoch, run=change(run_id, state)))
    await pipelines.add()
    assert await pipelines.store.count_by_state() == {"RUNNING": 2, "FAILED": 1, "QUEUED": 1}


async def test_an_unknown_run_is_not_found(pipelines: Pipelines) -> None:
    store = pipelines.store
    for call in (store.get_snapshot("nobody"), store.get_run("nobody"), store.get_changes("nobody", 3),
                 store.cancel("nobody", "ann"), store.decide("nobody", "x", approve=True, by="ann")):  # fmt: skip
        with pytest.raises(NotFound, match="No pipeline run with id=nobody exists"):
            await call
    assert await store.find_states(["nobody"]) == {}


async def test_a_snapshot_has_a_row_for_each_step_and_finally_step(pipelines: Pipelines) -> None:
    finally_: dict[str, Any] = {"finally": {"clean": {"uses": "os:getcwd"}}}
    run_id = await pipelines.add(None, spec_of(**finally_))
    rows = (await pipelines.snapshot(run_id)).step_runs
    assert rows == [StepRun(name, WHOLE_STEP, State.PENDING) for name in ("train", "check", "clean")]


async def test_a_cancellation_is_heard_by_the_runs_executor(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    other, _epoch = await pipelines.run()
    run = await pipelines.store.cancel(run_id, "ann", "enough")
    assert run.run_id == run_id
    [signal] = await pipelines.store.find_signals("executor")
    assert (signal.run_id, signal.kind, signal.step, signal.by, signal.comment) == (
        run_id, SignalKind.CANCEL, "", "ann", "enough",
    )  # fmt: skip
    assert await pipelines.store.find_signals("another") == []
    await pipelines.writer.write(transition(run_id, epoch, run=change(run_id, State.CANCELLED)))
    assert await pipelines.store.find_signals("executor") == []
    assert (await pipelines.store.cancel(run_id, "bob")).state is State.CANCELLED
    assert len((await pipelines.snapshot(run_id)).signals) == 1  # one that is over hears nothing more
    assert (await pipelines.snapshot(other)).signals == []


async def test_only_what_waits_for_a_decision_is_decided(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run(spec_of(steps=ASKING), submitted_by="bob")
    decide = pipelines.store.decide
    with pytest.raises(NotFound, match="no step 'nobody'"):
        await decide(run_id, "nobody", approve=True, by="ann")
    with pytest.raises(InvalidInput, match="step 'go' is no approval"):
        await decide(run_id, "go", approve=True, by="ann")
    with pytest.raises(InvalidInput, match="step 'ask' is PENDING"):
        await decide(run_id, "ask", approve=True, by="ann")
    await pipelines.writer.write(transition(run_id, epoch, [StepRun("ask", WHOLE_STEP, State.QUEUED)]))
    with pytest.raises(PermissionDenied, match="'eve' may not decide on 'ask'; ann, bob may"):
        await decide(run_id, "ask", approve=True, by="eve")
    with pytest.raises(PermissionDenied, match="'bob' submitted the run"):
        await decide(run_id, "ask", approve=True, by="bob")
    await decide(run_id, "ask", approve=False, by="ann", comment="no")
    [signal] = await pipelines.store.find_signals("executor")
    assert (signal.kind, signal.step, signal.by, signal.comment) == (SignalKind.REJECT, "ask", "ann", "no")
    await pipelines.writer.write(transition(run_id, epoch, [StepRun("ask", WHOLE_STEP, State.FAILED)], seq=2))
    with pytest.raises(InvalidInput, match="step 'ask' is FAILED"):
        await decide(run_id, "ask", approve=True, by="ann")


async def test_signals_come_in_the_order_in_which_they_were_given(pipelines: Pipelines) -> None:
    runs = [await pipelines.run() for _ in range(3)]
    for number in range(9):
        await pipelines.store.cancel(runs[number % 3][0], f"person {number}")
    signals = await pipelines.store.find_signals("executor")
    assert [signal.by for signal in signals] == [f"person {number}" for number in range(9)]
    assert [signal.by for signal in (await pipelines.snapshot(runs[1][0])).signals] == [
        "person 1",
        "person 4",
        "person 7",
    ]
