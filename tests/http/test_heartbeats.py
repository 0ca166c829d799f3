"""POST /api/v1/runs/heartbeat, and what the SDK sends there."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy import text

import mlplat
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack
from tests.http.sdk import user
from tests.http.served import Served

PATH = "/api/v1/runs/heartbeat"


async def _heartbeat_at(stack: Stack, run_id: str) -> Any:
    async with stack.engine.connect() as connection:
        query = text("SELECT heartbeat_at FROM run WHERE run_id = :run_id")
        return (await connection.execute(query, {"run_id": run_id})).scalar_one()


async def test_a_beat_answers_the_states(http: httpx.AsyncClient, mlflow: MLflow, stack: Stack) -> None:
    run_id = await mlflow.run()
    assert await _heartbeat_at(stack, run_id) is None
    response = await http.post(PATH, json={"run_ids": [run_id, "none"]})
    assert (response.status_code, response.json()) == (200, {"runs": {run_id: "RUNNING"}})
    assert await _heartbeat_at(stack, run_id) is not None


@pytest.mark.parametrize("body", [{}, {"run_ids": []}, {"run_ids": "x"}, {"run_ids": ["x"] * 1001}, {"run_ids": [1]}])
async def test_bad_beats_are_refused(http: httpx.AsyncClient, body: Any) -> None:
    response = await http.post(PATH, json=body)
    assert (response.status_code, response.json()["error_code"]) == (400, "INVALID_PARAMETER_VALUE")


async def test_a_run_of_the_sdk_beats_from_its_start_until_its_end(
    served: Served, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlplat.sdk.pulse.BEAT_EVERY_S", 0.05)
    first, second = [await user(lambda: mlplat.start_run(unique("exp"))) for _ in range(2)]
    started = await _heartbeat_at(stack, first.run_id)
    assert started is not None
    while await _heartbeat_at(stack, first.run_id) == started:
        await asyncio.sleep(0.02)
    await user(first.finish)
    beaten = await _heartbeat_at(stack, second.run_id)
    while await _heartbeat_at(stack, second.run_id) == beaten:
        await asyncio.sleep(0.02)
    await user(second.finish)
