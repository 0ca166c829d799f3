"""Policies of models at work: gates with real metrics, what the history and the list of refusals say, and expiry."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from mlplat.db.lease import LeaseKeeper
from mlplat.db.snapshots import Snapshot
from mlplat.errors import AlreadyExists, Conflict, Fenced, InvalidInput, NotFound, PermissionDenied
from mlplat.events.log import EventLog
from mlplat.events.model import Cursor
from mlplat.metrics.model import Point
from mlplat.registry.history import Subject
from mlplat.registry.history_store import RegistryHistory
from mlplat.registry.model import (
    Command,
    CreateModel,
    CreateVersion,
    Decide,
    DeleteModel,
    DeleteVersion,
    Origin,
    RenameModel,
    RequestMove,
    SetAlias,
    SetPolicy,
    SetStage,
    Stage,
    WithdrawMove,
)
from mlplat.registry.move_store import MoveStore
from mlplat.registry.moves import MoveState
from mlplat.registry.service import RegistryService
from mlplat.registry.store import RegistryStore
from mlplat.tracking.datasets import DatasetStore
from mlplat.tracking.inputs import Dataset, DatasetInput
from tests.contract.chdb import batch, unique
from tests.contract.lifecycle import World

POLICY: dict[str, Any] = {
    "roles": {"leads": ["ann", "bob", "eve"]},
    "managed_by": "leads",
    "stages": {"Production": {"approvals": 2, "role": "leads"}},
    "aliases": {
        "champion": {
            "gates": [{"metric": "accuracy", "at_least": 0.9, "not_worse_than": "@champion", "tolerance": 0.01}]
        }
    },
}


@dataclass(frozen=True)
class Desk:
    """A registry with metrics, and its readers."""

    world: World
    service: RegistryService
    store: RegistryStore
    moves: MoveStore
    history: RegistryHistory
    name: str

    async def do(self, user: str, *commands: Command, reason: str = "", key: str = "") -> dict[str, Any]:
        """The first answer to one request of these commands."""
        return (await self.service.execute(key or uuid.uuid4().hex, commands, Origin(user, reason)))[0]

    async def measured_version(self, experiment: int, **metrics: float) -> int:
        """A version of a run with these metrics."""
        run_id = await self.world.run(experiment, points=0)
        points = [Point(key, value, 1_000, 0) for key, value in metrics.items()]
        await self.world.shard.service.append(batch(run_id, points))
        command = CreateVersion(self.name, f"runs:/{run_id}/model", "s3://b/m", run_id=run_id)
        return int((await self.do("", command))["version"])

    async def ask(self, user: str, version: int, stage: str = "Production", reason: str = "") -> int:
        """The number of a new request."""
        command = RequestMove(self.name, Subject.STAGE, stage, version)
        return int((await self.do(user, command, reason=reason))["move_id"])

    async def stage(self, version: int) -> Stage:
        return (await self.store.get_version(self.name, version)).stage


@pytest.fixture
async def desk(world: World) -> AsyncIterator[Desk]:
    """A model with two versions and a policy."""
    engine = world.engine
    service = RegistryService(engine, LeaseKeeper(engine, "registry", "holder", 600.0), world.shard.query)
    await service.start()
    desk = Desk(world, service, RegistryStore(engine), MoveStore(engine), RegistryHistory(engine), unique("model"))
    await desk.do("ann", CreateModel(desk.name))
    for _ in range(2):
        await desk.do("ann", CreateVersion(desk.name, "s3://b/m", "s3://b/m"))
    await desk.do("ann", SetPolicy(desk.name, POLICY))
    yield desk
    await service.stop()


async def test_the_last_approval_makes_the_move_and_the_history_says_whose_it_is(desk: Desk) -> None:
    number = await desk.ask("ann", 1, reason="better")
    assert await desk.do("bob", Decide(desk.name, number, True), reason="fine") == {
        "state": "OPEN", "given": 1, "needed": 2,
    }  # fmt: skip
    assert await desk.stage(1) == Stage.NONE
    assert (await desk.do("eve", Decide(desk.name, number, True)))["state"] == "APPROVED"
    assert await desk.stage(1) == Stage.PRODUCTION
    [last, *_older] = await desk.history.changes(desk.name, Subject.STAGE, "1", 10)
    assert (last.change.before, last.change.after, last.user_id) == ("None", "Production", "ann")
    assert last.reason == f"better (request {number}, approved by bob, eve)"
    move = await desk.moves.get_move(desk.name, number)
    assert (move.state, move.by, move.reason, move.needed) == (MoveState.APPROVED, "ann", "better", 0)
    assert [(item.by, item.approve, item.reason) for item in move.decisions] == [
        ("bob", True, "fine"),
        ("eve", True, ""),
    ]
    assert move.closed_at is not None


async def test_an_approved_move_is_an_event_like_any_other(desk: Desk) -> None:
    number = await desk.ask("ann", 1)
    for user in ("bob", "eve"):
        await desk.do(user, Decide(desk.name, number, True))
    page = await EventLog(desk.world.engine).read(Cursor(Snapshot(1, frozenset())), 1_000)
    told = [(event.kind, event.body["by"]) for event in page.events if desk.name in event.models]
    assert told[-4:] == [
        ("move_requested", "ann"), ("move_decided", "bob"), ("move_decided", "eve"), ("stage_set", "ann"),
    ]  # fmt: skip


async def test_a_repeated_approval_is_answered_again_and_moves_nothing_twice(desk: Desk) -> None:
    number = await desk.ask("ann", 1)
    await desk.do("bob", Decide(desk.name, number, True))
    first = await desk.do("eve", Decide(desk.name, number, True), key="the key")
    assert await desk.do("eve", Decide(desk.name, number, True), key="the key") == first
    assert len(await desk.history.changes(desk.name, Subject.STAGE, "1", 10)) == 2


async def test_gates_are_judged_by_the_metrics_of_the_runs(desk: Desk) -> None:
    experiment = await desk.world.experiment()
    good, bad, less, worse = [
        await desk.measured_version(experiment, accuracy=accuracy) for accuracy in (0.95, 0.85, 0.945, 0.93)
    ]
    with pytest.raises(PermissionDenied, match=r"accuracy is 0.85, and has to be at least 0.9"):
        await desk.do("zoe", SetAlias(desk.name, "champion", bad))
    await desk.do("zoe", SetAlias(desk.name, "champion", good))
    with pytest.raises(PermissionDenied, match=rf"at least 0.94 beside 0.95 of version {good} \(@champion\)"):
        await desk.do("zoe", SetAlias(desk.name, "champion", worse))
    await desk.do("zoe", SetAlias(desk.name, "champion", less))
    with pytest.raises(PermissionDenied, match="names no run"):
        await desk.do("zoe", SetAlias(desk.name, "champion", 1))
    assert (await desk.store.get_model(desk.name)).aliases == {"champion": less}


async def test_one_command_that_is_refused_keeps_all_of_its_request_from_happening(desk: Desk) -> None:
    experiment = await desk.world.experiment()
    bad = await desk.measured_version(experiment, accuracy=0.5)
    with pytest.raises(PermissionDenied):
        await desk.do("zoe", SetAlias(desk.name, "free", 1), SetAlias(desk.name, "champion", bad))
    assert (await desk.store.get_model(desk.name)).aliases == {}


async def test_gates_can_ask_for_the_same_datasets(desk: Desk) -> None:
    rule = {"gates": [{"metric": "accuracy", "not_worse_than": "@champion", "same_data": True}]}
    await desk.do("ann", SetPolicy(desk.name, {**POLICY, "aliases": {"champion": rule}}))
    experiment, versions = await desk.world.experiment(), []
    for digest in ("1f", "2e", "1f"):
        run_id = await desk.world.run(experiment, points=0)
        await desk.world.shard.service.append(batch(run_id, [Point("accuracy", 0.9, 1_000, 0)]))
        inputs = [DatasetInput(Dataset("digits", digest, "local", "here"))]
        await DatasetStore(desk.world.engine).log_inputs(run_id, inputs, [])
        command = CreateVersion(desk.name, "s3://b/m", "s3://b/m", run_id=run_id)
        versions.append(int((await desk.do("", command))["version"]))
    first, other, again = versions
    await desk.do("", SetAlias(desk.name, "champion", first))
    with pytest.raises(PermissionDenied, match="not known to come from the same datasets"):
        await desk.do("", SetAlias(desk.name, "champion", other))
    await desk.do("", SetAlias(desk.name, "champion", again))


async def test_gates_are_judged_again_when_the_move_is_made(desk: Desk) -> None:
    rule = {"approvals": 1, "role": "leads", "gates": [{"metric": "accuracy", "at_least": 0.9}]}
    await desk.do("ann", SetPolicy(desk.name, {**POLICY, "stages": {"Staging": rule}}))
    version = await desk.measured_version(await desk.world.experiment(), accuracy=0.95)
    number = await desk.ask("ann", version, "Staging")
    run_id = (await desk.store.get_version(desk.name, version)).run_id
    assert run_id is not None
    await desk.world.shard.service.append(batch(run_id, [Point("accuracy", 0.5, 2_000, 1)]))
    with pytest.raises(PermissionDenied, match=r"accuracy is 0.5"):
        await desk.do("bob", Decide(desk.name, number, True))
    assert (await desk.moves.get_move(desk.name, number)).decisions == []


async def test_an_expired_request_cannot_be_approved_any_more(desk: Desk) -> None:
    number = await desk.ask("ann", 1)
    await desk.world.execute("UPDATE move_request SET expires_at = clock_timestamp()")
    with pytest.raises(Conflict, match=f"request {number} expired at"):
        await desk.do("bob", Decide(desk.name, number, True))
    assert (await desk.moves.get_move(desk.name, number)).state == MoveState.EXPIRED
    assert await desk.ask("ann", 1) == number + 1
    assert [move.move_id for move in await desk.moves.search_moves(desk.name, MoveState.OPEN, 10)] == [number + 1]


async def test_deleting_a_version_cancels_its_open_requests_but_not_expired_ones(desk: Desk) -> None:
    expired = await desk.ask("ann", 1)
    await desk.world.execute("UPDATE move_request SET expires_at = clock_timestamp()")
    still_open = await desk.ask("ann", 1)
    await desk.do("ann", DeleteVersion(desk.name, 1))
    states = {move.move_id: move.state for move in await desk.moves.search_moves(desk.name, None, 10)}
    assert states == {expired: MoveState.EXPIRED, still_open: MoveState.CANCELLED}


async def test_requests_that_make_no_sense_are_refused(desk: Desk) -> None:
    await desk.ask("ann", 1)
    for user, command, error in (
        ("bob", RequestMove(desk.name, Subject.STAGE, "Production", 1), AlreadyExists),
        ("", RequestMove(desk.name, Subject.STAGE, "Production", 2), PermissionDenied),
        ("ann", RequestMove(desk.name, Subject.STAGE, "Staging", 2), InvalidInput),
        ("ann", RequestMove(desk.name, Subject.STAGE, "Nowhere", 2), InvalidInput),
        ("ann", RequestMove(desk.name, Subject.STAGE, "Production", 9), NotFound),
        ("ann", RequestMove(desk.name, Subject.ALIAS, "latest", 2), InvalidInput),
        ("ann", RequestMove("nobody", Subject.STAGE, "Production", 2), NotFound),
        ("ann", Decide(desk.name, 999, True), NotFound),
        ("ann", WithdrawMove(desk.name, 999), NotFound),
    ):
        with pytest.raises(error):
            await desk.do(user, command)
    assert len(await desk.moves.search_moves(desk.name, None, 10)) == 1


async def test_a_request_needs_enough_others_who_can_approve_it(desk: Desk) -> None:
    policy = {**POLICY, "roles": {"leads": ["ann", "bob"]}}
    await desk.do("ann", SetPolicy(desk.name, policy))
    with pytest.raises(PermissionDenied, match="needs 2 approvals, and leads has 1 others"):
        await desk.ask("Ann ", 1)
    assert await desk.ask("zoe", 1) > 0


async def test_approvals_of_those_who_left_the_role_do_not_count(desk: Desk) -> None:
    number = await desk.ask("zoe", 1)
    await desk.do("ann", Decide(desk.name, number, True))
    await desk.do("bob", SetPolicy(desk.name, {**POLICY, "roles": {"leads": ["bob", "eve"]}}))
    assert (await desk.do("bob", Decide(desk.name, number, True)))["given"] == 1
    assert (await desk.do("eve", Decide(desk.name, number, True)))["state"] == "APPROVED"


async def test_only_managers_change_the_policy_and_rename_or_delete_the_model(desk: Desk) -> None:
    for command in (SetPolicy(desk.name, None), RenameModel(desk.name, unique("other")), DeleteModel(desk.name)):
        for user in ("zoe", ""):
            with pytest.raises(PermissionDenied, match="leads, which manages this model"):
                await desk.do(user, command)
    number = await desk.ask("ann", 1)
    await desk.do("ann", DeleteModel(desk.name))
    assert await desk.moves.search_moves(None, MoveState.OPEN, 10) == []
    assert await desk.world.count(f"move_request WHERE move_id = {number} AND state = 'CANCELLED'") == 1


async def test_a_request_follows_its_model_to_another_name(desk: Desk) -> None:
    number, other = await desk.ask("ann", 1), unique("other")
    await desk.do("ann", RenameModel(desk.name, other))
    assert (await desk.moves.get_move(other, number)).name == other
    with pytest.raises(NotFound):
        await desk.moves.get_move(desk.name, number)


async def test_the_inbox_has_what_waits_for_somebodys_word(desk: Desk) -> None:
    number = await desk.ask("ann", 1)

    async def inbox(user: str) -> list[int]:
        return [move.move_id for move in await desk.moves.search_moves(None, None, 10, decider=user)]

    assert [await inbox(user) for user in ("ann", "bob", "eve", "zoe")] == [[], [number], [number], []]
    await desk.do("bob", Decide(desk.name, number, True))
    assert [await inbox(user) for user in ("bob", "eve")] == [[], [number]]
    await desk.do("eve", Decide(desk.name, number, False), reason="no card")
    assert await inbox("eve") == []


async def test_what_is_refused_is_noted_with_who_and_why(desk: Desk) -> None:
    for user, command, error in (
        ("zoe", SetStage(desk.name, 1, Stage.PRODUCTION), PermissionDenied),
        ("zoe", SetAlias(desk.name, "v1", 1), InvalidInput),
        ("zoe", SetAlias(desk.name, "free", 1, 2), Conflict),
        ("zoe", DeleteVersion(desk.name, 9), NotFound),
    ):
        with pytest.raises(error):
            await desk.do(user, command, reason="just so", key=f"key of {type(command).__name__}")
    with pytest.raises(AlreadyExists):
        await desk.do("zoe", CreateModel(desk.name))
    found = await desk.moves.refusals(desk.name, 10)
    assert [item.code for item in found] == [
        "RESOURCE_DOES_NOT_EXIST", "RESOURCE_CONFLICT", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED",
    ]  # fmt: skip
    last = found[-1]
    assert (last.by, last.reason, last.request_id) == ("zoe", "just so", "key of SetStage")
    assert last.commands == [
        {"kind": "SetStage", "name": desk.name, "version": 1, "stage": "Production", "archive_others": False}
    ]
    assert "needs 2 approval(s) by leads" in last.message
    assert [item.refusal_id for item in await desk.moves.refusals(desk.name, 2, found[1].refusal_id)] == [
        item.refusal_id for item in found[2:]
    ]


async def test_a_large_request_is_noted_by_its_kinds(desk: Desk) -> None:
    with pytest.raises(InvalidInput):
        await desk.do("zoe", *(SetAlias(desk.name, "x" * 300, 1) for _ in range(100)))
    [noted] = await desk.moves.refusals(desk.name, 10)
    assert noted.commands == [{"kind": "SetAlias"}] * 100


async def test_a_fenced_coordinator_notes_nothing(desk: Desk) -> None:
    await desk.world.execute("UPDATE lease SET epoch = epoch + 1 WHERE name = 'registry'")
    with pytest.raises(Fenced):
        await desk.do("zoe", SetAlias(desk.name, "v1", 1))
    assert await desk.moves.refusals(desk.name, 10) == []
