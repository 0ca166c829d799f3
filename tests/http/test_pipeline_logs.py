"""Logs of attempts: pages by cursor, whole texts, of attempts that run, ended, or were killed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from mlplat.execution import attempt_logs
from mlplat.execution.capture import log_folder
from mlplat.http.routes import pipeline_logs
from mlplat.pipelines.model import AttemptState
from tests.http.conftest import Stack, expect_error
from tests.http.player import Player
from tests.http.served import Served

RUNS = "/api/v1/pipeline-runs"
INVALID = "INVALID_PARAMETER_VALUE"


@pytest.fixture
async def player(stack: Stack) -> AsyncIterator[Player]:
    """A run whose first step failed once and is over, with one more step and a fan-out under way."""
    player = await Player.submit(stack)
    await player.begin()
    await player.start("load")
    _print(stack, player, "load", b"first try")
    await player.end("load", state=AttemptState.FAILED)
    await player.commit()
    _print(stack, player, "load", "second ä\ntry\n".encode(), attempt=2)
    await player.end("load")
    await player.start("side")
    yield player
    await player.close()


def _print(
    stack: Stack, player: Player, step: str, text: bytes, *, item: int = -1, attempt: int = 1, segment: int = 1
) -> None:
    folder = log_folder(player.run_id, step, item, attempt)
    stack.services.artifacts.write(f"{folder}/{segment:06d}.log", [text])


async def _page(http: httpx.AsyncClient, player: Player, **query: Any) -> Any:
    response = await http.get(f"{RUNS}/{player.run_id}/logs", params={"format": "json"} | query)
    assert response.status_code == 200, response.text
    return response.json()


def _texts(page: Any) -> list[tuple[str, int | None, int, str, str]]:
    return [(part["step"], part["item"], part["attempt"], part["state"], part["text"]) for part in page["parts"]]


async def test_text_has_a_heading_for_each_attempt(http: httpx.AsyncClient, stack: Stack, player: Player) -> None:
    _print(stack, player, "side", b"under way \xff")
    response = await http.get(f"{RUNS}/{player.run_id}/logs")
    assert response.headers["content-type"].startswith("text/plain")
    load = "── load · attempt 1 · FAILED\nfirst try\n── load · attempt 2 · SUCCEEDED\nsecond ä\ntry\n"
    side = "── side · attempt 1 · RUNNING\nunder way \ufffd\n"
    assert response.text == load + side
    assert (await http.get(f"{RUNS}/{player.run_id}/logs?step=side")).text == side
    second = await http.get(f"{RUNS}/{player.run_id}/logs?step=load&attempt=2")
    assert second.text == "── load · attempt 2 · SUCCEEDED\nsecond ä\ntry\n"


async def test_pages_of_any_size_join_to_the_whole(http: httpx.AsyncClient, stack: Stack, player: Player) -> None:
    _print(stack, player, "fan", "ünïcode of an item\n".encode() * 3, item=1)
    await player.end("fan", 1)
    whole = _joined([await _page(http, player)])
    assert whole[("load", None, 2)] == "second ä\ntry\n"
    for limit in (1, 2, 3, 7, 16, 1_000):
        pages, cursor = [], ""
        for _turn in range(200):
            pages.append(await _page(http, player, limit=limit, after=cursor))
            cursor = pages[-1]["cursor"]
            if not pages[-1]["more"]:
                break
        assert pages[-1]["running"]
        assert all(sum(len(part["text"].encode()) for part in page["parts"]) <= limit + 6 for page in pages)
        if limit > 1:  # one byte of a character is no text
            assert _joined(pages) == whole


def _joined(pages: list[Any]) -> dict[tuple[str, int | None, int], str]:
    found: dict[tuple[str, int | None, int], str] = {}
    for page in pages:
        for step, item, attempt, _state, text in _texts(page):
            found[step, item, attempt] = found.get((step, item, attempt), "") + text
    return found


async def test_a_cursor_follows_attempts_that_run_until_they_are_over(
    http: httpx.AsyncClient, stack: Stack, player: Player
) -> None:
    first = await _page(http, player)
    assert (first["more"], first["running"]) == (False, True)
    assert [text[:3] for text in _texts(first)] == [("load", None, 1), ("load", None, 2)]
    _print(stack, player, "side", b"a")
    _print(stack, player, "fan", b"of item 2", item=2)
    second = await _page(http, player, after=first["cursor"])
    assert sorted(_texts(second)) == [("fan", 2, 1, "QUEUED", "of item 2"), ("side", None, 1, "RUNNING", "a")]
    assert _texts(await _page(http, player, after=second["cursor"])) == []
    _print(stack, player, "side", b"ab\nlast \xc3")  # killed within a character
    await player.end("side", state=AttemptState.LOST)
    third = await _page(http, player, after=second["cursor"])
    assert _texts(third) == [("side", None, 1, "LOST", "b\nlast \ufffd")]
    assert third["parts"][0]["next"] == {"segment": 1, "offset": 9}
    assert _texts(await _page(http, player, after=third["cursor"])) == []


async def test_a_place_reads_on_in_one_attempt(http: httpx.AsyncClient, stack: Stack, player: Player) -> None:
    page = await _page(http, player, step="load", attempt=2, after="1:10")
    assert _texts(page) == [("load", None, 2, "SUCCEEDED", "try\n")]
    for query in ({}, {"step": "load"}, {"attempt": 2}):
        response = await http.get(f"{RUNS}/{player.run_id}/logs", params=query | {"after": "1:10"})
        expect_error(response, 400, INVALID, "name its step and its number")


async def test_many_attempts_come_in_several_pages(
    http: httpx.AsyncClient, player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_logs, "PAGE_ATTEMPTS", 1)
    first = await _page(http, player)
    assert first["more"]
    second = await _page(http, player, after=first["cursor"])
    assert [text[:3] for page in (first, second) for text in _texts(page)] == [("load", None, 1), ("load", None, 2)]


async def test_a_large_log_is_never_in_memory_as_a_whole(
    served: Served, stack: Stack, player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_logs, "PAGE_BYTES", 1_000)
    body = b"".join(b"line %06d\n" % number for number in range(2_000))
    for segment in range(4):
        _print(stack, player, "side", body[segment * 6_000 : (segment + 1) * 6_000], segment=segment + 1)
    sizes, found = [], b""
    async with (
        httpx.AsyncClient() as client,
        client.stream(
            "GET", f"{served.url}{RUNS}/{player.run_id}/logs", params={"step": "side", "limit": 1_000}
        ) as got,
    ):
        async for chunk in got.aiter_raw():
            sizes.append(len(chunk))
            found += chunk
    assert found == "── side · attempt 1 · RUNNING\n".encode() + body
    assert len(sizes) > 4


async def test_following_goes_on_to_the_end_of_the_run(
    served: Served, stack: Stack, player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_logs, "FOLLOW_EVERY_S", 0.01)
    async with (
        httpx.AsyncClient() as client,
        client.stream("GET", f"{served.url}{RUNS}/{player.run_id}/logs?follow=true") as got,
    ):
        chunks = got.aiter_text()
        seen = await anext(chunks)
        _print(stack, player, "side", b"while it runs\n")
        while "while it runs" not in seen:
            seen += await anext(chunks)
        for node in (("side", -1), ("fan", 0), ("fan", 1), ("fan", 2), ("join", -1)):
            await player.end(*node)
        _print(stack, player, "tell", b"at last")
        await player.end("tell")
        async with asyncio.timeout(30):
            seen += "".join([chunk async for chunk in chunks])
    assert re.search(r"── tell · attempt 1 · [A-Z]+\nat last\n\Z", seen), "whatever its state was when that was read"
    assert seen.count("while it runs") == 1


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=5000000", "attempt=0", "attempt=99999", "item=-2", "format=xml", "after=" + "x" * 20_000],
)
async def test_queries_out_of_bounds_are_400(http: httpx.AsyncClient, player: Player, query: str) -> None:
    expect_error(
        await http.get(f"{RUNS}/{player.run_id}/logs?{query}"), 400, INVALID, f"query.{query.partition('=')[0]}"
    )


@pytest.mark.parametrize("cursor", ["?", "bm90IGpzb24", "W10", "W251bGwsIHsiYSI6IFstNSwgMF19XQ", "W1sxLCAyXSwge31d"])
async def test_a_cursor_of_somebody_else_is_400(http: httpx.AsyncClient, player: Player, cursor: str) -> None:
    response = await http.get(f"{RUNS}/{player.run_id}/logs", params={"after": cursor})
    expect_error(response, 400, INVALID, "not a cursor of these logs")


async def test_what_is_not_there_is_404(http: httpx.AsyncClient, player: Player) -> None:
    missing = "RESOURCE_DOES_NOT_EXIST"
    expect_error(await http.get(f"{RUNS}/nobody/logs"), 404, missing, "No pipeline run with id=nobody exists")
    expect_error(await http.get(f"{RUNS}/{player.run_id}/logs?step=beta"), 404, missing, "no step 'beta'")
    assert (await http.get(f"{RUNS}/{player.run_id}/logs?step=tell")).text == ""
