"""MLflow's webhook endpoints. Its client sees those webhooks that want events which MLflow has, too."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import Answer, Endpoint, check_limit, page_offset, paged, require
from mlplat.http.services import Services
from mlplat.tracking.model import to_ms
from mlplat.webhooks.model import NAME_PATTERN, Status, Webhook
from mlplat.webhooks.payload import MLFLOW_EVENTS, mlflow_events
from mlplat.webhooks.store import MAX_WEBHOOKS, NewWebhook

DEFAULT_PAGE = 100
MAX_DESCRIPTION = 2_000


class Event(msgspec.Struct):
    """An event as protobuf's JSON has it."""

    entity: str = ""
    action: str = ""

    @property
    def name(self) -> str:
        """``entity.action``.

        Raises:
            InvalidInput: there are no such events here.
        """
        name = f"{self.entity}.{self.action}".lower()
        if name not in MLFLOW_EVENTS:
            raise InvalidInput(
                f"Webhooks of {name[:80]!r} are not supported; there are {', '.join(sorted(MLFLOW_EVENTS))}. "
                "Prompts are registered models here."
            )
        return name


class One(msgspec.Struct):
    """webhooks/{webhook_id}"""

    webhook_id: str = ""


class Change(One):
    """Creates or changes a webhook; what is empty stays as it is."""

    name: str = ""
    url: str = ""
    events: list[Event] = []
    description: str | None = None
    secret: str = ""
    status: str = ""


class Page(msgspec.Struct):
    """webhooks"""

    max_results: int = DEFAULT_PAGE
    page_token: str | None = None


class Test(One):
    """webhooks/{webhook_id}/test"""

    event: Event | None = None


async def create(services: Services, request: Change) -> Answer:
    """webhooks/create. Without a secret one is made up, which nobody learns: its signatures cannot be checked."""
    if not request.events:
        raise InvalidInput("Missing value for required parameter 'events'.")
    columns = _columns(request)
    new = NewWebhook(
        require("name", request.name), require("url", request.url), request.secret, frozenset(columns["kinds"]), "*",
        request.description or "", columns.get("status", Status.ACTIVE),
    )  # fmt: skip
    return {"webhook": _wire((await services.webhooks.create(new)).webhook)}


async def search(services: Services, request: Page) -> Answer:
    """webhooks, by name."""
    limit, offset = check_limit(request.max_results, MAX_WEBHOOKS), page_offset(request.page_token)
    found = [item for item in await services.webhooks.store.find(MAX_WEBHOOKS, 0) if mlflow_events(item.kinds)]
    return paged("webhooks", [_wire(item) for item in found[offset : offset + limit + 1]], limit, offset)


async def get(services: Services, request: One) -> Answer:
    """webhooks/{webhook_id}"""
    return {"webhook": _wire(await services.webhooks.store.get(request.webhook_id))}


async def update(services: Services, request: Change) -> Answer:
    """webhooks/{webhook_id}"""
    return {"webhook": _wire((await services.webhooks.change(request.webhook_id, _columns(request))).webhook)}


async def delete(services: Services, request: One) -> Answer:
    """webhooks/{webhook_id}"""
    await services.webhooks.store.delete(request.webhook_id)
    return {}


async def test(services: Services, request: Test) -> Answer:
    """webhooks/{webhook_id}/test: an example of the event, or of the first one that the webhook wants."""
    named = None if request.event is None else request.event.name
    if named is None:
        named = next(iter(mlflow_events((await services.webhooks.store.get(request.webhook_id)).kinds)), None)
    said = await services.webhooks.test(request.webhook_id, named)
    result: dict[str, Any] = {"success": not said.error}
    if said.status is not None:
        result |= {"response_status": said.status, "response_body": said.body}
    if said.error:
        result["error_message"] = said.error
    return {"result": result}


def _columns(request: Change) -> dict[str, Any]:
    """What is given, checked as far as the URL and the secret are not."""
    if request.name and not re.fullmatch(NAME_PATTERN, request.name):
        raise InvalidInput(
            f"Webhook name {request.name[:100]!r} is invalid: 1 to 63 letters, digits, '.', '_' and '-'."
        )
    if request.description is not None and len(request.description) > MAX_DESCRIPTION:
        raise InvalidInput(f"description: has more than {MAX_DESCRIPTION} characters")
    if request.status and request.status not in set(Status):
        raise InvalidInput(f"Invalid webhook status {request.status[:50]!r}; it must be ACTIVE or DISABLED.")
    given: dict[str, Any] = {"name": request.name, "url": request.url, "secret": request.secret}
    columns = {name: value for name, value in given.items() if value}
    if request.events:
        columns["kinds"] = sorted({event.name for event in request.events})
    if request.description is not None:
        columns["description"] = request.description
    if request.status:
        columns["status"] = Status(request.status)
    return columns


def _wire(found: Webhook) -> Answer:
    names = [name.upper().split(".") for name in mlflow_events(found.kinds)]
    return {
        "webhook_id": found.webhook_id, "name": found.name, "url": found.url,
        "events": [{"entity": entity, "action": action} for entity, action in names],
        "description": found.description, "status": found.status.value, "creation_timestamp": to_ms(found.created_at),
        "last_updated_timestamp": to_ms(found.updated_at),
    }  # fmt: skip


ENDPOINTS = (
    Endpoint(("POST",), "webhooks", Change, create),
    Endpoint(("GET",), "webhooks", Page, search),
    Endpoint(("GET",), "webhooks/{webhook_id}", One, get),
    Endpoint(("PATCH",), "webhooks/{webhook_id}", Change, update),
    Endpoint(("DELETE",), "webhooks/{webhook_id}", One, delete),
    Endpoint(("POST",), "webhooks/{webhook_id}/test", Test, test),
)
