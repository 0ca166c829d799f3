"""Pipeline runs in Postgres: the scheduler's writes, everybody's reads, and the executor's transitions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import Lease, try_acquire
from mlplat.db.tables import pipeline, pipeline_run
from mlplat.errors import Fenced, InvalidInput, NotFound, Unavailable
from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.model import WHOLE_STEP, Attempt, AttemptState, State, StepRun, Submission
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.transitions import RunChange, Transition, TransitionWriter
from tests.contract.waiting import until

NOW = datetime(2025, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)


def _spec(name: str = "demo", **changes: Any) -> PipelineSpec:
    document: dict[str, Any] = {
        "name": name,
        "steps": {"train": {"uses": "os:getcwd"}, "check": {"uses": "os:getcwd", "needs": ["train"]}},
    }
    return build_spec(document | changes)


async def _leader(engine: AsyncEngine) -> Lease:
    held = await try_acquire(engine, "scheduler", "holder", 60.0)
    assert held is not None
    return held


@pytest.fixture
def store(engine: AsyncEngine) -> PipelineStore:
    return PipelineStore(engine)


@pytest.fixture
async def leader(engine: AsyncEngine) -> Lease:
    return await _leader(engine)


@pytest.fixture
async def writer(engine: AsyncEngine) -> AsyncIterator[TransitionWriter]:
    writer = TransitionWriter(engine)
    yield writer
    await writer.close()


async def _add(
    store: PipelineStore,
    held: Lease,
    key: str,
    spec: PipelineSpec | None = None,
    params: dict[str, Any] | None = None,
    by: str = "",
) -> tuple[str, bool]:
    spec = spec or _spec()
    return await store.add_run(held, spec, params or {}, Submission(spec.to_json(), params or {}, key, by))


async def _run(store: PipelineStore, held: Lease, key: str = "key") -> tuple[str, int]:
    """A new run that has an executor: its id and epoch."""
    run_id, _new = await _add(store, held, key)
    epoch = await store.assign(held, run_id, "executor")
    assert epoch is not None
    return run_id, epoch


async def test_an_added_run_is_queued_with_all_its_steps_pending(store: PipelineStore, leader: Lease) -> None:
    spec = _spec(parameters={"lr": {"type": "float"}})
    run_id, is_new = await _add(store, leader, "k", spec, {"lr": 0.1}, "ann")
    assert is_new
    found = await store.get_snapshot(run_id)
    run = found.run
    assert (run.name, run.digest, run.params, run.state, run.submitted_by) == (
        "demo", spec.digest, {"lr": 0.1}, State.QUEUED, "ann",
    )  # fmt: skip
    assert (run.epoch, run.executor, run.error, run.started_at, run.finished_at) == (0, None, None, None, None)
    assert found.spec == spec.to_json()
    assert list(found.spec["steps"]) == ["train", "check"]  # in the order of the definition
    assert {row.node: row.state for row in found.step_runs} == {
        ("train", WHOLE_STEP): State.PENDING,
        ("check", WHOLE_STEP): State.PENDING,
    }
    assert found.attempts == []


async def test_the_same_key_again_gives_the_first_run(store: PipelineStore, leader: Lease, engine: AsyncEngine) -> None:
    params = {"a": 1, "b": 0.5, "c": "x", "d": True}
    first = await _add(store, leader, "k", params=params)
    for _repeat in range(3):
        assert await _add(store, leader, "k", params=dict(reversed(params.items()))) == (first[0], False)
    async with engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(pipeline_run))).scalar_one() == 1
        assert (await connection.execute(text("SELECT count(*) FROM step_run"))).scalar_one() == 2


async def test_concurrent_submissions_under_one_key_make_one_run(store: PipelineStore, leader: Lease) -> None:
    answers = await asyncio.gather(*(_add(store, leader, "k") for _ in range(8)))
    assert len({run_id for run_id, _new in answers}) == 1
    assert sum(new for _run_id, new in answers) == 1
    assert len(await store.find_runs(10)) == 1


async def test_a_key_cannot_be_used_for_something_else(store: PipelineStore, leader: Lease) -> None:
    run_id, _new = await _add(store, leader, "k", params={"a": 1})
    for spec, params in ((_spec("other"), {"a": 1}), (_spec(), {"a": 2}), (_spec(), {}), (_spec(), {"a": "1"})):
        with pytest.raises(InvalidInput, match=f"'k' belongs to run {run_id}"):
            await _add(store, leader, "k", spec, params)
    assert len(await store.find_runs(10)) == 1


async def test_equal_definitions_are_stored_once(store: PipelineStore, leader: Lease, engine: AsyncEngine) -> None:
    await asyncio.gather(*(_add(store, leader, f"k{number}") for number in range(4)))
    await _add(store, leader, "other", _spec("other"))
    async with engine.connect() as connection:
        names = (await connection.execute(select(pipeline.c.name).order_by(pipeline.c.name))).scalars().all()
    assert names == ["demo", "other"]


async def test_a_scheduler_that_was_replaced_writes_nothing(
    store: PipelineStore, leader: Lease, engine: AsyncEngine
) -> None:
    run_id, _new = await _add(store, leader, "k")
    await _leader(engine)
    with pytest.raises(Fenced):
        await _add(store, leader, "late", _spec("late"))
    with pytest.raises(Fenced):
        await _add(store, leader, "k")
    with pytest.raises(Fenced):
        await store.assign(leader, run_id, "executor")
    [run] = await store.find_runs(10)
    assert (run.run_id, run.epoch, run.executor) == (run_id, 0, None)
    async with engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(pipeline))).scalar_one() == 1


async def test_each_assignment_raises_the_epoch(store: PipelineStore, leader: Lease) -> None:
    run_id, _new = await _add(store, leader, "k")
    assert [await store.assign(leader, run_id, name) for name in ("one", "two", "two")] == [1, 2, 3]
    run = (await store.get_snapshot(run_id)).run
    assert (run.executor, run.epoch) == ("two", 3)


async def test_a_run_that_is_over_or_unknown_is_not_assigned(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    run_id, epoch = await _run(store, leader)
    await writer.write(Transition(run_id, epoch, run=RunChange(State.SUCCEEDED, finished_at=NOW)))
    assert await store.assign(leader, run_id, "executor") is None
    assert await store.assign(leader, "nobody", "executor") is None
    assert (await store.get_snapshot(run_id)).run.epoch == epoch


async def test_open_runs_are_found_oldest_first(store: PipelineStore, leader: Lease, writer: TransitionWriter) -> None:
    runs = [await _run(store, leader, f"k{number}") for number in range(7)]
    states = [State.PENDING, State.QUEUED, State.RUNNING, State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED]
    for (run_id, epoch), state in zip(runs, states, strict=True):
        await writer.write(Transition(run_id, epoch, run=RunChange(state)))
    assert [run.run_id for run in await store.find_open()] == [run_id for run_id, _epoch in runs[:3]]
    assert await store.count_by_state() == dict.fromkeys(states, 1)


async def test_runs_are_listed_newest_first_by_page(store: PipelineStore, leader: Lease) -> None:
    ids = [(await _add(store, leader, f"k{number}"))[0] for number in range(5)]
    newest_first = ids[::-1]
    assert [run.run_id for run in await store.find_runs(10)] == newest_first
    assert [run.run_id for run in await store.find_runs(2, 1)] == newest_first[1:3]
    assert await store.find_runs(2, 5) == []


async def test_an_unknown_run_has_no_snapshot(store: PipelineStore) -> None:
    with pytest.raises(NotFound, match="No pipeline run with id=nobody exists"):
        await store.get_snapshot("nobody")


def _full_transition(run_id: str, epoch: int) -> Transition:
    return Transition(
        run_id,
        epoch,
        [
            StepRun("train", WHOLE_STEP, State.RUNNING, items=2, started_at=NOW),
            StepRun("train", 0, State.SUCCEEDED, None, 2, 1, {"kind": "json", "value": [1, None, "ü"]}, None, None,
                    NOW, NOW + timedelta(seconds=1)),
            StepRun("train", 1, State.PENDING, None, 1, 1, None, "boom\ntraceback", NOW + timedelta(hours=1), NOW),
        ],
        [
            Attempt("train", 0, 1, AttemptState.LOST, NOW, NOW, "its process vanished"),
            Attempt("train", 0, 2, AttemptState.SUCCEEDED, NOW + timedelta(seconds=1), NOW),
            Attempt("train", 1, 1, AttemptState.FAILED, NOW + timedelta(seconds=2), NOW, "boom"),
        ],
        RunChange(State.RUNNING, started_at=NOW),
    )  # fmt: skip


async def test_a_transition_is_read_as_it_was_written(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    run_id, epoch = await _run(store, leader)
    transition = _full_transition(run_id, epoch)
    await writer.write(transition)
    found = await store.get_snapshot(run_id)
    assert (found.run.state, found.run.started_at, found.run.finished_at) == (State.RUNNING, NOW, None)
    untouched = StepRun("check", WHOLE_STEP, State.PENDING)
    assert found.step_runs == [untouched, *transition.step_runs]
    assert found.attempts == transition.attempts


async def test_writing_the_same_rows_again_is_harmless(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    run_id, epoch = await _run(store, leader)
    await writer.write(_full_transition(run_id, epoch))
    before = await store.get_snapshot(run_id)
    await writer.write(_full_transition(run_id, epoch))
    await asyncio.gather(*(writer.write(_full_transition(run_id, epoch)) for _ in range(4)))
    assert await store.get_snapshot(run_id) == before


async def test_a_later_row_replaces_an_earlier_one(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    run_id, epoch = await _run(store, leader)
    states = [State.RUNNING, State.PENDING, State.RUNNING, State.SUCCEEDED]
    await asyncio.gather(
        *(
            writer.write(Transition(run_id, epoch, [StepRun("train", WHOLE_STEP, state, attempt=number)]))
            for number, state in enumerate(states)
        )
    )
    [row] = [row for row in (await store.get_snapshot(run_id)).step_runs if row.step == "train"]
    assert (row.state, row.attempt) == (State.SUCCEEDED, 3)


async def test_the_end_of_a_run_keeps_when_it_started(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    run_id, epoch = await _run(store, leader)
    later = NOW + timedelta(minutes=1)
    await writer.write(Transition(run_id, epoch, run=RunChange(State.RUNNING, started_at=NOW)))
    await writer.write(Transition(run_id, epoch, run=RunChange(State.FAILED, "train failed", finished_at=later)))
    run = (await store.get_snapshot(run_id)).run
    assert (run.state, run.error, run.started_at, run.finished_at) == (State.FAILED, "train failed", NOW, later)


async def test_fenced_transitions_write_nothing_and_the_others_of_their_group_do(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    runs = [await _run(store, leader, f"k{number}") for number in range(8)]
    lost = {run_id for run_id, _epoch in runs[::2]}
    for run_id in lost:
        await store.assign(leader, run_id, "another executor")
    before = {run_id: await store.get_snapshot(run_id) for run_id in lost}
    answers = await asyncio.gather(
        *(writer.write(_full_transition(run_id, epoch)) for run_id, epoch in runs), return_exceptions=True
    )
    for (run_id, _epoch), answer in zip(runs, answers, strict=True):
        if run_id in lost:
            assert isinstance(answer, Fenced)
            assert await store.get_snapshot(run_id) == before[run_id]
        else:
            assert answer is None
            assert (await store.get_snapshot(run_id)).run.state is State.RUNNING


async def test_both_owners_of_one_run_in_one_group_are_told_apart(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    run_id, old = await _run(store, leader)
    new = await store.assign(leader, run_id, "another")
    assert new is not None
    answers = await asyncio.gather(
        writer.write(Transition(run_id, new, [StepRun("train", WHOLE_STEP, State.RUNNING, attempt=1)])),
        writer.write(Transition(run_id, old, [StepRun("train", WHOLE_STEP, State.FAILED, attempt=9)])),
        return_exceptions=True,
    )
    assert answers[0] is None
    assert isinstance(answers[1], Fenced)
    [row] = [row for row in (await store.get_snapshot(run_id)).step_runs if row.step == "train"]
    assert (row.state, row.attempt) == (State.RUNNING, 1)


async def _waiting_for_locks(engine: AsyncEngine) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as connection:
        return int((await connection.execute(text(query))).scalar_one())


async def test_giving_a_run_away_waits_for_a_transition_that_is_being_written(
    store: PipelineStore, leader: Lease, writer: TransitionWriter, engine: AsyncEngine
) -> None:
    run_id, epoch = await _run(store, leader)

    async def waiters(count: int) -> bool:
        return await _waiting_for_locks(engine) == count

    async with engine.connect() as connection, connection.begin():
        await connection.execute(text("SELECT 1 FROM step_run WHERE step = 'train' FOR UPDATE"))
        writing = asyncio.create_task(
            writer.write(Transition(run_id, epoch, [StepRun("train", WHOLE_STEP, State.RUNNING, attempt=1)]))
        )
        await until(lambda: waiters(1))  # its epoch is checked, its row is not written yet
        assigning = asyncio.create_task(store.assign(leader, run_id, "another"))
        await until(lambda: waiters(2))
        assert not assigning.done()
    await asyncio.wait_for(writing, 10)
    assert await asyncio.wait_for(assigning, 10) == epoch + 1
    found = await store.get_snapshot(run_id)
    assert (found.run.executor, found.run.epoch) == ("another", epoch + 1)


async def test_no_transition_of_an_old_epoch_lands_after_the_run_was_given_away(
    store: PipelineStore, leader: Lease, engine: AsyncEngine
) -> None:
    run_id, epoch = await _run(store, leader)
    for _round in range(4):
        writers = [TransitionWriter(engine) for _ in range(3)]
        written = [0, 0, 0]

        async def write(number: int, epoch: int, writers: list[TransitionWriter], written: list[int]) -> None:
            while True:
                attempts = [Attempt("train", WHOLE_STEP, epoch * 100 + number, AttemptState.RUNNING, NOW)]
                row = StepRun("train", WHOLE_STEP, State.RUNNING, attempt=epoch)
                try:
                    await writers[number].write(Transition(run_id, epoch, [row], attempts))
                except Fenced:
                    return
                written[number] += 1

        tasks = [asyncio.create_task(write(number, epoch, writers, written)) for number in range(3)]
        while not all(written):
            await asyncio.sleep(0)
        new = await store.assign(leader, run_id, "another")
        assert new is not None
        owner = TransitionWriter(engine)
        await owner.write(Transition(run_id, new, [StepRun("train", WHOLE_STEP, State.PENDING, attempt=new)]))
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        [row] = [row for row in (await store.get_snapshot(run_id)).step_runs if row.step == "train"]
        assert (row.state, row.attempt) == (State.PENDING, new)
        for writer in (*writers, owner):
            await writer.close()
        epoch = new


async def test_a_closed_writer_has_written_what_it_was_given(
    store: PipelineStore, leader: Lease, engine: AsyncEngine
) -> None:
    run_id, epoch = await _run(store, leader)
    writer = TransitionWriter(engine)
    pending = asyncio.create_task(writer.write(Transition(run_id, epoch, run=RunChange(State.RUNNING))))
    await asyncio.sleep(0)
    await writer.close()
    await pending
    assert (await store.get_snapshot(run_id)).run.state is State.RUNNING
    with pytest.raises(Unavailable):
        await writer.write(Transition(run_id, epoch, run=RunChange(State.FAILED)))


async def test_a_transition_that_postgres_refuses_fails_alone(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    spec = _spec()
    runs: dict[str, int] = {}
    for key in ("good", "bad", "fine"):
        run_id, _is_new = await store.add_run(leader, spec, {}, Submission(spec.to_json(), {}, key))
        epoch = await store.assign(leader, run_id, "executor")
        assert epoch is not None
        runs[run_id] = epoch
    good, bad, fine = runs

    def transition(run_id: str, error: str | None) -> Transition:
        return Transition(run_id, runs[run_id], [StepRun("train", WHOLE_STEP, State.FAILED, error=error)])

    results = await asyncio.gather(
        writer.write(transition(good, "plain")),
        writer.write(transition(bad, "with a NUL \x00")),
        writer.write(transition(fine, None)),
        return_exceptions=True,
    )
    assert [type(result) for result in (results[0], results[2])] == [type(None), type(None)]
    assert isinstance(results[1], Exception)
    states = {
        run_id: {row.step: row.state for row in (await store.get_snapshot(run_id)).step_runs}["train"]
        for run_id in runs
    }
    assert states == {good: State.FAILED, bad: State.PENDING, fine: State.FAILED}


async def test_an_output_keeps_its_keys_in_order_and_its_numbers(
    store: PipelineStore, leader: Lease, writer: TransitionWriter
) -> None:
    spec = _spec()
    run_id, _is_new = await store.add_run(leader, spec, {}, Submission(spec.to_json(), {}, "order"))
    epoch = await store.assign(leader, run_id, "executor")
    assert epoch is not None
    value = {"bb": 1, "a": 1e23, "c": 1e16, "aa": 1.0}
    row = StepRun("train", WHOLE_STEP, State.SUCCEEDED, output={"kind": "json", "value": value})
    await writer.write(Transition(run_id, epoch, [row]))
    stored = next(step for step in (await store.get_snapshot(run_id)).step_runs if step.step == "train")
    assert stored.output is not None
    assert list(stored.output["value"].items()) == list(value.items())
    assert [type(number) for number in stored.output["value"].values()] == [int, float, float, float]
