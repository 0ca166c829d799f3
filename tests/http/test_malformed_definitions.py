"""Malformed submissions: each is refused with one problem a line, never by a failure, and leaves nothing behind."""

from __future__ import annotations

import json
import random
import uuid
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from tests.http.conftest import Stack, expect_error
from tests.unit.mutations import GOOD, ODD, mutated

SEEDS = 150
_TABLES = ("pipeline", "pipeline_run", "step_run", "attempt", "pipeline_signal")


async def rows(stack: Stack) -> dict[str, int]:
    """How much there is of everything that a submission may write."""
    async with stack.engine.connect() as connection:
        return {
            table: (await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one() for table in _TABLES
        }


def body_of(document: Any, **more: Any) -> bytes:
    """A submission."""
    fields = {"spec": document, "params": {"n": 3} if _needs_n(document) else {}, "idempotency_key": uuid.uuid4().hex}
    return json.dumps(fields | more).encode()


def _needs_n(document: Any) -> bool:
    parameters = document.get("parameters") if isinstance(document, dict) else None
    return isinstance(parameters, dict) and "n" in parameters


async def submit(http: httpx.AsyncClient, body: bytes) -> httpx.Response:
    return await http.post("/api/v1/pipeline-runs", content=body, headers={"Content-Type": "application/json"})


async def test_mutated_definitions_are_refused_and_leave_nothing(http: httpx.AsyncClient, stack: Stack) -> None:
    accepted = refused = 0
    before = await rows(stack)
    for seed in range(SEEDS):
        document, what, must_be_refused = mutated(seed)
        answer = await submit(http, body_of(document))
        assert answer.status_code == 400 or (answer.status_code == 200 and not must_be_refused), (what, answer.text)
        if answer.status_code == 400:
            expect_error(answer, 400, "INVALID_PARAMETER_VALUE", ": ")
            refused += 1
            assert (await rows(stack))["pipeline_run"] == before["pipeline_run"] + accepted, what
        else:
            accepted += 1
    after = await rows(stack)
    assert after["pipeline_run"] == before["pipeline_run"] + accepted
    assert after["pipeline"] <= before["pipeline"] + accepted
    assert {table: after[table] for table in _TABLES[2:]} == {table: before[table] for table in _TABLES[2:]}
    assert accepted
    assert refused > SEEDS / 2


async def test_odd_submissions_are_refused_and_leave_nothing(http: httpx.AsyncClient, stack: Stack) -> None:
    """Everything around the definition: what is no text, no mapping, too long, or nobody's run."""
    chance, before, accepted = random.Random(1), await rows(stack), 0
    fields = ("spec", "params", "idempotency_key", "submitted_by", "priority", "resumed_from", "from_step", "more")
    odd = (*ODD, "a\x00b", {"n": "\x00"}, {"n": 10**400}, {"n": [1]}, {"obj": {"x": 1}})
    for number in range(SEEDS):
        field, value = chance.choice(fields), chance.choice(odd)
        answer = await submit(http, body_of(GOOD[number % len(GOOD)], **{field: value}))
        assert answer.status_code in {200, 400, 404}, (field, value, answer.text)
        accepted += answer.status_code == 200
    assert (await rows(stack))["pipeline_run"] <= before["pipeline_run"] + accepted


@pytest.mark.parametrize("field", ["resumed_from", "from_step", "idempotency_key", "submitted_by"])
async def test_text_with_nul_is_refused_before_it_reaches_the_database(stack: Stack, field: str) -> None:
    async with stack.client() as http:
        answer = await submit(http, body_of(GOOD[2], **{field: "a\x00b"}))
    expect_error(answer, 400, "INVALID_PARAMETER_VALUE", f"{field} may not contain NUL")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}" * 2, b"[" * 200_000, b'{"spec":' + b"[" * 100_000,
        b'{"spec":{"name":"p","steps":{"a":{"uses":"json:dumps","with":{"x":NaN}}}},"idempotency_key":"k"}',
        b'{"spec":{"name":"p","steps":{"a":{"uses":"\\ud800"}}},"idempotency_key":"k"}',
        b'{"spec":{},"idempotency_key":"\\ud800"}', b'{"spec":1,"idempotency_key":""}',
    ],
    ids=range(12),
)  # fmt: skip
async def test_what_is_no_submission_is_refused(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await submit(http, body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error_code", "message"}
