"""/api/v1: metric batches, blobs, status; and the landing page."""

from __future__ import annotations

import asyncio
import html
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from mlplat.http.bodies import MAX_BATCH_BYTES, MAX_BLOB_BYTES, read_body
from mlplat.http.services import Services


class Appended(BaseModel):
    """Durable points."""

    points: int


class Stored(BaseModel):
    """A stored blob."""

    digest: str


class ActorStatus(BaseModel):
    """One actor of the platform."""

    actor: str
    node: str
    pid: int | None
    restarts: int
    health: str
    lag: str


def router(services: Services) -> APIRouter:
    """Everything that is not about pipelines."""
    api = APIRouter(tags=["platform"])

    @api.post("/api/v1/metrics")
    async def append_metrics(request: Request) -> Appended:
        """Appends metric points: an Arrow IPC stream with the columns run_id, key, step, timestamp (ms) and
        value. Answers when the points are durable."""
        return Appended(points=await services.metrics.append(await read_body(request, MAX_BATCH_BYTES)))

    @api.post("/api/v1/blobs")
    async def put_blob(request: Request) -> Stored:
        """Stores bytes under their SHA-256."""
        body = await read_body(request, MAX_BLOB_BYTES)
        return Stored(digest=await asyncio.to_thread(services.artifacts.put_blob, body))

    @api.get("/api/v1/status")
    async def status() -> list[ActorStatus]:
        """The platform's actors."""
        return [ActorStatus(**row) for row in await services.status.actors()]

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def landing() -> HTMLResponse:
        counts = await services.pipelines.count_by_state()
        runs = await services.pipelines.find_runs(20)
        rows = [
            {"run": run.run_id, "pipeline": run.name, "state": run.state, "created": f"{run.created_at:%F %T} UTC"}
            for run in runs
        ]
        return HTMLResponse(_page(await services.status.actors(), counts, rows))

    return api


def _page(actors: list[dict[str, Any]], counts: dict[str, int], runs: list[dict[str, Any]]) -> str:
    links = "".join(f"<li><code>{method}</code> {text}</li>" for method, text in _LINKS)
    summary = ", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items())) or "none yet"
    return (
        "<!doctype html><meta charset=utf-8><title>mlplat</title>"
        "<style>body{font:16px system-ui;margin:2rem auto;max-width:60rem}td,th{padding:.2rem 1rem .2rem 0;"
        "text-align:left}</style><h1>mlplat</h1>"
        f"<h2>Platform</h2>{_table(actors)}<h2>Pipeline runs</h2><p>{html.escape(summary)}</p>{_table(runs)}"
        f"<h2>API</h2><ul>{links}</ul>"
    )


_LINKS = (
    ("/docs", '<a href="/docs">the native API, by OpenAPI</a>'),
    ("/api/2.0/mlflow", "MLflow's REST API: <code>mlflow.set_tracking_uri</code> to this address"),
    ("/api/v1/status", '<a href="/api/v1/status">status as JSON</a>'),
)


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>nothing yet</p>"
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
