"""Following runs with the SDK and the command line, over the stream and without it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
import typer
from rich.console import Console

from mlplat.cli.watch import watch_to_end
from mlplat.errors import NotFound, Overloaded, Unavailable
from mlplat.http.live import hub as hub_module
from mlplat.pipelines.model import AttemptState
from mlplat.sdk import pipeline_runs
from mlplat.sdk.client import Client
from mlplat.sdk.live import LiveRun
from mlplat.sdk.pipeline_runs import PipelineRunHandle
from tests.http.conftest import Stack
from tests.http.player import Player
from tests.http.served import Served
from tests.http.test_pipeline_logs import _print

NODES = (("load", -1), ("fan", 0), ("fan", 1), ("fan", 2), ("side", -1), ("join", -1), ("tell", -1))


@pytest.fixture
async def player(stack: Stack) -> AsyncIterator[Player]:
    """A run that nobody else drives."""
    player = await Player.submit(stack)
    yield player
    await player.close()


@pytest.fixture
def handle(served: Served, player: Player) -> PipelineRunHandle:
    """The run as users have it."""
    return PipelineRunHandle(Client(served.url, retry_for_s=20), player.run_id)


async def _play(player: Player) -> None:
    await player.begin()
    for step, item in NODES:
        await player.start(step, item)
        await player.end(step, item)


async def test_waiting_follows_the_stream_and_asks_for_nothing_else(
    served: Served, player: Player, handle: PipelineRunHandle
) -> None:
    seen: list[dict[str, Any]] = []
    waiting = asyncio.create_task(asyncio.to_thread(handle.wait, 60, seen.append))
    await _play(player)
    final = await waiting
    assert final["state"] == "SUCCEEDED"
    assert served.requests == [f"/api/v1/pipeline-runs/{player.run_id}/events"]
    assert final == await asyncio.to_thread(handle.status)
    assert seen[-1] == final
    assert [one["seq"] for one in seen] == sorted({one["seq"] for one in seen})


async def test_a_platform_that_goes_away_and_comes_back_is_no_end(
    served: Served, player: Player, handle: PipelineRunHandle
) -> None:
    live, connections = LiveRun(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def follow() -> list[str]:
        kinds: list[str] = []
        for event in handle.events(logs="none", timeout_s=60):
            live.apply(event)
            kinds.append(event.kind)
            loop.call_soon_threadsafe(connections.set)
        return kinds

    following = asyncio.create_task(asyncio.to_thread(follow))
    await connections.wait()
    await player.begin()
    await served.stop()
    await player.start("load")
    await served.start()
    served.moods = ["refuses", "breaks"]
    for node in NODES:
        await player.end(*node)
    kinds = await following
    assert kinds.count("snapshot") == 1
    assert kinds[-1] == "end"
    assert live.status == await asyncio.to_thread(handle.status)


async def test_where_too_many_watch_the_run_is_polled(
    served: Served, player: Player, handle: PipelineRunHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_hub: object) -> None:
        raise Overloaded("no place")

    monkeypatch.setattr(hub_module.Hub, "take_slot", full)
    monkeypatch.setattr(pipeline_runs, "POLL_S", 0.01)
    waiting = asyncio.create_task(asyncio.to_thread(handle.wait, 60))
    await _play(player)
    assert (await waiting)["state"] == "SUCCEEDED"
    assert f"/api/v1/pipeline-runs/{player.run_id}" in served.requests


async def test_waiting_ends_in_time(player: Player, handle: PipelineRunHandle) -> None:
    with pytest.raises(Unavailable, match=r"is not over after 0\.05 s"):
        await asyncio.to_thread(handle.wait, 0.05)


async def test_a_run_that_does_not_exist_cannot_be_followed(served: Served) -> None:
    nobody = PipelineRunHandle(Client(served.url), "nobody")
    with pytest.raises(NotFound, match="nobody"):
        await asyncio.to_thread(lambda: list(nobody.events()))


async def test_logs_are_followed_to_the_end_of_the_run(
    stack: Stack, player: Player, handle: PipelineRunHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_runs, "LOG_POLL_S", 0.01)
    await player.begin()
    _print(stack, player, "load", b"hello")
    following = asyncio.create_task(asyncio.to_thread(lambda: "".join(handle.log_parts("load", follow=True))))
    await _play(player)
    heading, *lines = (await following).splitlines()
    assert heading.startswith("── load · attempt 1 · ")
    assert lines == ["hello"]
    assert await asyncio.to_thread(handle.logs, "load") == "── load · attempt 1 · SUCCEEDED\nhello\n"


async def test_watching_prints_a_line_per_change_and_the_errors(
    player: Player, handle: PipelineRunHandle, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()

    def watch() -> int:
        try:
            watch_to_end(handle, Console(file=out, width=100))
        except typer.Exit as end:
            return end.exit_code
        return 0

    task = asyncio.create_task(asyncio.to_thread(watch))
    await player.begin()
    for _try in range(2):
        await player.end("load", state=AttemptState.FAILED)
        await player.commit()
    await player.end("tell")
    assert player.is_over
    assert await task == 1
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert ["load", "FAILED"] in lines
    assert ["load", "failed"] in lines
    assert ["ValueError:", "no"] in lines
    assert f"see: mlplat logs {player.run_id}" in capsys.readouterr().err


async def test_ctrl_c_leaves_the_run_alone(player: Player, handle: PipelineRunHandle) -> None:
    out = io.StringIO()

    class Interrupted(PipelineRunHandle):
        def events(self, **_options: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as end:
        watch_to_end(Interrupted(Client("http://127.0.0.1:1"), player.run_id), Console(file=out, width=100))
    assert end.value.exit_code == 130
    assert f"the run goes on: mlplat watch {player.run_id}" in out.getvalue()
