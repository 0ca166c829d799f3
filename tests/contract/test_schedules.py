"""Schedules on Postgres: each fire time gives one run, whoever leads and dies when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import Fenced, InvalidInput, InvalidPipeline, NotFound, Overloaded, Unavailable
from mlplat.pipelines.automation import service
from mlplat.pipelines.automation.firings import FiringState
from mlplat.pipelines.automation.leader import Advance, LeaderStore
from mlplat.pipelines.automation.schedules import CatchUp
from mlplat.pipelines.model import Submission
from tests.contract.automation import Scene, definition
from tests.contract.waiting import until


@pytest.fixture
async def scene(engine: AsyncEngine) -> AsyncIterator[Scene]:
    scene = Scene(engine)
    yield scene
    await scene.close()


async def test_a_fire_time_becomes_a_run(scene: Scene) -> None:
    await scene.schedule(
        params={"about": "${{ trigger.time }}", "size": 3}, time_zone="Europe/Berlin", created_by="ann"
    )
    leader = await scene.leader()
    assert await leader.look() == service.IDLE_LOOK_S
    assert await scene.runs() == []
    scene.clock.forward(hours=1, seconds=1)
    assert await leader.look() == 0
    [run] = await scene.runs()
    assert (run.idempotency_key, run.source) == ("schedule:s:2031-01-06T10:00:00Z", "schedule:s")
    assert run.params == {"about": "2031-01-06T11:00:00+01:00", "size": 3}
    assert (run.submitted_by, run.state) == ("ann", "QUEUED")
    found = await scene.store.get_schedule("s")
    assert (found.next_at, found.last_at, found.last_run_id) == (
        datetime(2031, 1, 6, 11, tzinfo=UTC), datetime(2031, 1, 6, 10, tzinfo=UTC), run.run_id,
    )  # fmt: skip
    [recorded] = await scene.firings("schedule:s")
    assert (recorded.firing.state, recorded.run_id, recorded.run_state) == (FiringState.SUBMITTED, run.run_id, "QUEUED")
    for _again in range(3):
        await leader.look()
    assert len(await scene.runs()) == 1


async def test_the_leader_waits_for_the_next_fire_time_exactly(scene: Scene) -> None:
    leader = await scene.leader()
    await scene.schedule(cron="30 9 * * *")
    scene.clock.forward(minutes=29, seconds=58.5)
    assert await leader.look() == 1.5
    scene.clock.forward(seconds=1.5)
    assert await leader.look() == 0
    assert await leader.look() == service.IDLE_LOOK_S
    assert await scene.keys() == ["schedule:s:2031-01-06T09:30:00Z"]


@pytest.mark.parametrize(
    ("catch_up", "hours", "states"),
    [
        (CatchUp.SKIP, [], ["SKIPPED"]),
        (CatchUp.LATEST, [12], ["SKIPPED", "SUBMITTED"]),
        (CatchUp.ALL, [10, 11, 12], ["SUBMITTED"] * 3),
    ],
)
async def test_after_the_platform_was_away(
    scene: Scene, catch_up: CatchUp, hours: list[int], states: list[str]
) -> None:
    await scene.schedule(catch_up=catch_up)
    scene.clock.forward(hours=3, minutes=30)
    leader = await scene.leader()
    await leader.look()
    assert await scene.keys() == [f"schedule:s:2031-01-06T{hour}:00:00Z" for hour in hours]
    assert [found.firing.state for found in await scene.firings("schedule:s")] == states
    assert (await scene.store.get_schedule("s")).next_at == datetime(2031, 1, 6, 13, tzinfo=UTC)


async def test_many_schedules_of_one_moment_all_fire(scene: Scene) -> None:
    count = service.SCHEDULES_AT_ONCE + 20
    for number in range(count):
        await scene.schedule(f"s{number:03}", params={"size": number})
    scene.clock.forward(hours=1)
    leader = await scene.leader()
    while await leader.look() == 0 or len(await scene.runs()) < count:
        pass
    assert [run.params["size"] for run in await scene.runs()] == list(range(count))


async def test_a_leader_that_dies_after_its_decision_leaves_it_to_the_next(scene: Scene) -> None:
    await scene.schedule()
    scene.clock.forward(hours=1)
    first = await scene.leader()
    begun = asyncio.Event()

    async def hang(_submission: Submission) -> None:
        begun.set()
        await asyncio.Event().wait()

    first.before = hang
    await first.automation.look()
    await asyncio.wait_for(begun.wait(), 10)
    await first.die()
    assert await scene.runs() == []
    second = await scene.leader()
    scene.clock.forward(minutes=5)
    await second.look()
    assert await scene.keys() == ["schedule:s:2031-01-06T10:00:00Z"]


async def test_a_leader_that_dies_between_commit_and_answer_leaves_one_run(scene: Scene) -> None:
    await scene.schedule(params={"size": 5})
    scene.clock.forward(hours=1)
    first = await scene.leader()
    committed = asyncio.Event()

    async def hang(_submission: Submission) -> None:
        committed.set()
        await asyncio.Event().wait()

    first.after = hang
    await first.automation.look()
    await asyncio.wait_for(committed.wait(), 10)
    await first.die()
    [before] = await scene.runs()
    assert [found.firing.state for found in await scene.firings("schedule:s")] == [FiringState.PENDING]
    await scene.schedule(params={"size": 6})  # what was decided stays as it was decided
    second = await scene.leader()
    scene.clock.forward(minutes=5)
    await second.look()
    [after] = await scene.runs()
    assert (after.run_id, after.params["size"]) == (before.run_id, 5)
    [recorded] = await scene.firings("schedule:s")
    assert (recorded.firing.state, recorded.run_id) == (FiringState.SUBMITTED, before.run_id)


async def test_a_leader_that_was_replaced_decides_nothing_and_submits_nothing(scene: Scene) -> None:
    await scene.schedule()
    old = await scene.leader()
    new = await scene.leader()
    scene.clock.forward(hours=1)
    with pytest.raises(Fenced):
        await old.automation.look()
    assert await scene.firings("schedule:s") == []
    assert (await scene.store.get_schedule("s")).next_at == scene.clock.now
    await new.look()
    assert len(await scene.runs()) == 1
    # One that was replaced between its decision and its act.
    newest = await scene.leader()
    scene.clock.forward(hours=1)
    await newest.automation._fire_schedules(scene.clock.now)
    last = await scene.leader()
    await newest.automation._submit_pending(scene.clock.now)
    await newest.automation.settle()
    assert newest.lease.lost.is_set()
    assert len(await scene.runs()) == 1
    await last.look()
    assert len(await scene.runs()) == 2


async def test_leaders_that_follow_one_another_fire_each_time_once(scene: Scene) -> None:
    await scene.schedule(cron="*/5 * * * *", catch_up=CatchUp.ALL)
    for _round in range(12):
        old = scene.leaders[-1] if scene.leaders else await scene.leader()
        scene.clock.forward(minutes=5)
        looking = asyncio.create_task(old.look())
        new = await scene.leader()
        await asyncio.gather(looking, return_exceptions=True)
        await new.look()
    times = [f"2031-01-06T{9 + minute // 60:02}:{minute % 60:02}:00Z" for minute in range(5, 65, 5)]
    assert await scene.keys() == [f"schedule:s:{moment}" for moment in times]


async def test_a_schedule_that_was_changed_meanwhile_is_looked_at_again(scene: Scene) -> None:
    await scene.schedule(params={"size": 1})
    leader = await scene.leader()
    scene.clock.forward(hours=1)
    store = LeaderStore(scene.engine, leader.lease, scene.clock.sql)
    [found], _definitions = await store.find_due(scene.clock.now, 10)
    await scene.schedule(params={"size": 2})
    await store.advance([Advance(found, datetime(2031, 1, 6, 11, tzinfo=UTC), [])])
    assert (await scene.store.get_schedule("s")).next_at == scene.clock.now
    await leader.look()
    assert [run.params["size"] for run in await scene.runs()] == [2]


async def test_changing_what_runs_loses_no_time_and_changing_when_starts_afresh(scene: Scene) -> None:
    await scene.schedule()
    scene.clock.forward(hours=1)
    await scene.schedule(params={"size": 1})
    assert (await scene.store.get_schedule("s")).next_at == scene.clock.now
    await scene.schedule(cron="30 * * * *")
    assert (await scene.store.get_schedule("s")).next_at == datetime(2031, 1, 6, 10, 30, tzinfo=UTC)


async def test_a_paused_schedule_does_nothing_and_goes_on_from_its_resumption(scene: Scene) -> None:
    await scene.schedule(catch_up=CatchUp.ALL)
    leader = await scene.leader()
    for _twice in range(2):
        assert (await scene.store.pause_schedule("s", paused=True)).next_at is None
    scene.clock.forward(hours=3, minutes=1)
    await leader.look()
    for _twice in range(2):
        resumed = await scene.store.pause_schedule("s", paused=False)
        assert resumed.next_at == datetime(2031, 1, 6, 13, tzinfo=UTC)
    await leader.look()
    assert await scene.runs() == []


async def test_setting_a_schedule_again_leaves_it_paused(scene: Scene) -> None:
    await scene.schedule(paused=True)
    await scene.schedule(params={"size": 1})
    found = await scene.store.get_schedule("s")
    assert (found.paused, found.next_at) == (True, None)
    await scene.schedule(params={"size": 1}, paused=False)
    assert (await scene.store.get_schedule("s")).next_at == datetime(2031, 1, 6, 10, tzinfo=UTC)


async def test_a_deleted_schedule_begins_nothing_that_it_has_not_begun(scene: Scene) -> None:
    await scene.schedule()
    leader = await scene.leader()
    scene.clock.forward(hours=1)
    await leader.automation._fire_schedules(scene.clock.now)
    await scene.store.delete_schedule("s")
    await leader.look()
    assert await scene.runs() == []
    with pytest.raises(NotFound, match="No schedule with name=s exists"):
        await scene.store.delete_schedule("s")


async def test_what_is_away_is_tried_again_later(scene: Scene) -> None:
    await scene.schedule()
    leader = await scene.leader()
    scene.clock.forward(hours=1)
    errors: list[Exception] = [Unavailable("the store is away"), Overloaded("too many")]

    async def fail(_submission: Submission) -> None:
        if errors:
            raise errors.pop(0)

    leader.before = fail
    await leader.look()
    assert await leader.look() == 1.0  # not before a second has passed
    assert len(leader.submissions) == 1
    scene.clock.forward(seconds=1)
    await leader.look()
    [waiting] = await scene.firings("schedule:s")
    assert (waiting.firing.state, waiting.tries, waiting.firing.reason) == (FiringState.PENDING, 2, "too many")
    scene.clock.forward(seconds=2)
    await leader.look()
    [done] = await scene.firings("schedule:s")
    assert (done.firing.state, done.firing.reason) == (FiringState.SUBMITTED, "")
    assert len(await scene.runs()) == 1


async def test_what_stays_away_is_given_up(scene: Scene) -> None:
    await scene.schedule()
    leader = await scene.leader()
    scene.clock.forward(hours=1)

    async def fail(_submission: Submission) -> None:
        raise Unavailable("the store is away")

    leader.before = fail
    for _try in range(service.MAX_TRIES):
        await leader.look()
        scene.clock.forward(seconds=service.MAX_DELAY_S)
    firing = (await scene.firings("schedule:s"))[0].firing
    assert firing.state is FiringState.FAILED
    assert firing.reason == f"given up after {service.MAX_TRIES} tries: the store is away"


async def test_a_break_of_the_connection_leaves_the_firing_for_the_next_look(scene: Scene) -> None:
    await scene.schedule()
    leader = await scene.leader()
    scene.clock.forward(hours=1)
    errors: list[Exception] = [OperationalError(None, None, Exception("gone"))]

    async def fail(_submission: Submission) -> None:
        if errors:
            raise errors.pop()

    leader.before = fail
    await leader.look()
    assert await scene.runs() == []
    await leader.look()
    assert len(await scene.runs()) == 1


async def test_a_refusal_is_recorded_and_the_schedule_goes_on(scene: Scene) -> None:
    await scene.schedule()
    leader = await scene.leader()

    async def fail(_submission: Submission) -> None:
        raise InvalidPipeline("steps.a.uses: no module named 'os'")

    leader.before = fail
    scene.clock.forward(hours=1)
    await leader.look()
    leader.before = None
    scene.clock.forward(hours=1)
    await leader.look()
    failed, done = await scene.firings("schedule:s")
    assert (failed.firing.state, failed.firing.reason) == (FiringState.FAILED, "steps.a.uses: no module named 'os'")
    assert done.firing.state is FiringState.SUBMITTED


async def test_a_pipeline_that_would_rather_not_run_twice_at_once_is_skipped(scene: Scene) -> None:
    concurrency = {"key": "one", "limit": 1, "when_full": "reject"}
    await scene.schedule(parsed=definition(concurrency=concurrency))
    leader = await scene.leader()

    async def full(_submission: Submission) -> None:
        raise Overloaded("concurrency key 'one' is full")

    leader.before = full
    scene.clock.forward(hours=1)
    await leader.look()
    firing = (await scene.firings("schedule:s"))[0].firing
    assert (firing.state, firing.reason) == (FiringState.SKIPPED, "concurrency key 'one' is full")


async def test_the_loop_wakes_when_it_is_told_to(scene: Scene) -> None:
    leader = await scene.leader()
    leader.automation.start()
    await scene.schedule()
    scene.clock.forward(hours=1)
    leader.automation.wake()

    async def has_run() -> bool:
        return len(await scene.runs()) == 1

    await until(has_run)


async def test_the_loop_ends_with_the_lease(scene: Scene) -> None:
    old = await scene.leader()
    await scene.leader()
    await scene.schedule()
    scene.clock.forward(hours=1)
    old.automation.start()
    await asyncio.wait_for(old.lease.lost.wait(), 10)


async def test_old_firings_are_forgotten_and_their_runs_stay(scene: Scene) -> None:
    await scene.schedule()
    leader = await scene.leader()
    for _hour in range(2):
        scene.clock.forward(hours=1)
        await leader.look()
    await scene.execute("UPDATE firing SET created_at = created_at - interval '31 days' WHERE event_id LIKE '%T10%'")
    await LeaderStore(scene.engine, leader.lease).prune()
    assert [found.firing.event_id for found in await scene.firings("schedule:s")] == ["2031-01-06T11:00:00Z"]
    assert len(await scene.runs()) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cron": "0 25 * * *"}, "hour '25' is not valid"),
        ({"time_zone": "Europe/Berln"}, "did you mean Europe/Berlin"),
        ({"params": {"sise": 1}}, "parameters.sise: unknown"),
        ({"params": {"size": "${{ trigger.date }}"}}, "parameters.size: expected int, got str '2031-01-06'"),
        ({"ends_at": datetime(2030, 1, 1, tzinfo=UTC)}, "would never fire"),
    ],
)
async def test_a_bad_schedule_is_refused_and_leaves_the_old_one(
    scene: Scene, fields: dict[str, object], message: str
) -> None:
    await scene.schedule()
    before = await scene.store.get_schedule("s")
    with pytest.raises(InvalidInput) as caught:
        await scene.schedule(**fields)  # type: ignore[arg-type] # whatever a test needs
    assert message in caught.value.message
    assert await scene.store.get_schedule("s") == before


async def test_schedules_are_listed_by_name(scene: Scene) -> None:
    for name in ("b", "a", "c"):
        await scene.schedule(name)
    assert [found.name for found in await scene.store.find_schedules(2, 0)] == ["a", "b"]
    assert [found.name for found in await scene.store.find_schedules(2, 2)] == ["c"]
    definition_of = await scene.store.get_definition((await scene.store.get_schedule("a")).digest)
    assert definition_of.name == "report"
