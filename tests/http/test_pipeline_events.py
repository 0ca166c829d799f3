"""The stream of a run's events, over real stores and a real server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from mlplat.errors import NotFound, Overloaded
from mlplat.execution.capture import log_folder
from mlplat.http.errors import install_error_handlers
from mlplat.http.live import hub as hub_module
from mlplat.http.live import stream as stream_module
from mlplat.http.live import tails as tails_module
from mlplat.http.live.hub import Hub
from mlplat.http.live.stream import LogChoice, Watcher
from mlplat.http.routes import pipeline_events
from mlplat.pipelines.model import AttemptState
from mlplat.sdk.live import EventParser, LiveRun, RunEvent
from tests.contract.waiting import until
from tests.http.conftest import Stack, expect_error
from tests.http.player import Player
from tests.http.served import Served

RUNS = "/api/v1/pipeline-runs"


@pytest.fixture
async def player(stack: Stack) -> AsyncIterator[Player]:
    """A run that nobody else drives."""
    player = await Player.submit(stack)
    yield player
    await player.close()


async def _never(_seconds: float) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def hub(stack: Stack) -> AsyncIterator[Hub]:
    """A hub whose clock stands still: it looks when the test says so."""
    hub = Hub(stack.services.pipelines, stack.services.artifacts, pause=_never)
    yield hub
    hub.close()


@pytest.fixture
async def live(hub: Hub) -> AsyncIterator[Served]:
    """The hub's streams behind a real server."""
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(pipeline_events.router(hub))
    served = Served(app)
    await served.start()
    yield served
    await served.stop()


class Stream:
    """What one client of the real server gets."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._events = self._parse()

    async def _parse(self) -> AsyncIterator[RunEvent]:
        parser = EventParser()
        async for chunk in self.response.aiter_bytes():
            for event in parser.feed(chunk):
                if event is not None:
                    yield event

    async def next(self) -> RunEvent:
        async with asyncio.timeout(30):
            return await anext(self._events)

    async def rest(self) -> list[RunEvent]:
        async with asyncio.timeout(60):
            return [event async for event in self._events]


@asynccontextmanager
async def _stream(url: str, run_id: str, headers: dict[str, str] | None = None, **query: Any) -> AsyncIterator[Stream]:
    async with (
        httpx.AsyncClient(timeout=30) as client,
        client.stream("GET", f"{url}{RUNS}/{run_id}/events", params=query, headers=headers) as response,
    ):
        assert response.status_code == 200, await response.aread()
        yield Stream(response)


async def _status(http: httpx.AsyncClient, run_id: str) -> Any:
    return (await http.get(f"{RUNS}/{run_id}")).json()


def _fold(events: list[RunEvent], live: LiveRun | None = None) -> LiveRun:
    live = live or LiveRun()
    for event in events:
        live.apply(event)
    return live


async def test_a_stream_starts_with_the_run_and_its_graph(
    served: Served, player: Player, http: httpx.AsyncClient
) -> None:
    async with _stream(served.url, player.run_id) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store"
        first = await stream.next()
    assert (first.kind, first.number) == ("snapshot", 0)
    assert first.data["run"] == await _status(http, player.run_id)
    dag = {step["name"]: step for step in first.data["dag"]}
    assert list(dag) == ["load", "fan", "side", "join", "tell"]
    assert dag["join"]["needs"] == ["fan", "side"]
    assert [name for name, step in dag.items() if step["is_fan_out"]] == ["fan"]
    assert [name for name, step in dag.items() if step["is_finally"]] == ["tell"]
    assert dag["load"] | {"needs": 0} == {
        "name": "load", "kind": "uses", "needs": 0, "is_finally": False, "is_fan_out": False, "max_attempts": 2,
        "description": "",
    }  # fmt: skip


async def test_a_change_has_what_changed_and_nothing_else(served: Served, player: Player) -> None:
    async with _stream(served.url, player.run_id) as stream:
        await stream.next()
        await player.begin()
        begun = await stream.next()
        assert (begun.kind, begun.number, begun.data["seq"]) == ("change", 1, 1)
        assert set(begun.data["run"]) == {"state", "started_at"}
        assert [(row["step"], row["item"], row["state"]) for row in begun.data["steps"]] == [("load", None, "QUEUED")]
        await player.start("load")
        started = await stream.next()
        assert started.data["run"] == {}
        assert [(row["step"], row["attempt"], row["state"], row["node"]) for row in started.data["attempts"]] == [
            ("load", 1, "RUNNING", "node-1")
        ]
        await player.progress("load", 0.25)
        progressed = await stream.next()
        assert (progressed.number, progressed.data["steps"]) == (3, [])
        assert progressed.data["attempts"][0]["progress"] == {"done": 0.25, "text": "at 0.25"}


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_comes_back_misses_nothing(
    seed: int, served: Served, player: Player, http: httpx.AsyncClient
) -> None:
    """At any moment, a client that was cut off after any transition gets the same state as one that never was."""
    choice = random.Random(seed)
    async with _stream(served.url, player.run_id, logs="none") as whole:
        cut_off: list[tuple[int, LiveRun]] = []
        await player.begin()
        while not player.is_over:
            async with _stream(served.url, player.run_id, logs="none") as stream:
                first = await stream.next()
            assert first.number == player.machine.run.seq
            cut_off.append((first.number or 0, _fold([first])))
            await player.anything(choice)
            seq, one = cut_off[choice.randrange(len(cut_off))]
            if seq < player.machine.run.seq:
                async with _stream(served.url, player.run_id, after=seq, logs="none") as stream:
                    event = await stream.next()
                assert (event.kind, event.number) == ("change", player.machine.run.seq)
                index = cut_off.index((seq, one))
                cut_off[index] = (player.machine.run.seq, _fold([event], one))
                assert one.status == await _status(http, player.run_id)
        final = await _status(http, player.run_id)
        events = await whole.rest()
    assert (events[-1].kind, events[-1].data["state"]) == ("end", final["state"])
    assert _fold(events).status == final
    for seq, one in cut_off:
        async with _stream(served.url, player.run_id, {"Last-Event-ID": str(seq)}, logs="none") as stream:
            rest = await stream.rest()
        assert [event.kind for event in rest] == (["change", "end"] if seq < final["seq"] else ["end"])
        assert _fold(rest, one).status == final


async def test_another_replica_and_another_executor_go_on_where_the_first_was(
    stack: Stack, hub: Hub, live: Served, served: Served, player: Player, http: httpx.AsyncClient
) -> None:
    await player.begin()
    async with _stream(served.url, player.run_id) as stream:
        one = _fold([await stream.next()])
    await player.start("load")
    other = Player(stack, player.machine, player._epoch)  # its writer alone is new: numbers go on
    await other.end("load")
    await other.close()
    async with _stream(live.url, player.run_id, after=one.status["seq"]) as stream:
        one.apply(await stream.next())
    assert one.status == await _status(http, player.run_id)
    assert hub.streams in {0, 1}


async def test_a_number_that_the_run_never_had_brings_a_snapshot(served: Served, player: Player) -> None:
    async with _stream(served.url, player.run_id, after=1_000) as stream:
        assert (await stream.next()).kind == "snapshot"


@pytest.mark.parametrize(
    ("query", "part"), [("after=-1", "query.after"), ("logs=some", "query.logs"), ("lasts_s=0", "")]
)
async def test_bad_queries_are_400(http: httpx.AsyncClient, player: Player, query: str, part: str) -> None:
    expect_error(await http.get(f"{RUNS}/{player.run_id}/events?{query}"), 400, "INVALID_PARAMETER_VALUE", part)


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 30, "٣"])
async def test_a_bad_last_event_id_is_400(served: Served, player: Player, value: str) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.get(
            f"{served.url}{RUNS}/{player.run_id}/events", headers=httpx.Headers([(b"last-event-id", value.encode())])
        )
    expect_error(answer, 400, "INVALID_PARAMETER_VALUE", "Last-Event-ID")


async def test_an_unknown_run_is_404(http: httpx.AsyncClient) -> None:
    expect_error(
        await http.get(f"{RUNS}/nobody/events"), 404, "RESOURCE_DOES_NOT_EXIST", "No pipeline run with id=nobody exists"
    )


async def test_a_run_that_was_over_before_is_told_and_ended(served: Served, player: Player) -> None:
    await _succeed(player)
    async with _stream(served.url, player.run_id) as stream:
        assert [event.kind for event in await stream.rest()] == ["snapshot", "end"]


async def _succeed(player: Player) -> None:
    await player.begin()
    for node in (("load", -1), ("fan", 0), ("fan", 1), ("fan", 2), ("side", -1), ("join", -1), ("tell", -1)):
        await player.end(*node)
    assert player.is_over


# -- the hub -------------------------------------------------------------------------------------


@asynccontextmanager
async def _watching(hub: Hub, run_id: str, after: int | None = None, logs: LogChoice | None = None) -> (
    AsyncIterator[Callable[[], Awaitable[RunEvent | None]]]
):  # fmt: skip
    """The next event of a watcher; None when it has nothing to tell but that it lives."""
    choice = logs or LogChoice("none")
    feed = await hub.join(run_id, logs=choice.any)
    async with aclosing(Watcher(hub, feed, run_id, after, choice).events(None)) as bodies:
        assert (await anext(bodies)).startswith(b"retry:")

        async def following() -> RunEvent | None:
            (event,) = EventParser().feed(await anext(bodies))
            return event

        yield following
    hub.leave(run_id, feed, logs=choice.any)


async def test_watchers_share_one_look(hub: Hub, player: Player, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    get_changes = hub.store.get_changes

    async def counted(run_id: str, after: int) -> Any:
        asked.append(after)
        return await get_changes(run_id, after)

    monkeypatch.setattr(hub.store, "get_changes", counted)
    async with _watching(hub, player.run_id) as first, _watching(hub, player.run_id) as second:
        lives = [_fold([event]) for following in (first, second) if (event := await following())]
        asked.clear()
        await player.begin()
        await hub.look()
        await player.start("load")
        await hub.look()
        for following, live in zip((first, second), lives, strict=True):
            for number in (1, 2):
                event = await following()
                assert event is not None
                assert event.number == number
                live.apply(event)
        assert asked == []
        assert lives[0].status == lives[1].status
    assert hub.streams == 0
    assert hub._feeds == {}


async def test_a_watcher_that_is_slow_gets_what_it_missed_at_once(
    hub: Hub, player: Player, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "KEPT_BYTES", 2_000)
    async with _watching(hub, player.run_id) as following:
        first = await following()
        assert first is not None
        live = _fold([first])
        await player.begin()
        await player.start("load")
        for number in range(30):
            await player.progress("load", number / 30)
            await hub.look()
        (feed,) = hub._feeds.values()
        assert sum(len(message.body) for message in feed._kept) <= 2_000
        event = await following()
        assert event is not None
        assert (event.kind, event.number) == ("change", player.machine.run.seq)
        live.apply(event)
        assert live.status == await _status(http, player.run_id)


async def test_too_many_watchers_are_refused_and_a_place_comes_free(stack: Stack, player: Player) -> None:
    hub = Hub(stack.services.pipelines, stack.services.artifacts, pause=_never, max_streams=2)
    feeds = [await hub.join(player.run_id, logs=False) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 streams are open"):
        await hub.join(player.run_id, logs=False)
    hub.leave(player.run_id, feeds[0], logs=False)
    with pytest.raises(NotFound):
        await hub.join("nobody", logs=False)
    again = await hub.join(player.run_id, logs=False)
    assert again is feeds[1]
    for feed in (feeds[1], again):
        hub.leave(player.run_id, feed, logs=False)
    assert hub.streams == 0


async def test_a_client_that_goes_away_is_forgotten_at_once(hub: Hub, live: Served, player: Player) -> None:
    async with _stream(live.url, player.run_id) as stream:
        await stream.next()
        assert hub.streams == 1
    async with asyncio.timeout(10):
        await until(lambda: _true(hub.streams == 0))


async def _true(value: bool) -> bool:
    return value


async def test_a_silent_run_shows_that_the_stream_lives(
    hub: Hub, player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "HEARTBEAT_S", 0.01)
    async with _watching(hub, player.run_id) as following:
        assert await following() is not None
        assert [await following(), await following()] == [None, None]


async def test_a_stream_ends_after_the_time_that_it_was_given(served: Served, player: Player) -> None:
    async with _stream(served.url, player.run_id, lasts_s=0.05) as stream:
        assert [event.kind for event in await stream.rest()] == ["snapshot"]


async def test_a_run_that_is_deleted_ends_its_streams(hub: Hub, player: Player, stack: Stack) -> None:
    async with _watching(hub, player.run_id) as following:
        assert await following() is not None
        (feed,) = hub._feeds.values()
        feed.vanish()
        event = await following()
        assert event is not None
        assert (event.kind, event.data["state"]) == ("end", None)


# -- logs ----------------------------------------------------------------------------------------


def _print(
    stack: Stack, run_id: str, step: str, text: bytes, *, item: int = -1, attempt: int = 1, segment: int = 1
) -> None:
    stack.services.artifacts.write(f"{log_folder(run_id, step, item, attempt)}/{segment:06d}.log", [text])


async def test_new_text_arrives_with_its_place(hub: Hub, player: Player, stack: Stack) -> None:
    await player.begin()
    await player.start("load")
    _print(stack, player.run_id, "load", b"one\n")
    async with _watching(hub, player.run_id, logs=LogChoice("step")) as following:
        first = await following()
        assert first is not None
        assert first.kind == "snapshot"
        await hub.read_logs()
        _print(stack, player.run_id, "load", "one\nzwei ä\n".encode())
        await hub.read_logs()
        for text, begin, end in (("one\n", 0, 4), ("zwei ä\n", 4, 12)):
            event = await following()
            assert event is not None
            assert (event.kind, event.number) == ("log", None)
            assert event.data == {
                "step": "load", "item": None, "attempt": 1, "text": text, "skipped": False,
                "start": {"segment": 0 if begin == 0 else 1, "offset": begin}, "next": {"segment": 1, "offset": end},
            }  # fmt: skip


async def test_rounds_that_overlap_tell_nothing_twice(hub: Hub, player: Player, stack: Stack) -> None:
    await player.begin()
    await player.start("load")
    async with _watching(hub, player.run_id, logs=LogChoice("step")) as following:
        await following()
        _print(stack, player.run_id, "load", b"one\n")
        await asyncio.gather(*(hub.read_logs() for _ in range(8)))
        (feed,) = hub._feeds.values()
        (tail,) = feed.tails.open.values()
        assert [(part.text, skipped) for part, skipped in tail.parts] == [("one\n", False)]


async def test_a_torrent_is_cut_to_its_end(
    hub: Hub, player: Player, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails_module, "ROUND_BYTES", 1_000)
    monkeypatch.setattr(tails_module, "MIN_PART_BYTES", 100)
    await player.begin()
    await player.start("load")
    async with _watching(hub, player.run_id, logs=LogChoice("step")) as following:
        await following()
        _print(stack, player.run_id, "load", b"x" * 50_000 + b"end")
        await hub.read_logs()
        event = await following()
        assert event is not None
        assert event.data["skipped"]
        assert event.data["text"] == "x" * 996 + "end"
        assert event.data["next"] == {"segment": 1, "offset": 50_003}


async def test_a_run_ends_only_after_the_last_words_of_its_attempts(hub: Hub, player: Player, stack: Stack) -> None:
    await player.begin()
    await player.start("load")
    async with _watching(hub, player.run_id, logs=LogChoice("all")) as following:
        await following()
        _print(stack, player.run_id, "load", b"killed he")  # no line end, no more
        await player.end("load", state=AttemptState.LOST)
        await player.commit()
        for node in (("load", -1), ("fan", 0), ("fan", 1), ("fan", 2), ("side", -1), ("join", -1), ("tell", -1)):
            await player.end(*node)
        _print(stack, player.run_id, "tell", b"told")
        assert player.is_over
        await hub.look()
        event = await following()
        assert event is not None
        assert event.kind == "change"
        await hub.read_logs()
        kinds = []
        while event.kind != "end":
            event = await following()
            assert event is not None
            kinds.append((event.kind, event.data.get("text")))
        assert sorted(kinds[:-1]) == [("log", "killed he"), ("log", "told")]


async def test_whoever_comes_back_gets_the_end_of_logs_that_ended_meanwhile(
    hub: Hub, player: Player, stack: Stack
) -> None:
    await player.begin()
    _print(stack, player.run_id, "load", b"first words\nlast words\n")
    await player.end("load")
    async with _watching(hub, player.run_id, after=1, logs=LogChoice("step")) as following:
        change = await following()
        assert change is not None
        assert change.kind == "change"
        await hub.read_logs()
        event = await following()
        assert event is not None
        assert event.data["text"].endswith("last words\n")
    async with _watching(hub, player.run_id, logs=LogChoice("step")) as following:
        await following()
        await hub.read_logs()
        await player.start("side")
        await hub.look()
        event = await following()
        assert event is not None
        assert event.kind == "change"  # of what was over before, the logs are read elsewhere


async def test_only_the_wanted_logs_are_told(hub: Hub, player: Player, stack: Stack) -> None:
    await player.begin()
    await player.end("load")
    for step, item in (("fan", 0), ("side", -1)):
        await player.start(step, item)
        _print(stack, player.run_id, step, step.encode(), item=item)
    for choice, expected in (
        (LogChoice("all"), {"fan", "side"}),
        (LogChoice("step"), {"side"}),
        (LogChoice("all", {"fan"}), {"fan"}),
    ):
        async with _watching(hub, player.run_id, logs=choice) as following:
            await following()
            await hub.read_logs()
            found = {event.data["text"] for _ in expected if (event := await following()) is not None}
            assert found == expected


async def test_more_attempts_than_are_read_at_once_take_turns(
    hub: Hub, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tails_module, "MAX_TAILS", 2)
    player = await Player.submit(stack, {"name": "wide", "steps": {"fan": {"uses": "os:getcwd", "foreach": [0, 1, 2]}}})
    await player.begin()
    for item in range(3):
        await player.start("fan", item)
        _print(stack, player.run_id, "fan", f"item {item}".encode(), item=item)
    async with _watching(hub, player.run_id, logs=LogChoice("all")) as following:
        await following()
        (feed,) = hub._feeds.values()
        await hub.read_logs()
        assert sorted(feed.tails.open) == [("fan", 0, 1), ("fan", 1, 1)]
        await player.end("fan", 0)
        await hub.look()
        await hub.read_logs()
        await hub.read_logs()
        assert sorted(feed.tails.open) == [("fan", 1, 1), ("fan", 2, 1)]
        texts = []
        while "item 2" not in texts:
            event = await following()
            assert event is not None
            texts.append(event.data.get("text"))
    await player.close()


def test_the_documentation_has_the_numbers_of_the_code() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "pipelines-live.md").read_text()
    assert f"takes\n{hub_module.MAX_STREAMS} streams" in text
    assert f"about {tails_module.ROUND_BYTES // 1024} KiB" in text
    assert f"{tails_module.MAX_TAILS} attempts at once" in text
    assert f"every {stream_module.HEARTBEAT_S:g} s" in text
