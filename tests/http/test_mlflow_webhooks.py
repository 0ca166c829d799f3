"""MLflow's webhooks, by its stock client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from mlflow import MlflowClient
from mlflow.entities.webhook import WebhookEvent
from mlflow.exceptions import MlflowException
from mlflow.webhooks.delivery import _generate_hmac_signature

from mlplat.db.lease import LeaseKeeper
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.delivery import Deliveries
from mlplat.webhooks.sender import Sender
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error
from tests.http.served import Served
from tests.receiver import SECRET, Receiver

INVALID = "INVALID_PARAMETER_VALUE"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = await Receiver().start()
    yield receiver
    await receiver.stop()


async def test_the_client_has_all_of_them(served: Served, receiver: Receiver) -> None:
    client, name = MlflowClient(served.url), unique("hook")

    def use() -> None:
        events: list[WebhookEvent] = [
            WebhookEvent("model_version_alias", "created"),
            WebhookEvent("model_version_tag", "deleted"),
        ]
        made = client.create_webhook(name, receiver.url, [*events], description="about", secret=SECRET)
        found = client.get_webhook(made.webhook_id)
        assert found.events == events
        assert (found.name, found.url, found.description, str(found.status)) == (name, receiver.url, "about", "ACTIVE")
        assert made.secret is None
        assert found.creation_timestamp > 1_700_000_000_000
        assert client.test_webhook(made.webhook_id).response_status == 200
        said = client.test_webhook(made.webhook_id, "model_version.created")
        assert (said.success, said.response_body, said.error_message) == (True, "said so", None)
        receiver.answers = [500]
        failed = client.test_webhook(made.webhook_id)
        assert (failed.success, failed.response_status) == (False, 500)
        changed = client.update_webhook(made.webhook_id, status="DISABLED", events=["registered_model.created"])
        assert (str(changed.status), [str(event) for event in changed.events]) == (
            "DISABLED", ["registered_model.created"],
        )  # fmt: skip
        assert changed.description == "about"
        other = client.create_webhook(f"{name}.2", receiver.url, [*events])
        page = client.list_webhooks(max_results=1)
        ids = [hook.webhook_id for hook in page]
        while page.token:
            page = client.list_webhooks(max_results=1, page_token=page.token)
            ids += [hook.webhook_id for hook in page]
        assert {made.webhook_id, other.webhook_id} <= set(ids)
        assert len(set(ids)) == len(ids)
        for hook in (made, other):
            client.delete_webhook(hook.webhook_id)
        with pytest.raises(MlflowException, match="No webhook"):
            client.get_webhook(made.webhook_id)

    await asyncio.to_thread(use)
    first, second, _failed = receiver.received
    assert (first.body["entity"], first.body["action"]) == ("model_version_alias", "created")
    assert second.body["data"]["name"] == "example_model"


async def test_deliveries_are_what_mlflow_would_send(stack: Stack, mlflow: MLflow, receiver: Receiver) -> None:
    lease = LeaseKeeper(stack.engine, unique("webhooks"), "tests", 600)
    await lease.start()
    deliveries = Deliveries(stack.engine, lease, Sender(Targets.parse(["127.0.0.1"])))
    events = [("REGISTERED_MODEL", "CREATED"), ("MODEL_VERSION", "CREATED"), ("MODEL_VERSION_TAG", "DELETED"),
              ("MODEL_VERSION_ALIAS", "CREATED")]  # fmt: skip
    made = await mlflow.call(
        "POST", "webhooks", name=unique("hook"), url=receiver.url, secret=SECRET,
        events=[{"entity": entity, "action": action} for entity, action in events],
    )  # fmt: skip
    name = unique("model")
    await mlflow.call("POST", "registered-models/create", name=name, description="d", tags=[{"key": "a", "value": "b"}])
    await mlflow.call("POST", "model-versions/create", name=name, source="s3://b/m")
    await mlflow.call("POST", "model-versions/set-tag", name=name, version="1", key="k", value="v")
    await mlflow.call("DELETE", "model-versions/delete-tag", name=name, version="1", key="k")
    await mlflow.call("POST", "registered-models/alias", name=name, alias="champion", version="1")
    for _ in range(6):
        await deliveries.look()
        await deliveries.settle()
    got = [(item.body["entity"], item.body["action"], item.body["data"]) for item in receiver.received]
    assert got == [
        ("registered_model", "created", {"name": name, "tags": {"a": "b"}, "description": "d"}),
        ("model_version", "created",
         {"name": name, "version": "1", "source": "s3://b/m", "run_id": None, "tags": {}, "description": ""}),
        ("model_version_tag", "deleted", {"name": name, "version": "1", "key": "k"}),
        ("model_version_alias", "created", {"name": name, "alias": "champion", "version": "1"}),
    ]  # fmt: skip
    last = receiver.received[-1]
    assert last.headers["x-mlflow-signature"] == _generate_hmac_signature(
        SECRET, last.headers["x-mlflow-delivery-id"], last.headers["x-mlflow-timestamp"],
        json.dumps(last.body, separators=(",", ":"), ensure_ascii=False),
    )  # fmt: skip
    await mlflow.call("DELETE", f"webhooks/{made['webhook']['webhook_id']}")
    await deliveries.stop()
    await lease.stop()


async def test_native_webhooks_are_listed_where_mlflow_has_their_events(
    http: httpx.AsyncClient, mlflow: MLflow
) -> None:
    kinds = {"everything": [], "tags": ["version_tag_set", "stage_set"], "stages": ["stage_set"]}
    ids = {}
    for what, events in kinds.items():
        body = {"name": unique(what), "url": "http://127.0.0.1/", "events": events}
        ids[(await http.post("/api/v1/webhooks", json=body)).json()["webhook_id"]] = what
    listed = {
        ids[hook["webhook_id"]]: [f"{event['entity']}.{event['action']}" for event in hook["events"]]
        for hook in (await mlflow.call("GET", "webhooks"))["webhooks"]
        if hook["webhook_id"] in ids
    }
    assert len(listed.pop("everything")) == 6
    assert listed == {"tags": ["MODEL_VERSION_TAG.DELETED", "MODEL_VERSION_TAG.SET"]}
    for webhook_id in ids:
        await http.delete(f"/api/v1/webhooks/{webhook_id}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"events": [{"entity": "PROMPT", "action": "CREATED"}]}, "'prompt.created' are not supported"),
        ({"events": [{"entity": "BUDGET_POLICY", "action": "EXCEEDED"}]}, "'budget_policy.exceeded'"),
        ({"events": []}, "Missing value for required parameter 'events'"),
        ({"name": ""}, "Missing value for required parameter 'name'"),
        ({"name": "-x"}, "Webhook name '-x' is invalid"),
        ({"url": "http://10.0.0.1/"}, "has a private address"),
        ({"secret": "short"}, "secret: expected 16"),
        ({"status": "PAUSED"}, "Invalid webhook status 'PAUSED'"),
    ],
)
async def test_what_cannot_be_is_refused(mlflow: MLflow, fields: dict[str, object], message: str) -> None:
    body = {"name": unique("hook"), "url": "http://127.0.0.1/", "events": [{"entity": "MODEL_VERSION",
            "action": "CREATED"}], **fields}  # fmt: skip
    expect_error(await mlflow.send("POST", "webhooks", **body), 400, INVALID, message)
