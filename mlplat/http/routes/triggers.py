"""/api/v1/triggers"""

from __future__ import annotations

import re
import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.datastructures import Headers

from mlplat.errors import InvalidInput
from mlplat.http.bodies import read_body
from mlplat.http.routes.automation import (
    AutomationRequest,
    FiringAnswer,
    Limit,
    Name,
    Offset,
    body_schema,
    firing_answer,
    read_request,
    wake,
)
from mlplat.http.services import Services
from mlplat.pipelines.automation.firings import FiringState
from mlplat.pipelines.automation.store import NewTrigger
from mlplat.pipelines.automation.triggers import (
    FILTERS,
    Kind,
    PipelineFilter,
    RegistryFilter,
    Trigger,
    WebhookFilter,
)
from mlplat.pipelines.automation.webhooks import MAX_BODY_BYTES, Auth

#: Where senders of webhooks put the id of a delivery, which they repeat when they try again.
DELIVERY_HEADERS = ("idempotency-key", "x-github-delivery")
_DELIVERY = re.compile(r"[\x21-\x7e]{1,128}\Z")


class RegistrySource(RegistryFilter):
    """Changes of the registry."""

    kind: Literal[Kind.REGISTRY]


class PipelineSource(PipelineFilter):
    """Ends of pipeline runs."""

    kind: Literal[Kind.PIPELINE]


class WebhookSource(WebhookFilter):
    """Requests to /api/v1/triggers/{name}/fire."""

    kind: Literal[Kind.WEBHOOK]
    auth: Auth = Auth.BEARER
    #: Needed at first; without one, the trigger keeps the one it has.
    secret: str | None = None


Source = Annotated[RegistrySource | PipelineSource | WebhookSource, Field(discriminator="kind")]


class TriggerRequest(AutomationRequest):
    """A pipeline that runs when something happens."""

    on: Source
    max_per_hour: int = Field(default=1_000, ge=1, le=100_000, description="Further events of an hour are skipped.")


class TriggerAnswer(BaseModel):
    """A trigger. A webhook's secret is never answered."""

    name: str
    pipeline: str
    digest: str
    params: dict[str, Any]
    on: dict[str, Any]
    max_per_hour: int
    paused: bool
    last_at: datetime | None
    last_run_id: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime


class Fired(BaseModel):
    """What a request to a webhook led to. The run's id is there once it is submitted: see `/runs/{event_id}`."""

    event_id: str
    state: FiringState | Literal["IGNORED"]
    reason: str = ""
    run_id: str | None = None


def router(services: Services) -> APIRouter:
    """Triggers, by name."""
    api = APIRouter(prefix="/api/v1/triggers", tags=["triggers"])
    store = services.automation

    @api.get("")
    async def list_triggers(limit: Limit = 100, offset: Offset = 0) -> list[TriggerAnswer]:
        """Triggers, by name."""
        return [_answer(found) for found in await store.find_triggers(limit, offset)]

    @api.get("/{name}")
    async def get_trigger(name: Name) -> TriggerAnswer:
        """One trigger."""
        return _answer(await store.get_trigger(name))

    @api.get("/{name}/definition")
    async def definition(name: Name) -> dict[str, Any]:
        """The definition of what runs."""
        return (await store.get_definition((await store.get_trigger(name)).digest)).to_json()

    @api.put("/{name}", openapi_extra=body_schema(TriggerRequest))
    async def put_trigger(name: Name, request: Request) -> TriggerAnswer:
        """Creates or replaces a trigger, for what happens from now on; one that is replaced misses nothing."""
        found = await store.put_trigger(_new(name, await read_request(request, TriggerRequest)))
        await wake(services)
        return _answer(found)

    @api.delete("/{name}")
    async def delete_trigger(name: Name) -> dict[str, str]:
        """Deletes a trigger. Its runs stay."""
        await store.delete_trigger(name)
        return {"name": name}

    @api.post("/{name}/pause")
    async def pause(name: Name) -> TriggerAnswer:
        """Nothing fires from now on."""
        return _answer(await store.pause_trigger(name, paused=True))

    @api.post("/{name}/resume")
    async def resume(name: Name) -> TriggerAnswer:
        """Goes on with what happens from now on."""
        found = await store.pause_trigger(name, paused=False)
        await wake(services)
        return _answer(found)

    @api.post("/{name}/fire", status_code=202)
    async def fire(name: Name, request: Request) -> Fired:
        """Fires a webhook. The body is a JSON object of at most 64 KiB, which expressions read as `trigger.event`.

        `Authorization: Bearer <secret>`, or `X-Mlplat-Signature-256: sha256=<HMAC-SHA256 of the body>` (GitHub's
        `X-Hub-Signature-256` too). `Idempotency-Key` or `X-GitHub-Delivery` make repeats harmless."""
        event_id = _delivery(request.headers)
        body = await read_body(request, MAX_BODY_BYTES)
        found = await store.fire(name, request.headers, body, _event(body), event_id)
        if found is None:
            return Fired(event_id=event_id, state="IGNORED", reason="the trigger's condition is not met")
        await wake(services)
        return Fired(event_id=event_id, state=found.firing.state, reason=found.firing.reason, run_id=found.run_id)

    @api.get("/{name}/runs")
    async def runs(name: Name, limit: Limit = 50, before: int | None = None) -> list[FiringAnswer]:
        """What became of its events, newest first; `before` is the last `firing_id` of the page before."""
        await store.get_trigger(name)
        return [firing_answer(found) for found in await store.find_firings(f"trigger:{name}", limit, before)]

    @api.get("/{name}/runs/{event_id}")
    async def run_of(name: Name, event_id: str) -> FiringAnswer:
        """What became of one event."""
        return firing_answer(await store.get_firing(f"trigger:{name}", event_id))

    return api


def _new(name: str, given: TriggerRequest) -> NewTrigger:
    on = given.on
    fields = on.model_dump(exclude={"kind", "auth", "secret"})
    auth, secret = (on.auth, on.secret) if isinstance(on, WebhookSource) else (None, None)
    filter_ = FILTERS[on.kind].model_validate(fields)
    return NewTrigger(
        name, given.parse(), given.params, filter_, on.kind, given.max_per_hour, given.paused, given.created_by, auth,
        secret,
    )  # fmt: skip


def _delivery(headers: Headers) -> str:
    given = next((headers[name] for name in DELIVERY_HEADERS if name in headers), None)
    if given is None:
        return uuid.uuid4().hex
    if not _DELIVERY.match(given):
        raise InvalidInput("the id of a delivery has 1 to 128 visible ASCII characters")
    return given


def _event(body: bytes) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(body or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    if not isinstance(event, dict):
        raise InvalidInput("the body is not a JSON object")
    return event


def _answer(found: Trigger) -> TriggerAnswer:
    on: dict[str, Any] = {"kind": found.kind, **found.filter.model_dump(mode="json", exclude_none=True)}
    if found.auth is not None:
        on["auth"] = found.auth
    return TriggerAnswer(
        name=found.name, pipeline=found.pipeline, digest=found.digest, params=found.params, on=on,
        max_per_hour=found.max_per_hour, paused=found.paused, last_at=found.last_at, last_run_id=found.last_run_id,
        created_by=found.created_by, created_at=found.created_at, updated_at=found.updated_at,
    )  # fmt: skip
