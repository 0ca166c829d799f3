"""The registry's events, over real stores and a real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.errors import Unavailable
from mlplat.events.log import EventLog
from mlplat.http.errors import install_error_handlers
from mlplat.http.live import registry_feed as feed_module
from mlplat.http.live.hub import Hub
from mlplat.http.live.registry_feed import RegistryFeed
from mlplat.http.routes import model_events
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error
from tests.http.served import Served

EVENTS = "/api/v1/models/events"
INVALID = "INVALID_PARAMETER_VALUE"


class Stream:
    """What one client gets: events, and the cursor that it has."""

    def __init__(self, response: httpx.Response) -> None:
        self.cursor = ""
        self._events = self._parse(response)

    async def _parse(self, response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
        fields: dict[str, str] = {}
        async for line in response.aiter_lines():
            if line:
                name, _colon, value = line.partition(":")
                fields[name] = value.removeprefix(" ")
                continue
            self.cursor = fields.get("id", self.cursor)
            if "id" in fields:
                yield json.loads(fields["data"]) if "data" in fields else None
            fields = {}

    async def next(self) -> dict[str, Any]:
        """The next event."""
        async with asyncio.timeout(30):
            while (found := await anext(self._events)) is None:
                pass
            return found

    async def sign_of_life(self) -> None:
        """Until there is no event, but a cursor."""
        async with asyncio.timeout(30):
            assert await anext(self._events) is None


@asynccontextmanager
async def stream(url: str, headers: dict[str, str] | None = None, **query: Any) -> AsyncIterator[Stream]:
    async with (
        httpx.AsyncClient(timeout=30) as client,
        client.stream("GET", f"{url}{EVENTS}", params=query, headers=headers) as response,
    ):
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response)


@pytest.fixture
async def name(mlflow: MLflow) -> str:
    name = unique("model [1]")
    await mlflow.call("POST", "registered-models/create", name=name)
    return name


async def tag(mlflow: MLflow, name: str, value: str) -> None:
    await mlflow.call("POST", "registered-models/set-tag", name=name, key="k", value=value)


async def append(connection: AsyncConnection, name: str, value: str) -> None:
    """An event whose transaction ends when the test says so."""
    await connection.execute(
        text(
            "INSERT INTO registry_event (request_id, kind, name, command, answer, epoch) "
            "VALUES (gen_random_uuid()::text, 'SetModelTag', CAST(:name AS text), "
            "jsonb_build_object('name', CAST(:name AS text), 'value', CAST(:value AS text)), '{}', 1)"
        ),
        {"name": name, "value": value},
    )


async def test_an_event_arrives_within_a_second_and_says_what_happened(
    served: Served, http: httpx.AsyncClient, mlflow: MLflow, name: str
) -> None:
    async with stream(served.url, model=name) as client:
        await client.sign_of_life()
        await mlflow.call("POST", "model-versions/create", name=name, source="s3://bucket/m")
        made = await client.next()
        assert made["kind"] == "version_created"
        assert (made["model"], made["version"], made["semantic_version"]) == (name, 1, "1.0.0")
        assert "signature" not in made
        asked_at = time.monotonic()
        moved = {"moves": [{"alias": "champion", "version": 1}], "by": "ann", "reason": "first"}
        assert (await http.post(f"/api/v1/models/{name}/aliases", json=moved)).status_code == 200
        told = await client.next()
        assert time.monotonic() - asked_at < 1
    assert {key: told[key] for key in ("kind", "model", "alias", "version", "by", "reason")} == {
        "kind": "alias_set", "model": name, "alias": "champion", "version": 1, "by": "ann", "reason": "first",
    }  # fmt: skip
    assert told["id"] > made["id"]
    assert told["at"].endswith("+00:00")


async def test_filters_by_kind_and_model(served: Served, mlflow: MLflow, name: str) -> None:
    async with (
        stream(served.url, kinds="version_created,model_deleted", model=name) as by_kind,
        stream(served.url, model=f"{name[:6]}*{name[-6:]}") as by_pattern,
        stream(served.url) as everything,
    ):
        for client in (by_kind, by_pattern, everything):
            await client.sign_of_life()
        other = unique("other")
        await mlflow.call("POST", "registered-models/create", name=other)
        await tag(mlflow, name, "1")
        await mlflow.call("POST", "model-versions/create", name=name, source="s3://bucket/m")
        await mlflow.call("DELETE", "registered-models/delete", name=name)
        assert [(await by_kind.next())["kind"] for _ in range(2)] == ["version_created", "model_deleted"]
        assert (await by_pattern.next())["kind"] == "model_tag_set"
        assert (await everything.next())["model"] == other


async def test_whoever_comes_back_misses_nothing_and_gets_nothing_twice(
    stack: Stack, served: Served, mlflow: MLflow, name: str
) -> None:
    """Also what is committed after what has begun later, and events in the middle of a request of several."""
    async with stack.engine.connect() as late, stack.engine.connect() as other:
        async with stream(served.url, model=name) as client:
            await client.sign_of_life()
            await late.begin()
            await append(late, name, "late")
            await tag(mlflow, name, "early")
            got = [(await client.next())["value"]]
            await append(other, name, "a")
            await append(other, name, "b")
            await append(other, name, "c")
            await other.commit()
            got.append((await client.next())["value"])
        await late.commit()
        for step in range(3):
            # Half of them as browsers do, whose address stays what it was.
            where: dict[str, Any] = (
                {"headers": {"Last-Event-ID": client.cursor}} if step % 2 else {"after": client.cursor}
            )
            async with stream(served.url, model=name, **where) as client:
                got.append((await client.next())["value"])
        assert sorted(got) == ["a", "b", "c", "early", "late"]
        async with stream(served.url, model=name, after=client.cursor) as client:
            await client.sign_of_life()
            await tag(mlflow, name, "last")
            assert (await client.next())["value"] == "last"


async def test_a_client_of_rare_events_is_told_how_far_it_has_seen(
    served: Served, mlflow: MLflow, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "HEARTBEAT_S", 0.05)
    async with stream(served.url, model="nobody") as client:
        await client.sign_of_life()
        before = client.cursor
        await tag(mlflow, name, "1")
        while client.cursor == before:
            await client.sign_of_life()
        after = client.cursor
    async with stream(served.url, model=name, after=before) as client:
        assert (await client.next())["value"] == "1"
    async with stream(served.url, model=name, after=after) as client:
        await tag(mlflow, name, "2")
        assert (await client.next())["value"] == "2"


async def test_since_a_moment(stack: Stack, served: Served, mlflow: MLflow, name: str) -> None:
    await tag(mlflow, name, "before")
    async with stack.engine.connect() as connection:
        moment = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one().isoformat()
    await tag(mlflow, name, "1")
    await tag(mlflow, name, "2")
    async with stream(served.url, model=name, since=moment) as client:
        assert [(await client.next())["value"] for _ in range(2)] == ["1", "2"]
    async with stream(served.url, model=name, since="2100-01-01T00:00:00Z", lasts_s=0.3) as client:
        await client.sign_of_life()
        with pytest.raises(StopAsyncIteration):
            await client.next()


async def test_the_log_is_read_in_pages(http: httpx.AsyncClient, mlflow: MLflow, name: str) -> None:
    for number in range(5):
        await tag(mlflow, name, str(number))
    await mlflow.call("PATCH", "registered-models/update", name=name, description="x" * 9_000)
    found, cursor, more = [], "", True
    while more:
        answer = (await http.get(f"{EVENTS}/log", params={"after": cursor, "limit": 3, "model": name})).json()
        found += answer["events"]
        cursor, more = answer["next"], answer["more"]
    assert [item["kind"] for item in found] == ["model_created", *["model_tag_set"] * 5, "model_updated"]
    assert [item["value"] for item in found[1:-1]] == [*"01234"]
    assert found[-1]["omitted"] == ["description"]
    again = (await http.get(f"{EVENTS}/log", params={"after": cursor, "limit": 3, "model": name})).json()
    assert (again["events"], again["more"]) == ([], False)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?kinds=alias_moved", "no such kind of event: alias_moved"),
        ("?after=17", "after: expected a cursor"),
        ("?since=2026-01-31T12:00:00", "since: has no time zone"),
        ("?lasts_s=0", "query.lasts_s"),
        ("/log?kinds=alias_moved", "no such kind of event: alias_moved"),
        ("/log?after=MXwzOjU6fDE", "after: expected a cursor"),
        ("/log?limit=0", "query.limit"),
    ],
)
async def test_bad_queries_are_400(http: httpx.AsyncClient, query: str, message: str) -> None:
    expect_error(await http.get(f"{EVENTS}{query}"), 400, INVALID, message)


@pytest.mark.parametrize("path", ["", "/log"])
async def test_a_cursor_of_another_database_is_refused(http: httpx.AsyncClient, path: str) -> None:
    cursor = "MXw5OTk5OTk5OTk6OTk5OTk5OTk5Onw"  # 1|999999999:999999999:|
    expect_error(await http.get(f"{EVENTS}{path}?after={cursor}"), 400, INVALID, "of another database")


async def test_paths_of_a_model_with_such_a_name_are_still_its_own(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    await mlflow.call("POST", "registered-models/create", name="events")
    assert (await http.get("/api/v1/models/events/aliases")).json() == {"name": "events", "aliases": {}}
    await mlflow.call("DELETE", "registered-models/delete", name="events")


# -- the feed ------------------------------------------------------------------------------------


class CountingLog(EventLog):
    """Counts its reads."""

    reads = 0

    async def read(self, *arguments: Any, **options: Any) -> Any:
        """See ``EventLog``."""
        self.reads += 1
        return await super().read(*arguments, **options)


async def _never(_seconds: float) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def feed(stack: Stack) -> AsyncIterator[RegistryFeed]:
    """A feed whose clock stands still: it looks when the test says so, or when somebody joins."""
    hub = Hub(stack.services.pipelines, stack.services.artifacts, max_streams=10)
    feed = RegistryFeed(CountingLog(stack.engine), hub, pause=_never)
    yield feed
    feed.close()


@pytest.fixture
async def live(feed: RegistryFeed) -> AsyncIterator[Served]:
    """The feed behind a real server."""
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(model_events.router(feed.log, feed))
    served = Served(app)
    await served.start()
    yield served
    await served.stop()


async def test_clients_share_one_reader_and_are_forgotten_when_they_go(
    feed: RegistryFeed, live: Served, mlflow: MLflow, name: str
) -> None:
    assert isinstance(feed.log, CountingLog)
    async with stream(live.url, model=name) as one, stream(live.url, model=name) as two, stream(live.url) as three:
        for client in (one, two, three):
            await client.sign_of_life()
        assert feed.hub.streams == 3
        before = feed.log.reads
        await tag(mlflow, name, "1")
        await feed.look()
        assert [(await client.next())["value"] for client in (one, two, three)] == ["1"] * 3
        assert feed.log.reads == before + 1
    async with asyncio.timeout(30):
        while feed.hub.streams:
            await asyncio.sleep(0.01)
    assert feed._task is None


async def test_a_client_that_is_slow_gets_what_it_missed_from_the_database(
    feed: RegistryFeed, live: Served, mlflow: MLflow, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "KEPT_BYTES", 1_000)
    async with stream(live.url, model=name) as client:
        await client.sign_of_life()
        for number in range(20):
            await tag(mlflow, name, str(number))
        await feed.look()
        assert feed.end - feed.first < 10
        assert sum(len(told.body) for told in feed._kept) <= 1_000
        assert [(await client.next())["value"] for _ in range(20)] == [str(number) for number in range(20)]
        await tag(mlflow, name, "last")
        await feed.look()
        assert (await client.next())["value"] == "last"


async def test_a_client_that_was_elsewhere_before_gets_nothing_twice(
    feed: RegistryFeed, live: Served, served: Served, mlflow: MLflow, name: str
) -> None:
    """Another replica has read further: this one looks before it goes on."""
    async with stream(live.url, model=name) as first:
        await first.sign_of_life()
        async with stream(served.url, model=name) as elsewhere:
            await elsewhere.sign_of_life()
            await tag(mlflow, name, "1")
            assert (await elsewhere.next())["value"] == "1"
        async with stream(live.url, model=name, after=elsewhere.cursor) as back:
            await back.sign_of_life()
            await tag(mlflow, name, "2")
            await feed.look()
            assert (await back.next())["value"] == "2"
        assert [(await first.next())["value"] for _ in range(2)] == ["1", "2"]


async def test_too_many_clients_are_refused(feed: RegistryFeed, live: Served) -> None:
    for _ in range(10):
        feed.hub.take_slot()
    async with httpx.AsyncClient() as client:
        expect_error(await client.get(f"{live.url}{EVENTS}"), 429, "RESOURCE_EXHAUSTED", "streams are open")
    for _ in range(10):
        feed.hub.free_slot()


async def test_without_postgres_a_client_is_told_to_come_back(
    feed: RegistryFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> None:
        raise Unavailable("away")

    monkeypatch.setattr(feed, "look", away)
    monkeypatch.setattr(feed_module, "FIRST_LOOK_TIMEOUT_S", 0.2)
    with pytest.raises(Unavailable, match="cannot be read now"):
        await feed.join()
    assert feed.hub.streams == 0
