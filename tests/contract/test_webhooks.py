"""Deliveries of webhooks, from a real outbox to real receivers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import AlreadyExists, Fenced, NotFound, Overloaded
from mlplat.registry.model import CreateModel, CreateVersion, DeleteModel, RenameModel, SetAlias, SetModelTag
from mlplat.webhooks import outbox as outbox_module
from mlplat.webhooks import store as store_module
from mlplat.webhooks.model import DeliveryState, Retries, Status, delivery_id
from mlplat.webhooks.sender import Sender
from mlplat.webhooks.store import NewWebhook
from tests.contract.waiting import until
from tests.contract.webhooks import LOOPBACK, Coordinator, coordinating
from tests.receiver import SECRET, Receiver


@pytest.fixture
async def coordinator(engine: AsyncEngine) -> AsyncIterator[Coordinator]:
    async with coordinating(engine) as coordinator:
        yield coordinator


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = await Receiver().start()
    yield receiver
    await receiver.stop()


async def test_an_event_arrives_signed_with_all_that_it_says(coordinator: Coordinator, receiver: Receiver) -> None:
    hook = await coordinator.hook(receiver.url)
    await coordinator.do(CreateModel("m"), CreateVersion("m", "s3://b/m", "s3://b/m"), SetAlias("m", "champion", 1))
    await coordinator.round(3)
    assert receiver.told("kind", "model", "version", "by", "reason") == [
        ("model_created", "m", None, "ann", "why"), ("version_created", "m", 1, "ann", "why"),
        ("alias_set", "m", 1, "ann", "why"),
    ]  # fmt: skip
    last = receiver.received[-1]
    assert last.headers["x-mlplat-event"] == "alias_set"
    assert last.headers["content-type"] == "application/json"
    assert last.path == "/hook"
    assert last.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert last.delivery == delivery_id(hook.webhook_id, last.body["id"])
    assert last.body["data"] == {"name": "m", "alias": "champion", "version": "1"}
    assert await coordinator.states() == [("DELIVERED", 1, 200)] * 3
    assert (await coordinator.all())[-1].delivered_at is not None


async def test_webhooks_get_the_events_that_they_want_from_when_they_are_there(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    await coordinator.model("early")
    await coordinator.hook(receiver.url, "tags", kinds=frozenset({"model_tag_set"}), model="a*")
    await coordinator.hook(receiver.url, "renames", model="new")
    await coordinator.hook(receiver.url, "asleep", status=Status.DISABLED)
    await coordinator.model("ab", tags=1)
    await coordinator.model("b", tags=1)
    await coordinator.do(RenameModel("b", "new"))
    await coordinator.round(3)
    assert [(item.kind, item.model) for item in await coordinator.all("tags")] == [("model_tag_set", "ab")]
    assert [(item.kind, item.model) for item in await coordinator.all("renames")] == [("model_renamed", "b")]
    assert await coordinator.all("asleep") == []
    await coordinator.store.change("asleep", {"status": Status.ACTIVE})
    await coordinator.tag("x", "ab")
    await coordinator.round()
    assert [item.kind for item in await coordinator.all("asleep")] == ["model_tag_set"]


async def test_what_is_committed_late_is_not_lost(coordinator: Coordinator, receiver: Receiver) -> None:
    """Numbers are taken early: a reader that remembers the last one would never see this event."""
    await coordinator.hook(receiver.url)
    async with coordinator.engine.connect() as late:
        await late.execute(
            text(
                "INSERT INTO registry_event (request_id, kind, name, command, answer, epoch) "
                "VALUES ('late', 'UpdateModel', 'late', '{}', '{}', 1)"
            )
        )
        await coordinator.model("early")
        await coordinator.round()
        await late.commit()
    await coordinator.round()
    assert receiver.told("model") == [("early",), ("late",)]


async def test_a_failure_is_tried_again_under_the_same_id(coordinator: Coordinator, receiver: Receiver) -> None:
    receiver.answers = [500, 302]
    receiver.headers = f"Location: {receiver.url}\r\n"
    await coordinator.hook(receiver.url)
    await coordinator.model()
    await coordinator.round()
    [failed] = await coordinator.all()
    assert (failed.state, failed.attempts, failed.last_status) == (DeliveryState.PENDING, 1, 500)
    assert failed.last_error == "answered 500: said so"
    await coordinator.round()
    [failed] = await coordinator.all()
    assert failed.last_error == "answered 302; redirects are not followed"
    assert len(receiver.received) == 2
    await coordinator.round()
    assert await coordinator.states() == [("DELIVERED", 3, 200)]
    assert len({item.delivery for item in receiver.received}) == 1
    assert len({str(item.body) for item in receiver.received}) == 1


async def test_after_the_last_attempt_a_delivery_is_dead_until_somebody_asks_for_it(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    receiver.answers = [500, 500, 503]
    await coordinator.hook(receiver.url)
    await coordinator.model()
    await coordinator.round(5)
    assert await coordinator.states() == [("DEAD", 3, 503)]
    [dead] = await coordinator.store.find_deliveries("hook", DeliveryState.DEAD, 10, None)
    assert (dead.next_attempt_at, dead.delivered_at, dead.last_error) == (None, None, "answered 503: said so")
    again = await coordinator.store.redeliver("hook", dead.delivery_id)
    assert (again.state, again.attempts) == (DeliveryState.PENDING, 0)
    await coordinator.round()
    assert await coordinator.states() == [("DELIVERED", 1, 200)]
    assert len({item.delivery for item in receiver.received}) == 1
    await coordinator.store.redeliver("hook", dead.delivery_id)
    await coordinator.round()
    assert len(receiver.received) == 5
    for wrong in (f"{dead.delivery_id}0", "x", f"{'0' * 32}-{dead.event_id}"):
        with pytest.raises(NotFound, match="no delivery"):
            await coordinator.store.redeliver("hook", wrong)


async def test_a_receiver_that_is_gone_is_not_asked_again(coordinator: Coordinator, receiver: Receiver) -> None:
    receiver.answers = [410]
    await coordinator.hook(receiver.url)
    await coordinator.model()
    await coordinator.round(3)
    assert await coordinator.states() == [("DEAD", 1, 410)]


async def test_a_receiver_says_when_to_come_back(engine: AsyncEngine, receiver: Receiver) -> None:
    receiver.answers, receiver.headers = [429], "Retry-After: 300\r\n"
    async with coordinating(engine) as coordinator:
        await coordinator.hook(receiver.url)
        await coordinator.model()
        await coordinator.round(3)
        [item] = await coordinator.all()
        assert (item.attempts, item.last_status) == (1, 429)
        assert item.next_attempt_at is not None
        assert 290 < (item.next_attempt_at - datetime.now(UTC)).total_seconds() < 310


async def test_a_receiver_that_hangs_is_left(engine: AsyncEngine, receiver: Receiver) -> None:
    receiver.answers = [0]
    async with coordinating(engine, Sender(LOOPBACK, timeout_s=0.3)) as coordinator:
        await coordinator.hook(receiver.url)
        await coordinator.model()
        await coordinator.round()
        [item] = await coordinator.all()
        assert (item.state, item.last_status) == (DeliveryState.PENDING, None)
        assert item.last_error == "no answer within 0.3 s"
        await coordinator.round()
        assert await coordinator.states() == [("DELIVERED", 2, 200)]


async def test_a_failure_holds_back_what_follows_for_the_model_and_nobody_else(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    failing = await Receiver().start()

    async def fail_model_m(got: object) -> None:
        failing.answers = [500] if failing.received[-1].body["model"] == "m" else []

    failing.before = fail_model_m
    await coordinator.hook(failing.url, "failing")
    await coordinator.hook(receiver.url, "healthy")
    await coordinator.model("m", tags=2)
    await coordinator.model("n", tags=2)
    await coordinator.round(3)
    assert [item for item in failing.told("model", "value") if item[0] == "n"] == [("n", None), ("n", "0"), ("n", "1")]
    assert [item for item in failing.told("model", "value") if item[0] == "m"] == [("m", None)] * 3
    assert sorted(await coordinator.states("healthy")) == [("DELIVERED", 1, 200)] * 6
    failing.before = None
    await coordinator.round(3)
    assert [item for item in failing.told("model", "value") if item[0] == "m"][3:] == [("m", "0"), ("m", "1")]
    states = await coordinator.states("failing")
    assert states[0] == ("DEAD", 3, 500), "given up, and what it held back went out"
    assert states[1:] == [("DELIVERED", 1, 200)] * 5
    await failing.stop()


async def test_events_of_a_model_arrive_in_their_order_whatever_fails(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    receiver.answers = [500, 200, 200, 500, 500, 200, 500]
    await coordinator.hook(receiver.url)
    await coordinator.model(tags=5)
    await coordinator.round(12)
    taken = list(dict.fromkeys(receiver.told("value")))
    assert taken == [(None,), ("0",), ("1",), ("2",), ("3",), ("4",)]
    assert {state for state, *_rest in await coordinator.states()} == {"DELIVERED"}


async def test_a_slow_receiver_has_few_connections_at_once(coordinator: Coordinator, receiver: Receiver) -> None:
    slow, most, now = await Receiver().start(), 0, 0
    go_on = asyncio.Event()

    async def wait(_got: object) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await go_on.wait()
        now -= 1

    slow.before = wait
    await coordinator.hook(slow.url, "slow")
    await coordinator.hook(receiver.url, "quick")
    for number in range(10):
        await coordinator.model(f"m{number}")
    coordinator.deliveries.start()

    async def quick_is_done() -> bool:
        return len(receiver.received) == 10

    await until(quick_is_done)
    assert most == 4
    go_on.set()

    async def slow_is_done() -> bool:
        return len(slow.received) == 10

    await until(slow_is_done)
    assert most == 4
    await slow.stop()


async def test_in_the_background_an_event_is_there_within_a_second(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    coordinator.deliveries.start()
    await coordinator.hook(receiver.url)
    await coordinator.model()
    coordinator.deliveries.wake()

    async def arrived() -> bool:
        return len(receiver.received) == 1

    await until(arrived, 1.0)


# -- who is in charge ----------------------------------------------------------------------------


async def test_a_coordinator_that_lost_its_lease_delivers_nothing(engine: AsyncEngine, receiver: Receiver) -> None:
    async with coordinating(engine) as old:
        await old.hook(receiver.url)
        await old.model()
        await old.deliveries.look()
        await old.deliveries.settle()
        assert len(receiver.received) == 1
        async with coordinating(engine) as new:
            await new.tag(1)
            with pytest.raises(Fenced):
                await old.deliveries._outbox.claim(2)
            with pytest.raises(Fenced):
                await old.round()
            assert len(receiver.received) == 1
            await new.round()
            assert receiver.told("value") == [(None,), ("1",)]


async def test_an_outcome_that_comes_late_is_not_noted_and_the_event_is_sent_again(
    engine: AsyncEngine, receiver: Receiver
) -> None:
    """The old one is cut off between its request and its note: the event arrives twice, under one id."""
    sent, go_on = asyncio.Event(), asyncio.Event()

    async def stop_the_world(_got: object) -> None:
        receiver.before = None
        sent.set()
        await go_on.wait()

    receiver.before = stop_the_world
    async with coordinating(engine) as old:
        await old.hook(receiver.url)
        await old.model()
        await old.deliveries.look()
        await sent.wait()
        async with coordinating(engine) as new:
            await new.round()
            assert await new.states() == [("DELIVERED", 2, 200)]
            go_on.set()
            await old.deliveries.settle()
            assert old.lease.lost.is_set()
            assert await new.states() == [("DELIVERED", 2, 200)]
    assert len(receiver.received) == 2
    assert len({item.delivery for item in receiver.received}) == 1


async def test_what_a_killed_coordinator_had_begun_is_begun_again_at_once(
    engine: AsyncEngine, receiver: Receiver
) -> None:
    async with coordinating(engine, retries=Retries(first_s=3_600)) as killed:
        await killed.hook(receiver.url)
        await killed.model(tags=1)
        assert not await killed.deliveries._outbox.fill()
        [due] = (await killed.deliveries._outbox.find_due([], [], 4, 10))[0]
        claim = await killed.deliveries._outbox.claim(due.number)
        assert claim is not None
        assert SECRET not in repr(claim)
    async with coordinating(engine, retries=Retries(first_s=3_600)) as next_one:
        await next_one.round(2)
        assert await next_one.states() == [("DELIVERED", 2, 200), ("DELIVERED", 1, 200)]


async def test_an_event_whose_delivery_kills_the_coordinator_is_given_up(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    await coordinator.hook(receiver.url)
    await coordinator.model()
    await coordinator.deliveries._outbox.fill()
    [due] = (await coordinator.deliveries._outbox.find_due([], [], 4, 10))[0]
    for _ in range(3):
        await coordinator.deliveries._outbox.claim(due.number)
    await coordinator.round()
    [item] = await coordinator.all()
    assert (item.state, item.last_error) == (DeliveryState.DEAD, "the outcome of its last attempt is not known")
    assert receiver.received == []


async def test_a_redelivery_that_is_asked_for_during_an_attempt_is_made(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    async def ask(got: object) -> None:
        receiver.before = None
        await coordinator.store.redeliver("hook", receiver.received[-1].delivery)

    receiver.before = ask
    await coordinator.hook(receiver.url)
    await coordinator.model()
    await coordinator.round(2)
    assert len(receiver.received) == 2
    assert await coordinator.states() == [("DELIVERED", 1, 200)]


# -- webhooks ------------------------------------------------------------------------------------


async def test_changes_of_a_webhook_hold_for_what_waits(coordinator: Coordinator, receiver: Receiver) -> None:
    wrong = await Receiver(secret="another-secret-of-tests").start()
    wrong.answers = [500] * 10
    await coordinator.hook(wrong.url)
    await coordinator.model()
    await coordinator.round()
    assert wrong.received == [], "the signature was wrong"
    await coordinator.store.change("hook", {"status": Status.DISABLED})
    await coordinator.round()
    assert [item.attempts for item in await coordinator.all()] == [1]
    await coordinator.store.change(
        "hook", {"url": wrong.url, "secret": "another-secret-of-tests", "status": Status.ACTIVE}
    )
    await coordinator.round()
    assert len(wrong.received) == 1
    await coordinator.store.change("hook", {"url": receiver.url, "secret": SECRET})
    await coordinator.round()
    assert (await coordinator.states())[0][0] == "DELIVERED"
    await wrong.stop()


async def test_a_webhook_that_is_deleted_takes_its_deliveries_along(
    coordinator: Coordinator, receiver: Receiver
) -> None:
    hook = await coordinator.hook(receiver.url)
    await coordinator.model(tags=1)
    await coordinator.deliveries._outbox.fill()
    await coordinator.store.delete(hook.webhook_id)
    await coordinator.round()
    assert receiver.received == []
    with pytest.raises(NotFound, match="No webhook with the id or name 'hook'"):
        await coordinator.all()


async def test_names_are_unique_and_a_repeat_is_the_same(coordinator: Coordinator) -> None:
    first = await coordinator.hook("https://a.example/")
    assert await coordinator.hook("https://a.example/") == first
    with pytest.raises(AlreadyExists):
        await coordinator.hook("https://b.example/")
    with pytest.raises(AlreadyExists):
        await coordinator.store.create(NewWebhook("hook", "https://a.example/", "another-secret-of-tests"))
    other = await coordinator.hook("https://a.example/", "other")
    with pytest.raises(AlreadyExists):
        await coordinator.store.change("other", {"name": "hook"})
    assert (await coordinator.store.change(other.webhook_id, {"name": "third"})).name == "third"
    assert [item.name for item in await coordinator.store.find(10, 0)] == ["hook", "third"]
    assert SECRET not in repr(first) + repr(NewWebhook("hook", "https://a.example/", SECRET))


async def test_an_error_of_the_database_does_not_tell_the_secret(coordinator: Coordinator) -> None:
    with pytest.raises(DataError, match="hidden") as error:
        await coordinator.hook("https://a.example/", description="\x00")
    assert SECRET not in str(error.value)
    await coordinator.hook("https://a.example/")
    with pytest.raises(DataError, match="hidden") as error:
        await coordinator.store.change("hook", {"secret": "another-secret-of-tests", "description": "\x00"})
    assert "another-secret" not in str(error.value)


async def test_there_are_so_many_webhooks_and_no_more(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_WEBHOOKS", 2)
    for name in ("a", "b"):
        await coordinator.hook("https://a.example/", name)
    with pytest.raises(Overloaded, match="2 webhooks, as many as there may be"):
        await coordinator.hook("https://a.example/", "c")


async def test_a_webhook_for_which_too_much_waits_is_disabled_and_says_why(
    coordinator: Coordinator, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_PENDING", 3)
    await coordinator.hook("http://127.0.0.1:1/", "away")
    await coordinator.hook(receiver.url)
    await coordinator.model()
    for number in range(5):
        await coordinator.tag(number)
        await coordinator.round(2)
    found = await coordinator.store.get("away")
    assert (found.status, found.status_reason) == (Status.DISABLED, "more than 3 events waited for it")
    assert (await coordinator.store.get("hook")).status is Status.ACTIVE
    noted = len(await coordinator.all("away"))
    await coordinator.tag("one more")
    await coordinator.round()
    assert (len(await coordinator.all("away")), len(receiver.received)) == (noted, 7)
    again = await coordinator.store.change("away", {"status": Status.ACTIVE})
    assert again.status_reason == ""


async def test_old_deliveries_are_forgotten(coordinator: Coordinator, receiver: Receiver) -> None:
    await coordinator.hook(receiver.url)
    await coordinator.model(tags=4)
    await coordinator.deliveries._outbox.fill()
    for number, state, days in ((1, "DELIVERED", 8), (2, "DELIVERED", 6), (3, "DEAD", 31), (4, "DEAD", 29)):
        await coordinator.sql(
            "UPDATE webhook_delivery SET state = :state, ended_at = now() - make_interval(days => :days) "
            "WHERE number = :number",
            number=number, state=state, days=days,
        )  # fmt: skip
    assert await coordinator.deliveries._outbox.prune() == 2
    assert [item.number for item in await coordinator.all()] == [2, 4, 5]


async def test_the_history_of_a_deleted_model_is_delivered_too(coordinator: Coordinator, receiver: Receiver) -> None:
    await coordinator.hook(receiver.url)
    await coordinator.do(CreateModel("m"), SetModelTag("m", "k", "1"), DeleteModel("m"))
    await coordinator.round(3)
    assert receiver.told("kind") == [("model_created",), ("model_tag_set",), ("model_deleted",)]


async def test_a_restored_older_database_goes_on_from_now(coordinator: Coordinator, receiver: Receiver) -> None:
    await coordinator.hook(receiver.url)
    await coordinator.model()
    far = "900000000000:900000000000:"
    await coordinator.sql("INSERT INTO event_cursor VALUES ('webhooks', :far)", far=far)
    await coordinator.sql("UPDATE webhook SET since = :far", far=far)
    await coordinator.round()
    assert receiver.received == []
    await coordinator.tag(1)
    await coordinator.round()
    assert receiver.told("value") == [("1",)]
