"""/api/v1/webhooks"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from mlplat.events.model import parse_kinds
from mlplat.http.routes.automation import Limit, Offset
from mlplat.registry.model import MAX_NAME_LENGTH
from mlplat.webhooks.model import MAX_URL_LENGTH, NAME_PATTERN, Delivery, DeliveryState, Status
from mlplat.webhooks.service import Made, Webhooks
from mlplat.webhooks.store import NewWebhook

MAX_DESCRIPTION = 2_000
Key = Annotated[str, Path(max_length=80, description="Its id or its name.")]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Url = Annotated[str, Field(max_length=MAX_URL_LENGTH, description="http or https; redirects are not followed.")]
Events = Annotated[list[str], Field(max_length=100, description="Kinds such as `alias_set`; none: all.")]
Pattern = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME_LENGTH, description="Of models with this name, or like this pattern.")
]
Secret = Annotated[
    SecretStr, Field(description="The key of the signatures, of at least 16 characters. Empty: one is made up.")
]


class WebhookRequest(BaseModel):
    """Where events go."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    url: Url
    secret: Secret = SecretStr("")
    events: Events = []
    model: Pattern = "*"
    description: str = Field(default="", max_length=MAX_DESCRIPTION)
    status: Status = Status.ACTIVE


class WebhookChange(BaseModel):
    """What is to be different; the rest stays. `status: ACTIVE` goes on with what happens from now on."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    url: Url | None = None
    secret: Secret | None = None
    events: Events | None = None
    model: Pattern | None = None
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION)
    status: Status | None = None

    def columns(self) -> dict[str, Any]:
        """As the table has them."""
        given = {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}
        if "events" in given:
            given["kinds"] = sorted(parse_kinds(given.pop("events")))
        if "secret" in given:
            given["secret"] = given["secret"].get_secret_value()
        return given


class WebhookAnswer(BaseModel):
    """A webhook. Its `secret` is answered once, when it was made up."""

    webhook_id: str
    name: str
    url: str
    events: list[str]
    model: str
    status: Status
    status_reason: str
    description: str
    created_at: datetime
    updated_at: datetime
    secret: str | None = None


class DeliveryAnswer(BaseModel):
    """What became of an event. `delivery_id` is the same for all attempts."""

    number: int
    delivery_id: str
    event_id: int
    kind: str
    model: str
    state: DeliveryState
    attempts: int
    next_attempt_at: datetime | None
    last_status: int | None
    last_error: str
    created_at: datetime
    attempted_at: datetime | None
    delivered_at: datetime | None


class TestAnswer(BaseModel):
    """What the receiver said to a test event."""

    success: bool
    status: int | None
    error: str
    body: str


def router(webhooks: Webhooks) -> APIRouter:
    """Outgoing webhooks."""
    api = APIRouter(prefix="/api/v1/webhooks", tags=["webhooks"])
    store = webhooks.store

    @api.post("", status_code=201)
    async def create(request: WebhookRequest) -> WebhookAnswer:
        """Adds a webhook, for what happens from now on."""
        new = NewWebhook(
            request.name, request.url, request.secret.get_secret_value(), parse_kinds(request.events), request.model,
            request.description, request.status,
        )  # fmt: skip
        return _answer(await webhooks.create(new))

    @api.get("")
    async def list_webhooks(limit: Limit = 100, offset: Offset = 0) -> list[WebhookAnswer]:
        """Webhooks, by name."""
        return [_answer(Made(found)) for found in await store.find(limit, offset)]

    @api.get("/{key}")
    async def get_webhook(key: Key) -> WebhookAnswer:
        """One webhook."""
        return _answer(Made(await store.get(key)))

    @api.patch("/{key}")
    async def change(key: Key, request: WebhookChange) -> WebhookAnswer:
        """Changes a webhook, also for what waits already."""
        return _answer(await webhooks.change(key, request.columns()))

    @api.delete("/{key}")
    async def delete(key: Key) -> dict[str, str]:
        """Deletes a webhook with its deliveries."""
        found = await store.delete(key)
        return {"webhook_id": found.webhook_id, "name": found.name}

    @api.post("/{key}/test")
    async def test(key: Key) -> TestAnswer:
        """Sends a signed event of the kind `test` now, once, also if the webhook is disabled."""
        answer = await webhooks.test(key)
        return TestAnswer(success=not answer.error, status=answer.status, error=answer.error, body=answer.body)

    @api.get("/{key}/deliveries")
    async def deliveries(
        key: Key,
        state: DeliveryState | None = None,
        limit: Limit = 100,
        before: Annotated[int | None, Query(lt=2**63, description="The last `number` of the page before.")] = None,
    ) -> list[DeliveryAnswer]:
        """What became of its events, newest first."""
        return [_delivered(found) for found in await store.find_deliveries(key, state, limit, before)]

    @api.post("/{key}/deliveries/{delivery_id}/redeliver")
    async def redeliver(key: Key, delivery_id: Annotated[str, Path(max_length=80)]) -> DeliveryAnswer:
        """Sends an event again, under the same delivery id and with all attempts."""
        return _delivered(await store.redeliver(key, delivery_id))

    return api


def _answer(made: Made) -> WebhookAnswer:
    found = made.webhook
    return WebhookAnswer(
        webhook_id=found.webhook_id, name=found.name, url=found.url, events=sorted(found.kinds), model=found.model,
        status=found.status, status_reason=found.status_reason, description=found.description,
        created_at=found.created_at, updated_at=found.updated_at, secret=made.secret,
    )  # fmt: skip


def _delivered(found: Delivery) -> DeliveryAnswer:
    return DeliveryAnswer(**asdict(found))
