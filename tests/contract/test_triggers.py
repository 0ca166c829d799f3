"""Triggers on Postgres: each event counts once, however late it is committed, and no loop goes on for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.errors import Fenced, InvalidInput, NotFound, Overloaded, PermissionDenied
from mlplat.pipelines.automation import events, service
from mlplat.pipelines.automation.firings import FiringState
from mlplat.pipelines.automation.triggers import Kind, PipelineFilter, RegistryFilter, WebhookFilter
from mlplat.pipelines.automation.webhooks import Auth
from mlplat.pipelines.machine import Changes
from mlplat.pipelines.model import State, Submission
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.submissions import SubmissionStore
from mlplat.pipelines.transitions import Transition, TransitionWriter
from mlplat.registry.model import Command, CreateModel, CreateVersion, DeleteVersion, SetAlias, SetVersionTag
from mlplat.registry.service import RegistryService
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.runs import RunStore
from tests.contract.automation import Leader, Scene, definition
from tests.registry import registry_service

NOW = datetime(2026, 1, 5, 9, tzinfo=UTC)
BEARER = {"authorization": "Bearer 0123456789abcdef"}


@pytest.fixture
async def scene(engine: AsyncEngine) -> AsyncIterator[Scene]:
    scene = Scene(engine)
    yield scene
    await scene.close()


@pytest.fixture
async def registry(engine: AsyncEngine) -> AsyncIterator[RegistryService]:
    registry = registry_service(engine)
    await registry.start()
    yield registry
    await registry.stop()


async def apply(registry: RegistryService, *commands: Command) -> None:
    for command in commands:
        await registry.execute(random.randbytes(8).hex(), [command])


_EVENT = text(
    "INSERT INTO registry_event (request_id, kind, name, command, answer, epoch) VALUES (:id, 'CreateVersion', :name, "
    "jsonb_build_object('name', CAST(:name AS text), 'version', NULL), '{\"version\": 1}', 1)"
)


async def happen(connection: AsyncConnection, name: str) -> None:
    """An event of the registry, in the connection's transaction."""
    await connection.execute(_EVENT, {"id": name, "name": name})


async def commit_event(scene: Scene, name: str) -> None:
    async with scene.engine.begin() as connection:
        await happen(connection, name)


async def abouts(scene: Scene) -> list[str]:
    """The parameter ``about`` of each run."""
    return sorted(run.params["about"] for run in await scene.runs())


async def end(scene: Scene, run_id: str, state: State = State.SUCCEEDED) -> None:
    """The run ends, as the leader ends those that wait."""
    leader = scene.leaders[-1]
    store = SubmissionStore(scene.engine, leader.lease)
    assert await store.end_waiting(run_id, state, "")
    await store.close()


async def submit_and_end(scene: Scene, leader: Leader, name: str, **fields: Any) -> str:
    run_id = await submit(leader, name)
    await end(scene, run_id, **fields)
    return run_id


async def submit(leader: Leader, name: str, source: str = "") -> str:
    return await leader.submit(Submission(bytes(definition(name).raw), {}, random.randbytes(8).hex(), source=source))


MODEL = {"about": "${{ trigger.event.model }}"}


async def test_a_version_and_an_alias_become_runs(scene: Scene, registry: RegistryService) -> None:
    fields = ("kind", "model", "version", "alias", "semantic_version", "signature")
    about = {"about": " ".join(f"${{{{ trigger.event.{field} }}}}" for field in fields)}
    await scene.trigger(RegistryFilter(model="dig*"), "versions", params=about, created_by="ann")
    await scene.trigger(RegistryFilter(events=["alias_set"], alias="champion"), "aliases", params=about)
    leader = await scene.leader()
    assert await leader.look() == service.LOOK_S
    await apply(
        registry, CreateModel("digits"), CreateModel("other"), CreateVersion("digits", "s", "u", signature="{}"),
        CreateVersion("other", "s", "u"), SetAlias("digits", "challenger", 1), SetAlias("digits", "champion", 1),
        SetVersionTag("digits", 1, "k", "v"), DeleteVersion("digits", 1),
    )  # fmt: skip
    await leader.look()
    assert await abouts(scene) == [
        "alias_set digits 1 champion null null", "version_created digits 1 null 1.0.0 null",
    ]  # fmt: skip
    versions = next(run for run in await scene.runs() if run.source == "trigger:versions")
    assert versions.submitted_by == "ann"
    found = await scene.store.get_trigger("versions")
    assert found.last_run_id == versions.run_id
    [firing] = await scene.firings("trigger:versions")
    assert versions.idempotency_key == f"trigger:versions:{firing.firing.event_id}"
    await leader.look()
    assert len(await scene.runs()) == 2


async def test_an_event_that_is_committed_late_is_not_lost(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL)
    leader = await scene.leader()
    async with scene.engine.connect() as late, late.begin() as transaction:
        await happen(late, "late")
        await commit_event(scene, "early")
        await leader.look()
        assert await abouts(scene) == ["early"]  # which does not wait for the other one
        await transaction.commit()
    await commit_event(scene, "third")
    for _twice in range(2):
        await leader.look()
    assert await abouts(scene) == ["early", "late", "third"]


async def test_an_event_that_is_never_committed_is_none(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL)
    leader = await scene.leader()
    async with scene.engine.connect() as late, late.begin() as transaction:
        await happen(late, "late")
        await commit_event(scene, "early")
        await leader.look()
        await transaction.rollback()
    await commit_event(scene, "third")
    await leader.look()
    assert await abouts(scene) == ["early", "third"]


async def test_of_many_writers_no_event_is_lost_or_counted_twice(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL, max_per_hour=100_000)
    names: list[str] = []

    async def write(writer: int) -> None:
        order = random.Random(writer)
        for number in range(25):
            async with scene.engine.begin() as connection:
                for part in range(order.randrange(3)):
                    names.append(f"{writer}/{number}/{part}")
                    await happen(connection, names[-1])
                    for _step in range(order.randrange(4)):
                        await connection.execute(text("SELECT 1"))

    leader = await scene.leader()
    writing = asyncio.gather(*(write(number) for number in range(5)))
    looks = 0
    while not writing.done():
        try:
            await leader.look()
        except Fenced:
            leader = await scene.leader()
        looks += 1
        if looks % 4 == 0:
            leader = await scene.leader()  # another one goes on where this one was
    await writing
    await leader.look()
    while any(item.firing.state is FiringState.PENDING for item in await scene.firings("trigger:t")):  # so many at once
        await leader.look()
    assert looks > 1
    assert await abouts(scene) == sorted(names)


async def test_more_events_than_a_page_of_one_transaction_and_of_several(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL, max_per_hour=100_000)
    leader = await scene.leader()
    async with scene.engine.connect() as late, late.begin():
        await happen(late, "late")
        async with scene.engine.begin() as connection:
            for number in range(events.PAGE + 20):
                await happen(connection, f"one {number}")
        for number in range(events.PAGE + 5):
            await commit_event(scene, f"single {number}")
        await leader.automation._fire_triggers(Kind.REGISTRY)
    await leader.automation._fire_triggers(Kind.REGISTRY)
    found = await scene.execute("SELECT count(*), count(DISTINCT params ->> 'about') FROM firing")
    assert found == [(2 * events.PAGE + 26, 2 * events.PAGE + 26)]


async def test_what_was_there_before_the_trigger_does_not_count(scene: Scene) -> None:
    await commit_event(scene, "before")
    async with scene.engine.connect() as late, late.begin() as transaction:
        await happen(late, "open")
        await commit_event(scene, "before, too")
        await scene.trigger(RegistryFilter(), params=MODEL)
        await commit_event(scene, "after")
        await transaction.commit()
    leader = await scene.leader()
    await leader.look()
    assert await abouts(scene) == ["after", "open"]
    # A second trigger has its own beginning, though the first one has read on.
    await commit_event(scene, "between")
    await scene.trigger(RegistryFilter(), "second", params={"about": "second ${{ trigger.event.model }}"})
    await commit_event(scene, "last")
    await leader.look()
    assert await abouts(scene) == ["after", "between", "last", "open", "second last"]


async def test_replacing_a_trigger_loses_nothing_and_pausing_it_does(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL)
    leader = await scene.leader()
    await commit_event(scene, "before the change")
    await scene.trigger(RegistryFilter(), params={"about": "new ${{ trigger.event.model }}"})
    await leader.look()
    await scene.store.pause_trigger("t", paused=True)
    await scene.trigger(RegistryFilter(), params={"about": "new ${{ trigger.event.model }}"})
    assert (await scene.store.get_trigger("t")).paused  # still
    await commit_event(scene, "while paused")
    await leader.look()
    await scene.store.pause_trigger("t", paused=False)
    await commit_event(scene, "afterwards")
    await leader.look()
    assert await abouts(scene) == ["new afterwards", "new before the change"]


async def test_a_position_from_another_server_is_not_believed(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL)
    leader = await scene.leader()
    await scene.execute("UPDATE registry_event SET txid = 1")
    async with scene.engine.begin() as connection:
        await happen(connection, "restored")
        await connection.execute(text("UPDATE registry_event SET txid = 900000000000"))
    await leader.look()
    assert await abouts(scene) == []


async def test_the_end_of_a_run_starts_another_pipeline(scene: Scene) -> None:
    about = {"about": "${{ trigger.event.pipeline }} ${{ trigger.event.state }}"}
    await scene.trigger(PipelineFilter(pipelines=["prepare"]), "good", params=about)
    await scene.trigger(PipelineFilter(pipelines=["pre*"], states=["FAILED", "CANCELLED"]), "bad", params=about)
    leader = await scene.leader()
    run_id = await submit_and_end(scene, leader, "prepare")
    await submit_and_end(scene, leader, "prepare", state=State.CANCELLED)
    await submit_and_end(scene, leader, "unrelated")
    await submit(leader, "prepare")  # goes on
    child = await submit(leader, "prepare", source=f"step:{run_id}/train/-1/1")
    await end(scene, child)
    for _twice in range(2):
        await leader.look()
    started = [run for run in await scene.runs() if run.source.startswith("trigger:")]
    assert sorted((run.source, run.params["about"]) for run in started) == [
        ("trigger:bad", "prepare CANCELLED"), ("trigger:good", "prepare SUCCEEDED"),
    ]  # fmt: skip
    assert f"trigger:good:{run_id}" in await scene.keys()


async def test_a_run_that_an_executor_ends_counts_with_its_output(scene: Scene) -> None:
    when = "${{ trigger.event.output.rows > `4` }}"
    params = {"size": "${{ trigger.event.output.rows }}"}
    await scene.trigger(PipelineFilter(pipelines=["prepare"], when=when), params=params)
    leader = await scene.leader()
    submissions = SubmissionStore(scene.engine, leader.lease)
    writer = TransitionWriter(scene.engine, "executor")
    for rows in (4, 5):
        run_id = await submit(leader, "prepare")
        epoch = (await submissions.assign({run_id: "executor"}))[run_id]
        run = await PipelineStore(scene.engine).get_run(run_id)
        begun = replace(run, state=State.RUNNING, started_at=NOW)
        await writer.write(Transition.of(run_id, epoch, Changes(1, [], [], begun)))
        await leader.look()
        done = replace(begun, state=State.SUCCEEDED, finished_at=NOW, output={"kind": "json", "value": {"rows": rows}})
        await writer.write(Transition.of(run_id, epoch, Changes(2, [], [], done)))
    for _twice in range(2):
        await leader.look()
    assert [run.params["size"] for run in await scene.runs() if run.source == "trigger:t"] == [5]
    await writer.close()
    await submissions.close()


async def test_pipelines_that_start_each_other_stop_after_one_round(scene: Scene) -> None:
    await scene.trigger(PipelineFilter(pipelines=["a"]), "to_b", parsed=definition("b"))
    await scene.trigger(PipelineFilter(pipelines=["b"]), "to_a", parsed=definition("a"))
    leader = await scene.leader()
    await submit_and_end(scene, leader, "a")
    for _round in range(6):
        await leader.look()
        for run in await scene.runs():
            if run.state == "QUEUED":
                await end(scene, run.run_id)
    assert sorted(run.name for run in await scene.runs()) == ["a", "a", "b"]
    [done, skipped] = await scene.firings("trigger:to_b")
    assert (done.firing.state, skipped.firing.state) == (FiringState.SUBMITTED, FiringState.SKIPPED)
    assert skipped.firing.reason == "it has led to this event itself: to_b → to_a → to_b"


async def test_a_pipeline_does_not_start_itself(scene: Scene) -> None:
    with pytest.raises(InvalidInput, match="it would start itself"):
        await scene.trigger(PipelineFilter(pipelines=["rep*"]))
    with pytest.raises(NotFound):
        await scene.store.get_trigger("t")


@pytest.mark.parametrize("in_child", [False, True])
async def test_a_run_that_registers_a_model_does_not_go_on_for_ever(
    scene: Scene, registry: RegistryService, in_child: bool
) -> None:
    """The tracking run of the version has a tag with the pipeline run, or the sub-pipeline's, that it was made in."""
    await scene.trigger(RegistryFilter(events=["version_created", "alias_set"]), params=MODEL)
    leader = await scene.leader()
    await apply(registry, CreateModel("m"), CreateVersion("m", "s", "u"))
    await leader.look()
    [first] = await scene.runs()
    maker = first.run_id
    if in_child:
        maker = await submit(leader, "inner", source=f"step:{maker}/train/-1/1")
    experiment = await ExperimentStore(scene.engine, "mlflow-artifacts:").create("e", None, {})
    await RunStore(scene.engine).create("tracked", experiment, None, "", NOW, {"mlplat.pipelineRun": maker})
    await apply(registry, CreateVersion("m", "s", "u", "tracked"), SetAlias("m", "champion", 2))
    await leader.look()
    states = [found.firing.state for found in await scene.firings("trigger:t")]
    assert states == [FiringState.SUBMITTED, FiringState.SKIPPED, FiringState.SKIPPED]
    await apply(registry, SetAlias("m", "champion", 1))  # by hand, to a version of nobody's run
    await leader.look()
    assert (await scene.firings("trigger:t"))[-1].firing.state is FiringState.SUBMITTED


async def test_events_beyond_the_limit_are_skipped_and_say_so(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL, max_per_hour=2)
    leader = await scene.leader()
    for number in range(3):
        await commit_event(scene, f"first {number}")
    await leader.look()
    await commit_event(scene, "another")
    await leader.look()
    states = [found.firing.state for found in await scene.firings("trigger:t")]
    assert states == [FiringState.SUBMITTED] * 2 + [FiringState.SKIPPED] * 2
    await scene.execute("UPDATE firing SET created_at = created_at - interval '61 minutes'")
    await commit_event(scene, "an hour later")
    await leader.look()
    assert "an hour later" in await abouts(scene)


async def test_a_leader_that_dies_after_its_decision_leaves_it_to_the_next(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL)
    first = await scene.leader()
    await commit_event(scene, "once")
    hanging = asyncio.Event()

    async def hang(_submission: Any) -> None:
        hanging.set()
        await asyncio.Event().wait()

    first.after = hang
    await first.automation.look()
    await asyncio.wait_for(hanging.wait(), 10)
    await first.die()
    second = await scene.leader()
    for _twice in range(2):
        await second.look()
    assert await abouts(scene) == ["once"]
    assert [found.firing.state for found in await scene.firings("trigger:t")] == [FiringState.SUBMITTED]


async def test_a_leader_that_was_replaced_does_not_move_the_position(scene: Scene) -> None:
    await scene.trigger(RegistryFilter(), params=MODEL)
    old = await scene.leader()
    new = await scene.leader()
    await commit_event(scene, "once")
    with pytest.raises(Fenced):
        await old.automation.look()
    assert await scene.execute("SELECT * FROM event_cursor") == []
    await new.look()
    assert await abouts(scene) == ["once"]


# -- webhooks --------------------------------------------------------------------------------


async def fire(scene: Scene, event: dict[str, Any], event_id: str = "d1", **changes: Any) -> Any:
    arguments: dict[str, Any] = {"headers": BEARER, "body": b""} | changes
    return await scene.store.fire("t", arguments["headers"], arguments["body"], event, event_id)


async def test_a_webhook_is_durable_before_it_is_answered_and_fires_once(scene: Scene) -> None:
    await scene.trigger(WebhookFilter(), params={"about": "${{ trigger.event.ref }}"})
    for _repeat in range(3):
        decided = await fire(scene, {"ref": "main"})
        assert decided.firing.state is FiringState.PENDING
    await asyncio.gather(*(fire(scene, {"ref": "main"}, "d2") for _ in range(5)))
    leader = await scene.leader()
    await leader.look()
    assert await scene.keys() == ["trigger:t:d1", "trigger:t:d2"]
    repeated = await fire(scene, {"ref": "other"})
    assert (repeated.firing.state, repeated.run_id) == (FiringState.SUBMITTED, (await scene.runs())[0].run_id)


async def test_a_webhook_whose_condition_is_not_met_does_nothing(scene: Scene) -> None:
    await scene.trigger(WebhookFilter(when="${{ trigger.event.ref == 'main' }}"))
    assert await fire(scene, {"ref": "other"}) is None
    assert await fire(scene, {"ref": "main"}) is not None


async def test_who_may_fire(scene: Scene) -> None:
    await scene.trigger(WebhookFilter())
    with pytest.raises(PermissionDenied):
        await fire(scene, {}, headers={})
    with pytest.raises(NotFound):
        await scene.store.fire("nobody", BEARER, b"", {}, "d")
    await scene.store.pause_trigger("t", paused=True)
    with pytest.raises(PermissionDenied):
        await fire(scene, {}, headers={})
    with pytest.raises(InvalidInput, match="trigger 't' is paused"):
        await fire(scene, {})
    await scene.trigger(RegistryFilter(), "other")
    with pytest.raises(InvalidInput, match="only webhook triggers can be fired"):
        await scene.store.fire("other", BEARER, b"", {}, "d")
    assert await scene.firings("trigger:t") == []


async def test_a_webhook_that_fires_too_often_is_told_so(scene: Scene) -> None:
    await scene.trigger(WebhookFilter(), max_per_hour=2)
    for number in range(2):
        await fire(scene, {}, f"d{number}")
    with pytest.raises(Overloaded, match="has fired 2 times within an hour"):
        await fire(scene, {}, "d3")
    assert await fire(scene, {}, "d1") is not None  # a repeat is no further one


async def test_a_secret_is_not_stored_and_stays_when_none_is_given(scene: Scene) -> None:
    await scene.trigger(WebhookFilter())
    [(stored,)] = await scene.execute("SELECT secret FROM trigger")
    assert b"0123456789abcdef" not in bytes(stored)
    await scene.trigger(WebhookFilter(), secret=None)
    assert await fire(scene, {}) is not None
    await scene.trigger(WebhookFilter(), secret="another secret, longer")
    with pytest.raises(PermissionDenied):
        await fire(scene, {}, "d2")
    with pytest.raises(InvalidInput, match="signature authentication needs one"):
        await scene.trigger(WebhookFilter(), auth=Auth.SIGNATURE, secret=None)


async def test_a_name_keeps_its_kind(scene: Scene) -> None:
    await scene.trigger(WebhookFilter())
    with pytest.raises(InvalidInput, match="'t' is a webhook trigger; delete it first"):
        await scene.trigger(RegistryFilter())
    await scene.store.delete_trigger("t")
    await scene.trigger(RegistryFilter())
    assert [found.name for found in await scene.store.find_triggers(10, 0)] == ["t"]
