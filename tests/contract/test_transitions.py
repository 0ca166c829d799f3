"""The executors' writes: transitions of many runs in one statement, each fenced by its run's epoch."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import Fenced, Unavailable
from mlplat.pipelines.model import WHOLE_STEP, Attempt, AttemptState, ChildRequest, State, StepRun
from mlplat.pipelines.transitions import CachedOutput, TransitionWriter
from tests.contract.pipelines import NOW, Pipelines, change, full, spec_of, transition
from tests.contract.waiting import until


def running(attempt: int = 1, **fields: Any) -> StepRun:
    return StepRun("train", WHOLE_STEP, State.RUNNING, attempt=attempt, **fields)


async def test_a_transition_is_read_as_it_was_written(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    await pipelines.writer.write(full(run_id, epoch, 3))
    found = await pipelines.snapshot(run_id)
    assert (found.run.state, found.run.started_at, found.run.finished_at, found.run.seq) == (
        State.RUNNING,
        NOW,
        None,
        3,
    )
    at = timedelta(seconds=1)
    assert found.step_runs == [
        StepRun("train", WHOLE_STEP, State.RUNNING, items=2, started_at=NOW, queued_at=NOW, seq=3),
        StepRun("train", 0, State.SUCCEEDED, None, 2, 1, {"kind": "json", "value": [1, None, "ü"]}, None, None,
                NOW, NOW, NOW + at, "run0", 3),
        StepRun("train", 1, State.PENDING, None, 1, 1, None, "boom\ntraceback", NOW + timedelta(hours=1), NOW, seq=3),
        StepRun("check", WHOLE_STEP, State.PENDING),
    ]  # fmt: skip
    assert found.attempts == [
        Attempt("train", 0, 1, AttemptState.LOST, NOW, NOW, NOW, "its process vanished", seq=3),
        Attempt("train", 0, 2, AttemptState.SUCCEEDED, NOW + at, NOW, NOW, None, "node-1",
                {"done": 0.5, "text": "ü"}, "child", 3),
        Attempt("train", 1, 1, AttemptState.FAILED, NOW + 2 * at, NOW, NOW, "boom", seq=3),
    ]  # fmt: skip


async def test_writing_the_same_rows_again_is_harmless(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    await pipelines.writer.write(full(run_id, epoch))
    before = await pipelines.snapshot(run_id)
    await pipelines.writer.write(full(run_id, epoch))
    await asyncio.gather(*(pipelines.writer.write(full(run_id, epoch)) for _ in range(4)))
    assert await pipelines.snapshot(run_id) == before


async def test_several_transitions_of_one_run_land_in_their_order(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    states = [State.RUNNING, State.PENDING, State.RUNNING, State.SUCCEEDED]
    await asyncio.gather(
        *(
            pipelines.writer.write(
                transition(run_id, epoch, [StepRun("train", WHOLE_STEP, state, attempt=number)], seq=number + 1)
            )
            for number, state in enumerate(states)
        )
    )
    row = await pipelines.row(run_id)
    assert (row.state, row.attempt, row.seq) == (State.SUCCEEDED, 3, 4)
    assert (await pipelines.store.get_run(run_id)).seq == 4


async def test_what_a_transition_does_not_mention_stays(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    write = pipelines.writer.write
    await write(transition(run_id, epoch, run=change(run_id, State.RUNNING, started_at=NOW)))
    stopping = change(run_id, State.RUNNING, stopping=State.CANCELLED, error="cancelled by ann", started_at=NOW)
    await write(transition(run_id, epoch, run=stopping, seq=2))
    await write(transition(run_id, epoch, [running()], seq=3))
    run = await pipelines.store.get_run(run_id)
    assert (run.state, run.stopping, run.error, run.started_at, run.seq) == (
        State.RUNNING, State.CANCELLED, "cancelled by ann", NOW, 3,
    )  # fmt: skip
    later = NOW + timedelta(minutes=1)
    end = change(
        run_id, State.CANCELLED, error="cancelled by ann", finished_at=later, output={"kind": "json", "value": 1}
    )
    await write(transition(run_id, epoch, run=end, seq=4))
    run = await pipelines.store.get_run(run_id)
    assert (run.state, run.started_at, run.finished_at) == (State.CANCELLED, NOW, later)
    assert run.output == {"kind": "json", "value": 1}


async def test_a_run_that_is_over_takes_nothing_more(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    await pipelines.writer.write(transition(run_id, epoch, run=change(run_id, State.FAILED, error="no")))
    before = await pipelines.snapshot(run_id)
    with pytest.raises(Fenced):
        await pipelines.writer.write(full(run_id, epoch, 2))
    assert await pipelines.snapshot(run_id) == before


def _child(run_id: str, child_id: str) -> ChildRequest:
    inner = spec_of("inner", parameters={"x": {"type": "int"}})
    return ChildRequest(run_id, "sub", WHOLE_STEP, 1, child_id, inner, {"x": 3}, "ann", "earlier")


async def test_children_start_with_their_parents_executor(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    for _repeat in range(2):
        await pipelines.writer.write(transition(run_id, epoch, [running()], children=[_child(run_id, "child1")]))
    child = await pipelines.snapshot("child1")
    assert (child.run.name, child.run.params, child.run.state, child.run.submitted_by) == (
        "inner", {"x": 3}, State.QUEUED, "ann",
    )  # fmt: skip
    assert (child.run.executor, child.run.epoch, child.run.resumed_from) == ("executor", 1, "earlier")
    assert child.run.source == f"step:{run_id}/sub/-1/1"
    assert list(child.spec["steps"]) == ["train", "check"]
    await pipelines.writer.write(full("child1", 1))


async def test_many_children_of_one_definition(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    children = [ChildRequest(run_id, "sub", item, 1, f"child{item}", spec_of("inner"), {}, "ann") for item in range(50)]
    await pipelines.writer.write(transition(run_id, epoch, children=children))
    assert len(await pipelines.store.find_states([child.child_id for child in children])) == 50
    assert await pipelines.count("pipeline") == 2


async def test_cached_outputs_are_found_by_key_and_age(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    value: dict[str, object] = {"kind": "json", "value": [1]}
    cache = [CachedOutput("k1", "train", -1, value), CachedOutput("k2", "train", 3, value)]
    await pipelines.writer.write(transition(run_id, epoch, cache=cache))
    assert await pipelines.store.find_cached("k1", None) == (value, run_id)
    assert await pipelines.store.find_cached("k2", 60.0) == (value, run_id)
    assert await pipelines.store.find_cached("k3", None) is None
    async with pipelines.engine.begin() as connection:
        await connection.execute(text("UPDATE step_cache SET created_at = created_at - interval '1 hour'"))
    assert await pipelines.store.find_cached("k1", None) == (value, run_id)
    assert await pipelines.store.find_cached("k2", 60.0) is None


async def test_a_cached_output_is_replaced_by_a_newer_one(pipelines: Pipelines) -> None:
    for number in range(3):
        run_id, epoch = await pipelines.run()
        twice = [CachedOutput("k", "train", -1, {"kind": "json", "value": number})] * 2
        await pipelines.writer.write(transition(run_id, epoch, cache=twice))
        assert await pipelines.store.find_cached("k", None) == ({"kind": "json", "value": number}, run_id)


async def test_fenced_transitions_write_nothing_and_the_others_of_their_group_do(pipelines: Pipelines) -> None:
    runs = [await pipelines.run() for _ in range(8)]
    lost = {run_id for run_id, _epoch in runs[::2]}
    await pipelines.submissions.assign(dict.fromkeys(lost, "another executor"))
    before = {run_id: await pipelines.snapshot(run_id) for run_id in lost}

    def everything(run_id: str, epoch: int) -> Any:
        row = full(run_id, epoch)
        more = transition(
            run_id, epoch, [running()], children=[_child(run_id, f"child-of-{run_id}")],
            cache=[CachedOutput(f"key-of-{run_id}", "train", -1, {"kind": "json", "value": 1})],
        )  # fmt: skip
        row.row.children, row.row.cache = more.row.children, more.row.cache
        return row

    answers = await asyncio.gather(
        *(pipelines.writer.write(everything(run_id, epoch)) for run_id, epoch in runs), return_exceptions=True
    )
    children = await pipelines.store.find_states([f"child-of-{run_id}" for run_id, _epoch in runs])
    for (run_id, _epoch), answer in zip(runs, answers, strict=True):
        assert (f"child-of-{run_id}" in children) == (run_id not in lost)
        cached = await pipelines.store.find_cached(f"key-of-{run_id}", None)
        assert (cached is not None) == (run_id not in lost)
        if run_id in lost:
            assert isinstance(answer, Fenced)
            assert await pipelines.snapshot(run_id) == before[run_id]
        else:
            assert answer is None
            assert (await pipelines.store.get_run(run_id)).state is State.RUNNING


async def test_both_owners_of_one_run_in_one_group_are_told_apart(pipelines: Pipelines) -> None:
    run_id, old = await pipelines.run()
    new = (await pipelines.submissions.assign({run_id: "another"}))[run_id]
    answers = await asyncio.gather(
        pipelines.writer.write(transition(run_id, new, [running()])),
        pipelines.writer.write(transition(run_id, old, [running(9)])),
        return_exceptions=True,
    )
    assert answers[0] is None
    assert isinstance(answers[1], Fenced)
    assert (await pipelines.row(run_id)).attempt == 1


@pytest.mark.parametrize("bad", ["a\x00b", "\x00"])
async def test_a_transition_that_postgres_refuses_fails_alone(pipelines: Pipelines, bad: str) -> None:
    runs = [await pipelines.run() for _ in range(3)]
    rows = [StepRun("train", WHOLE_STEP, State.FAILED, error=error) for error in ("plain", bad, None)]
    answers = await asyncio.gather(
        *(
            pipelines.writer.write(transition(run_id, epoch, [row]))
            for (run_id, epoch), row in zip(runs, rows, strict=True)
        ),
        return_exceptions=True,
    )
    assert (answers[0], answers[2]) == (None, None)
    assert isinstance(answers[1], Exception)
    states = [(await pipelines.row(run_id)).state for run_id, _epoch in runs]
    assert states == [State.FAILED, State.PENDING, State.FAILED]
    await pipelines.writer.write(transition(*runs[1], [running()]))  # the writer goes on


@pytest.mark.parametrize(
    "value", ["'; DROP TABLE attempt; --", "{}", ":x %s %(y)s", "\\u0000", "ü\u2028\U0001f600", '"']
)
async def test_odd_text_arrives_as_it_is(pipelines: Pipelines, value: str) -> None:
    run_id, epoch = await pipelines.run()
    row = running(error=value, output={"kind": "json", "value": {value: [value]}}, reused_from=value)
    attempt = Attempt("train", -1, 1, AttemptState.RUNNING, NOW, error=value, node=value, progress={"text": value})
    await pipelines.writer.write(transition(run_id, epoch, [row], [attempt]))
    found = await pipelines.row(run_id)
    assert (found.error, found.output, found.reused_from) == (value, {"kind": "json", "value": {value: [value]}}, value)
    [entry] = (await pipelines.snapshot(run_id)).attempts
    assert (entry.error, entry.node, entry.progress) == (value, value, {"text": value})


async def test_an_output_keeps_its_keys_in_order_and_its_numbers(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    value = {"bb": 1, "a": 1e23, "c": 1e16, "aa": 1.0, "": 2**70, "z": 5e-324, "y": -0.0}
    row = running(output={"kind": "json", "value": value})
    await pipelines.writer.write(transition(run_id, epoch, [row], run=change(run_id, State.RUNNING, output=row.output)))
    stored = (await pipelines.row(run_id)).output
    for output in (stored, (await pipelines.store.get_run(run_id)).output):
        assert output is not None
        assert repr(output["value"]) == repr(value)


async def test_a_reader_sees_what_changed_since(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    await pipelines.writer.write(full(run_id, epoch, 1))
    row = StepRun("train", 1, State.QUEUED, attempt=2)
    attempt = Attempt("train", 1, 2, AttemptState.QUEUED, NOW)
    await pipelines.writer.write(transition(run_id, epoch, [row], [attempt], seq=2))
    changes = await pipelines.store.get_changes(run_id, 1)
    assert (changes.run.seq, changes.step_runs, changes.attempts) == (2, [row], [attempt])
    nothing = await pipelines.store.get_changes(run_id, 2)
    assert (nothing.step_runs, nothing.attempts) == ([], [])


async def _waiting_for_locks(engine: AsyncEngine) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as connection:
        return int((await connection.execute(text(query))).scalar_one())


async def test_giving_a_run_away_waits_for_a_transition_that_is_being_written(
    pipelines: Pipelines, engine: AsyncEngine
) -> None:
    run_id, epoch = await pipelines.run()
    await pipelines.writer.write(transition(run_id, epoch, [running()]))

    async def waiters(count: int) -> bool:
        return await _waiting_for_locks(engine) == count

    async with engine.connect() as connection, connection.begin():
        await connection.execute(text("SELECT 1 FROM step_run WHERE step = 'train' FOR UPDATE"))
        writing = asyncio.create_task(pipelines.writer.write(transition(run_id, epoch, [running(2)], seq=2)))
        await until(lambda: waiters(1))  # its epoch is checked, its row is not written yet
        assigning = asyncio.create_task(pipelines.submissions.assign({run_id: "another"}))
        await until(lambda: waiters(2))
        assert not assigning.done()
    await asyncio.wait_for(writing, 10)
    assert (await asyncio.wait_for(assigning, 10))[run_id] == epoch + 1
    run = await pipelines.store.get_run(run_id)
    assert (run.executor, run.epoch) == ("another", epoch + 1)
    assert (await pipelines.row(run_id)).attempt == 2


async def test_no_transition_of_an_old_epoch_lands_after_the_run_was_given_away(
    pipelines: Pipelines, engine: AsyncEngine
) -> None:
    run_id, epoch = await pipelines.run()
    for _round in range(4):
        writers = [TransitionWriter(engine, "executor") for _ in range(3)]
        written = [0, 0, 0]

        async def write(number: int, epoch: int, writers: list[TransitionWriter], written: list[int]) -> None:
            while True:
                attempts = [Attempt("train", WHOLE_STEP, epoch * 100 + number, AttemptState.RUNNING, NOW)]
                try:
                    await writers[number].write(transition(run_id, epoch, [running(epoch)], attempts))
                except Fenced:
                    return
                written[number] += 1

        tasks = [asyncio.create_task(write(number, epoch, writers, written)) for number in range(3)]
        while not all(written):
            await asyncio.sleep(0)
        new = (await pipelines.submissions.assign({run_id: "another"}))[run_id]
        owner = TransitionWriter(engine, "executor")
        await owner.write(transition(run_id, new, [StepRun("train", WHOLE_STEP, State.PENDING, attempt=new)]))
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        row = await pipelines.row(run_id)
        assert (row.state, row.attempt) == (State.PENDING, new)
        for writer in (*writers, owner):
            await writer.close()
        epoch = new


async def test_a_closed_writer_has_written_what_it_was_given(pipelines: Pipelines, engine: AsyncEngine) -> None:
    run_id, epoch = await pipelines.run()
    writer = TransitionWriter(engine, "executor")
    pending = asyncio.create_task(writer.write(transition(run_id, epoch, run=change(run_id, State.RUNNING))))
    await asyncio.sleep(0)
    await writer.close()
    await pending
    assert (await pipelines.store.get_run(run_id)).state is State.RUNNING
    with pytest.raises(Unavailable):
        await writer.write(transition(run_id, epoch, run=change(run_id, State.FAILED)))
