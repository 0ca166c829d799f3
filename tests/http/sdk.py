"""What tests of the SDK share: a user's code beside the platform, and what the platform then has."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from mlplat.sdk.leftovers import Left, resend_leftovers, sender_to
from tests.http.conftest import MLflow
from tests.platform import ROOT

T = TypeVar("T")


async def user(code: Callable[[], T]) -> T:
    """Runs a user's code in a thread, so that the platform can answer meanwhile."""
    return await asyncio.to_thread(code)


def sync(spool: Path, url: str | None = None) -> list[Left]:
    """What ``mlplat sync`` does."""
    return list(resend_leftovers(spool, lambda origin: sender_to(url or origin), max_bytes=2**30))


async def info(mlflow: MLflow, run_id: str) -> Any:
    """The run's info."""
    return (await mlflow.call("GET", "runs/get", run_id=run_id))["run"]["info"]


async def history(mlflow: MLflow, run_id: str, key: str) -> list[tuple[int, float]]:
    """Steps and values of a metric."""
    answer = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key=key)
    return sorted((point["step"], point["value"]) for point in answer.get("metrics", ()))


def check_oldest(points: list[tuple[int, float]], whole: int) -> None:
    """Points that ``run.log({...: step}, step=step)`` has made, each once, and no gap among the first ``whole``.

    By its own loop: pytest would take minutes to show how lists of this length differ.
    """
    steps = [step for step, _value in points]
    wrong = next((step for step, value in points if value != max(step, 1)), None)
    assert wrong is None, f"a wrong value at step {wrong}"
    twice = next((step for step, following in pairwise(steps) if step == following), None)
    assert twice is None, f"step {twice} is there twice"
    lost = next((step for step, found in zip(range(whole), steps, strict=False) if step != found), None)
    assert lost is None, f"step {lost} is lost"
    assert len(steps) >= whole, f"{len(steps)} of {whole} points are there"


async def python(*arguments: str, **environment: str) -> Process:
    """Python with the environment of this test, which names its platform, and more."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


async def ended(process: Process) -> tuple[int, str]:
    """Its exit code and everything it has printed; its stdin is at its end."""
    out, errors = await asyncio.wait_for(process.communicate(b""), 60)
    assert process.returncode is not None
    return process.returncode, (out + errors).decode()
