"""The scheduler's writes: submissions in groups, and who drives which run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.db.tables import pipeline
from mlplat.errors import Fenced, InvalidInput, Unavailable
from mlplat.pipelines.model import WHOLE_STEP, SignalKind, State
from mlplat.pipelines.submissions import SubmissionStore
from tests.contract.pipelines import NOW, TTL_S, Pipelines, change, new_run, spec_of, transition


async def test_a_new_run_is_queued_with_all_its_steps_pending(pipelines: Pipelines) -> None:
    spec = spec_of(parameters={"lr": {"type": "float"}})
    new = new_run(
        "k", spec, {"lr": 0.1}, submitted_by="ann", source="schedule:nightly", priority=-7, concurrency_key="key",
        concurrency_limit=3, resumed_from="run0", resumed_step="train",
    )  # fmt: skip
    assert await pipelines.submissions.add(new) == (new.run_id, True)
    found = await pipelines.snapshot(new.run_id)
    run = found.run
    assert (run.name, run.digest, run.params, run.state, run.submitted_by) == (
        "demo", spec.digest, {"lr": 0.1}, State.QUEUED, "ann",
    )  # fmt: skip
    assert (run.source, run.priority, run.concurrency_key, run.concurrency_limit) == ("schedule:nightly", -7, "key", 3)
    assert (run.resumed_from, run.resumed_step, run.seq, run.output, run.stopping) == ("run0", "train", 0, None, None)
    assert (run.epoch, run.executor, run.error, run.started_at, run.finished_at) == (0, None, None, None, None)
    assert found.spec == spec.to_json()
    assert list(found.spec["steps"]) == ["train", "check"]  # in the order of the definition
    assert {row.node: row.state for row in found.step_runs} == {
        ("train", WHOLE_STEP): State.PENDING, ("check", WHOLE_STEP): State.PENDING,
    }  # fmt: skip
    assert (found.attempts, found.signals) == ([], [])


async def test_a_run_may_have_its_executor_from_the_start(pipelines: Pipelines) -> None:
    run_id = await pipelines.add(executor="one")
    run = await pipelines.store.get_run(run_id)
    assert (run.executor, run.epoch) == ("one", 1)


async def test_the_same_key_again_gives_the_first_run(pipelines: Pipelines) -> None:
    params = {"a": 1, "b": 0.5, "c": "x", "d": True}
    first = await pipelines.add("k", params=params)
    for _repeat in range(3):
        again = new_run("k", params=dict(reversed(params.items())))
        assert await pipelines.submissions.add(again) == (first, False)
    assert await pipelines.count("pipeline_run") == 1


async def test_concurrent_submissions_under_one_key_make_one_run(pipelines: Pipelines) -> None:
    answers = await asyncio.gather(*(pipelines.submissions.add(new_run("k")) for _ in range(20)))
    assert len({run_id for run_id, _new in answers}) == 1
    assert sum(is_new for _run_id, is_new in answers) == 1
    assert await pipelines.count("pipeline_run") == 1


async def test_a_key_cannot_be_used_for_something_else(pipelines: Pipelines) -> None:
    run_id = await pipelines.add("k", params={"a": 1})
    others: list[tuple[str, Any]] = [("other", {"a": 1}), ("demo", {"a": 2}), ("demo", {}), ("demo", {"a": "1"})]
    for name, params in others:
        with pytest.raises(InvalidInput, match=f"'k' belongs to run {run_id}"):
            await pipelines.add("k", spec_of(name), params=params)
    assert await pipelines.count("pipeline_run") == 1


async def test_in_one_group_each_gets_its_own_answer(pipelines: Pipelines) -> None:
    first = await pipelines.add("old", params={"a": 1})
    group = [
        new_run("new"), new_run("old", params={"a": 1}), new_run("old", params={"a": 2}), new_run("twice"),
        new_run("twice"), new_run("twice", spec_of("other")),
    ]  # fmt: skip
    answers = await asyncio.gather(*(pipelines.submissions.add(run) for run in group), return_exceptions=True)
    assert answers[0] == (group[0].run_id, True)
    assert answers[1] == (first, False)
    assert isinstance(answers[2], InvalidInput)
    assert answers[3:5] == [(group[3].run_id, True), (group[3].run_id, False)]
    assert isinstance(answers[5], InvalidInput)
    assert await pipelines.count("pipeline_run") == 3


@pytest.mark.parametrize("value", [1e16, 1e23, 0.1, 5e-324, 1.7976931348623157e308, 2**70, -0.0, 1.0, "ü\u2028", "1"])
async def test_a_value_is_the_same_value_when_it_comes_again(pipelines: Pipelines, value: Any) -> None:
    run_id = await pipelines.add("k", params={"x": value})
    assert await pipelines.submissions.add(new_run("k", params={"x": value})) == (run_id, False)
    found = (await pipelines.store.get_run(run_id)).params["x"]
    assert type(value)(found) == value


async def test_equal_definitions_are_stored_once(pipelines: Pipelines) -> None:
    await asyncio.gather(*(pipelines.add(f"k{number}") for number in range(4)), pipelines.add("o", spec_of("other")))
    async with pipelines.engine.connect() as connection:
        names = (await connection.execute(select(pipeline.c.name).order_by(pipeline.c.name))).scalars().all()
    assert names == ["demo", "other"]


async def test_a_submission_that_postgres_refuses_fails_alone(pipelines: Pipelines) -> None:
    group = [new_run("good"), new_run("bad", submitted_by="NUL \x00"), new_run("fine")]
    answers = await asyncio.gather(*(pipelines.submissions.add(run) for run in group), return_exceptions=True)
    assert answers[0] == (group[0].run_id, True)
    assert isinstance(answers[1], InvalidInput)
    assert answers[2] == (group[2].run_id, True)
    assert await pipelines.count("pipeline_run") == 2


async def test_a_scheduler_that_was_replaced_writes_nothing(pipelines: Pipelines, engine: AsyncEngine) -> None:
    run_id = await pipelines.add("k")
    await _take_lease(engine)
    for key in ("late", "k"):
        with pytest.raises(Fenced):
            await pipelines.add(key)
    with pytest.raises(Fenced):
        await pipelines.submissions.assign({run_id: "executor"})
    with pytest.raises(Fenced):
        await pipelines.submissions.end_waiting(run_id, State.CANCELLED, "late")
    [run] = await pipelines.store.find_runs(10)
    assert (run.run_id, run.epoch, run.executor, run.state) == (run_id, 0, None, State.QUEUED)


async def test_without_the_lease_nothing_is_written(pipelines: Pipelines, engine: AsyncEngine) -> None:
    submissions = SubmissionStore(engine, LeaseKeeper(engine, "scheduler", "other", TTL_S))
    with pytest.raises(Fenced):
        await submissions.add(new_run("k"))
    await submissions.close()
    assert await pipelines.count("pipeline_run") == 0


async def test_each_assignment_raises_the_epoch(pipelines: Pipelines) -> None:
    run_id = await pipelines.add()
    epochs = [(await pipelines.submissions.assign({run_id: name}))[run_id] for name in ("one", "two", "two")]
    assert epochs == [1, 2, 3]
    run = await pipelines.store.get_run(run_id)
    assert (run.executor, run.epoch) == ("two", 3)


async def test_runs_that_are_over_or_unknown_are_not_assigned(pipelines: Pipelines) -> None:
    over, epoch = await pipelines.run()
    await pipelines.writer.write(transition(over, epoch, run=change(over, State.SUCCEEDED, finished_at=NOW)))
    waiting = await pipelines.add()
    assert await pipelines.submissions.assign({over: "x", "nobody": "x", waiting: "x"}) == {waiting: 1}
    assert await pipelines.submissions.assign({}) == {}
    assert (await pipelines.store.get_run(over)).epoch == epoch


async def test_a_run_that_waits_can_be_ended_and_one_that_runs_cannot(pipelines: Pipelines) -> None:
    waiting = await pipelines.add()
    running, _epoch = await pipelines.run()
    assert await pipelines.submissions.end_waiting(waiting, State.CANCELLED, "cancelled by ann")
    assert not await pipelines.submissions.end_waiting(waiting, State.FAILED, "again")
    assert not await pipelines.submissions.end_waiting(running, State.CANCELLED, "no")
    assert not await pipelines.submissions.end_waiting("nobody", State.CANCELLED, "no")
    run = await pipelines.store.get_run(waiting)
    assert (run.state, run.error, run.seq) == (State.CANCELLED, "cancelled by ann", 1)
    assert run.finished_at is not None


async def test_open_runs_are_found_oldest_first(pipelines: Pipelines) -> None:
    waiting = [await pipelines.add() for _ in range(3)]
    running = [await pipelines.run() for _ in range(4)]
    states = [State.PENDING, State.QUEUED, State.RUNNING, State.SUCCEEDED]
    for (run_id, epoch), state in zip(running, states, strict=True):
        await pipelines.writer.write(transition(run_id, epoch, run=change(run_id, state)))
    assert [run.run_id for run in await pipelines.submissions.find_open(assigned=False)] == waiting
    found = await pipelines.submissions.find_open(assigned=True)
    assert [run.run_id for run in found] == [run_id for run_id, _epoch in running[:3]]


async def test_cancelled_runs_that_wait_are_found(pipelines: Pipelines) -> None:
    waiting, other = await pipelines.add(), await pipelines.add()
    running, _epoch = await pipelines.run(spec_of(steps={"ask": {"approval": {}}}))
    for run_id in (waiting, running):
        await pipelines.store.cancel(run_id, "ann")
    assert await pipelines.submissions.find_cancelled_waiting() == [(waiting, "ann")]
    assert [signal.kind for signal in (await pipelines.snapshot(waiting)).signals] == [SignalKind.CANCEL]
    assert (await pipelines.snapshot(other)).signals == []


async def test_a_closed_store_has_written_what_it_was_given(pipelines: Pipelines, engine: AsyncEngine) -> None:
    submissions = SubmissionStore(engine, pipelines.leader)
    pending = asyncio.create_task(submissions.add(new_run("k")))
    await asyncio.sleep(0)
    await submissions.close()
    assert (await pending)[1]
    with pytest.raises(Unavailable):
        await submissions.add(new_run("late"))


async def _take_lease(engine: AsyncEngine) -> None:
    """Another scheduler leads from now on."""
    keeper = LeaseKeeper(engine, "scheduler", "holder", TTL_S)
    await keeper.start()
    assert keeper._task is not None
    keeper._task.cancel()
