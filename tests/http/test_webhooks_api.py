"""/api/v1/webhooks, the commands that use it, and what docs/webhooks.md says."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mlplat.cli import app
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import InvalidInput
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.delivery import Deliveries
from mlplat.webhooks.model import Retries
from mlplat.webhooks.sender import Sender
from mlplat.webhooks.signing import headers
from tests.contract.chdb import unique
from tests.http.conftest import MLflow, Stack, expect_error
from tests.http.served import Served
from tests.platform import ROOT
from tests.receiver import SECRET, Receiver

HOOKS = "/api/v1/webhooks"
INVALID = "INVALID_PARAMETER_VALUE"
TEXT = (ROOT / "docs" / "webhooks.md").read_text()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = await Receiver().start()
    yield receiver
    await receiver.stop()


@pytest.fixture
async def deliveries(stack: Stack) -> AsyncIterator[Deliveries]:
    """What the coordinator does, when the test says so."""
    lease = LeaseKeeper(stack.engine, unique("webhooks"), "tests", 600)
    await lease.start()
    deliveries = Deliveries(
        stack.engine, lease, Sender(Targets.parse(["127.0.0.1"]), timeout_s=5), Retries(max_attempts=2, first_s=0)
    )
    yield deliveries
    await deliveries.stop()
    await lease.stop()
    for hook in await stack.services.webhooks.store.find(1_000, 0):
        await stack.services.webhooks.store.delete(hook.webhook_id)


async def deliver(deliveries: Deliveries, rounds: int = 1) -> None:
    for _ in range(rounds):
        await deliveries.look()
        await deliveries.settle()


async def create(http: httpx.AsyncClient, url: str, **fields: Any) -> Any:
    response = await http.post(HOOKS, json={"name": unique("hook"), "url": url, "secret": SECRET, **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def test_a_webhook_from_its_creation_to_its_end(
    http: httpx.AsyncClient, mlflow: MLflow, deliveries: Deliveries, receiver: Receiver
) -> None:
    model = unique("model")
    made = await create(http, receiver.url, events=["model_created"], model=model, description="about")
    assert (made["status"], made["events"], made["model"], made["secret"]) == ("ACTIVE", ["model_created"], model, None)
    name, url = made["name"], f"{HOOKS}/{made['name']}"
    receiver.answers = [500, 503]
    await mlflow.call("POST", "registered-models/create", name=model)
    await deliver(deliveries, 3)
    [dead] = (await http.get(f"{url}/deliveries")).json()
    assert (dead["state"], dead["attempts"], dead["last_status"], dead["kind"]) == ("DEAD", 2, 503, "model_created")
    assert (await http.get(f"{url}/deliveries?state=PENDING")).json() == []
    assert (await http.get(f"{url}/deliveries?before={dead['number']}")).json() == []
    again = await http.post(f"{url}/deliveries/{dead['delivery_id']}/redeliver")
    assert (again.status_code, again.json()["state"]) == (200, "PENDING")
    await deliver(deliveries)
    [done] = (await http.get(f"{url}/deliveries?state=DELIVERED")).json()
    assert receiver.received[-1].delivery == done["delivery_id"] == dead["delivery_id"]
    assert receiver.told("model", "kind") == [(model, "model_created")] * 3
    changed = (await http.patch(url, json={"events": [], "status": "DISABLED", "name": f"{name}-2"})).json()
    assert (changed["name"], changed["events"], changed["status"]) == (f"{name}-2", [], "DISABLED")
    assert (changed["model"], changed["url"], changed["description"]) == (model, receiver.url, "about")
    by_id = f"{HOOKS}/{made['webhook_id']}"
    assert (await http.get(by_id)).json() == changed
    assert changed in (await http.get(HOOKS)).json()
    assert (await http.delete(by_id)).json() == {"webhook_id": made["webhook_id"], "name": f"{name}-2"}
    expect_error(await http.get(by_id), 404, "RESOURCE_DOES_NOT_EXIST", "No webhook with the id or name")


async def test_a_test_event_is_sent_at_once(http: httpx.AsyncClient, receiver: Receiver) -> None:
    made = await create(http, receiver.url, status="DISABLED")
    receiver.answers = [200, 404]
    url = f"{HOOKS}/{made['webhook_id']}/test"
    assert (await http.post(url)).json() == {"success": True, "status": 200, "error": "", "body": "said so"}
    assert (await http.post(url)).json() == {
        "success": False, "status": 404, "error": "answered 404: said so", "body": "said so",
    }  # fmt: skip
    assert receiver.told("kind") == [("test",)] * 2
    assert receiver.received[0].headers["x-mlplat-event"] == "test"
    await receiver.stop()
    assert "ConnectError" in (await http.post(url)).json()["error"]


async def test_a_secret_that_is_made_up_is_shown_once(http: httpx.AsyncClient, receiver: Receiver) -> None:
    made = (await http.post(HOOKS, json={"name": unique("hook"), "url": receiver.url})).json()
    receiver.secret = made["secret"]
    url = f"{HOOKS}/{made['webhook_id']}"
    assert (await http.post(f"{url}/test")).json()["success"]
    changed = (await http.patch(url, json={"secret": ""})).json()
    assert changed["secret"] not in {None, made["secret"]}
    receiver.secret = changed["secret"]
    assert (await http.post(f"{url}/test")).json()["success"]
    chosen = "chosen-by-somebody"
    answers = [
        await http.patch(url, json={"secret": chosen}),
        await http.get(url),
        await http.get(HOOKS),
        await http.post(HOOKS, json={"name": made["name"], "url": "http://x.example/", "secret": chosen}),
    ]
    assert answers[-1].status_code == 400
    for answer in answers:
        for secret in (made["secret"], changed["secret"], chosen):
            assert secret not in answer.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "http://10.0.0.1/"}, "url: 10.0.0.1 has a private address"),
        ({"url": "http://[::1]/"}, "url: ::1 has a loopback address"),
        ({"url": "http://2130706433/"}, "url: '2130706433' is no host name"),
        ({"url": "http://169.254.169.254/latest/meta-data"}, "url: 169.254.169.254 has a link-local address"),
        ({"url": "ftp://example.com/"}, "url: must start with https://"),
        ({"secret": "tiny-secret"}, "secret: expected 16 to 200"),
        ({"events": ["alias_moved"]}, "no such kind of event: alias_moved"),
        ({"name": "-x"}, "body.name"),
        ({"name": "x" * 64}, "body.name"),
        ({"status": "PAUSED"}, "body.status"),
        ({"model": ""}, "body.model"),
        ({"unknown": 1}, "body.unknown"),
    ],
)
async def test_what_cannot_be_is_refused_early(http: httpx.AsyncClient, fields: dict[str, Any], message: str) -> None:
    body = {"name": unique("hook"), "url": "http://127.0.0.1/", "secret": SECRET, **fields}
    response = await http.post(HOOKS, json=body)
    expect_error(response, 400, INVALID, message)
    assert "tiny-secret" not in response.text
    if "name" not in fields:
        expect_error(await http.get(f"{HOOKS}/{body['name']}"), 404, "RESOURCE_DOES_NOT_EXIST", body["name"])


async def test_what_cannot_be_is_refused_in_changes_too(http: httpx.AsyncClient, receiver: Receiver) -> None:
    one, two = [await create(http, receiver.url) for _ in range(2)]
    url = f"{HOOKS}/{one['name']}"
    for body, message in [({"url": "http://10.0.0.1/"}, "private"), ({"secret": "short"}, "16 to 200")]:
        expect_error(await http.patch(url, json=body), 400, INVALID, message)
    expect_error(await http.patch(url, json={"name": two["name"]}), 400, "RESOURCE_ALREADY_EXISTS", two["name"])
    assert (await http.get(url)).json() == one
    for method, path in [
        ("GET", "nobody"), ("PATCH", "nobody"), ("DELETE", "nobody"), ("POST", "nobody/test"),
        ("GET", "nobody/deliveries"), ("POST", "nobody/deliveries/x/redeliver"),
        ("POST", f"{one['name']}/deliveries/x/redeliver"),
    ]:  # fmt: skip
        answer = await http.request(method, f"{HOOKS}/{path}", json={} if method == "PATCH" else None)
        expect_error(answer, 404, "RESOURCE_DOES_NOT_EXIST", "o webhook" if "nobody" in path else "no delivery")


# -- commands and docs ---------------------------------------------------------------------------


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["webhooks", *arguments])
    if isinstance(result.exception, InvalidInput):
        raise result.exception
    return f"{result.exit_code} {result.output}"


async def test_commands(
    served: Served, mlflow: MLflow, deliveries: Deliveries, receiver: Receiver, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "400")
    model, name, file = unique("model [1]"), unique("hook"), tmp_path / "secret"
    file.write_text(f"{SECRET}\n")

    def call(*arguments: str) -> Any:
        return asyncio.to_thread(run, *arguments)

    made = await call(
        "create", name, receiver.url, "--event", "model_created", "--model", model, "--secret-file", str(file)
    )
    assert made == f"0 webhook {name}: model_created of {model} → {receiver.url}\n"
    assert model in await call("list")
    assert SECRET not in await call("show", name) + await call("list")
    assert "answered 200" in await call("test", name)
    receiver.answers = [500, 500, 500]
    assert (await call("test", name)).startswith("1 ")
    await mlflow.call("POST", "registered-models/create", name=model)
    await deliver(deliveries, 2)
    listed = await call("deliveries", name, "--state", "DEAD")
    assert model in listed
    assert "answered 500: said so" in listed
    assert "1 to be delivered again" in await call("redeliver", name, "--dead")
    await deliver(deliveries)
    assert receiver.told("kind")[-1] == ("model_created",)
    delivery = receiver.received[-1].delivery
    assert "1 to be delivered again" in await call("redeliver", name, delivery)
    assert "all events" in await call("update", name, "--all-events", "--model", "*", "--disable")
    assert "DISABLED" in await call("list")
    rotated = await call("update", name, "--new-secret")
    receiver.secret = rotated.split("secret (not shown again): ")[1].strip()
    assert "answered 200" in await call("test", name)
    for wrong in (["update", name], ["update", name, "-e", "alias_set", "--all-events"], ["redeliver", name]):
        with pytest.raises(InvalidInput):
            await call(*wrong)
    assert "is deleted" in await call("delete", name)
    generated = await call("create", name, receiver.url)
    receiver.secret = generated.split("secret (not shown again): ")[1].strip()
    assert "answered 200" in await call("test", name)


@pytest.mark.usefixtures("deliveries")
async def test_the_docs_are_true(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [line for body in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in body.splitlines()]
    assert len(commands) == 12
    for line in commands:
        if line.startswith("mlplat"):
            result = await asyncio.to_thread(CliRunner().invoke, app, shlex.split(line)[1:])
            assert result.exit_code == 0, (line, result.output, result.exception)
        else:
            fetch = line.replace("curl", "curl -sS --fail", 1).replace("$MLPLAT_URL", served.url)
            await asyncio.to_thread(subprocess.run, ["bash", "-c", fetch], check=True, timeout=20, capture_output=True)
    [snippet] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    body = b'{"kind":"alias_set"}'
    given = headers(SECRET, "d", "alias_set", int(time.time()), body)
    assert scope["is_genuine"](SECRET, given, body)
    assert not scope["is_genuine"](SECRET, given, body + b" ")
    assert not scope["is_genuine"](SECRET, headers(SECRET, "d", "alias_set", int(time.time()) - 400, body), body)
