"""/api/v1/schedules and /api/v1/triggers, and the commands on top of them."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import mlplat
from mlplat.cli import app
from mlplat.errors import InvalidInput, NotFound, PermissionDenied
from mlplat.pipelines.automation.webhooks import MAX_BODY_BYTES, signature
from mlplat.pipelines.loader import build_spec
from mlplat.sdk.automation import fire_trigger
from tests.contract.chdb import unique
from tests.contract.waiting import until
from tests.http.conftest import MLflow, Stack, expect_error
from tests.http.served import Served

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
SCHEDULES = "/api/v1/schedules"
TRIGGERS = "/api/v1/triggers"
SECRET = "0123456789abcdef"
BEARER = {"Authorization": f"Bearer {SECRET}"}
SPEC: dict[str, Any] = {
    "name": "report",
    "parameters": {"about": {"type": "str", "default": ""}, "size": {"type": "int", "default": 0}},
    "steps": {"a": {"uses": "os:getcwd"}},
}


def schedule(**changes: Any) -> dict[str, Any]:
    return {"spec": SPEC, "cron": "0 3 * * *"} | changes


def trigger(on: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"spec": SPEC, "on": on} | changes


def webhook(**changes: Any) -> dict[str, Any]:
    return trigger({"kind": "webhook", "secret": SECRET} | changes.pop("on", {}), **changes)


async def put(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    response = await http.put(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def run_of(http: httpx.AsyncClient, source: str) -> dict[str, Any]:
    """The one run that a schedule or trigger starts."""
    found: list[dict[str, Any]] = []

    async def has_run() -> bool:
        found[:] = (await http.get("/api/v1/pipeline-runs", params={"source": source})).json()
        return bool(found)

    await until(has_run)
    assert len(found) == 1
    return found[0]


# -- schedules -------------------------------------------------------------------------------


async def test_a_schedule_is_put_read_paused_resumed_and_deleted(http: httpx.AsyncClient) -> None:
    path = f"{SCHEDULES}/{unique('s')}"
    params = {"about": "${{ trigger.date }}", "size": 3}
    made = await put(http, path, schedule(time_zone="Europe/Berlin", params=params, created_by="ann"))
    assert made["params"] == params
    assert (made["pipeline"], made["cron"], made["time_zone"], made["catch_up"], made["created_by"]) == (
        "report", "0 3 * * *", "Europe/Berlin", "latest", "ann",
    )  # fmt: skip
    assert datetime.fromisoformat(made["next_at"]) > datetime.now(UTC)
    assert (await http.get(path)).json() == made
    assert made in (await http.get(SCHEDULES, params={"limit": 1000})).json()
    assert (await http.get(f"{path}/definition")).json()["steps"] == SPEC["steps"]
    assert (await http.post(f"{path}/pause")).json()["next_at"] is None
    assert (await http.get(path)).json()["paused"] is True
    assert (await http.post(f"{path}/resume")).json()["next_at"] == made["next_at"]
    again = await put(http, path, schedule(cron="@hourly", params={}))
    assert (again["cron"], again["created_at"], again["params"]) == ("@hourly", made["created_at"], {})
    assert (await http.get(f"{path}/runs")).json() == []
    assert (await http.delete(path)).status_code == 200
    for method, there in (("GET", path), ("DELETE", path), ("POST", f"{path}/pause"), ("GET", f"{path}/next"),
                          ("GET", f"{path}/runs"), ("GET", f"{path}/definition")):  # fmt: skip
        expect_error(await http.request(method, there), 404, MISSING, "No schedule with name=")


async def test_the_next_fire_times_are_in_the_time_zone(http: httpx.AsyncClient) -> None:
    path = f"{SCHEDULES}/{unique('s')}"
    await put(http, path, schedule(cron="30 6 1 7,12 *", time_zone="Europe/Berlin", paused=True))
    preview = (await http.get(f"{path}/next", params={"count": 4})).json()
    assert preview["time_zone"] == "Europe/Berlin"
    assert {moment[5:] for moment in preview["times"]} == {"07-01T06:30:00+02:00", "12-01T06:30:00+01:00"}
    assert len(preview["times"]) == 4


async def test_a_schedule_that_is_due_runs(http: httpx.AsyncClient, stack: Stack) -> None:
    name = unique("s")
    await put(http, f"{SCHEDULES}/{name}", schedule(cron="* * * * *", params={"about": "${{ trigger.name }}"}))
    async with stack.engine.begin() as connection:  # the minute that has begun is its first and last
        moment = "date_trunc('minute', clock_timestamp())"
        statement = f"UPDATE schedule SET next_at = {moment}, ends_at = {moment} WHERE name = %s"
        await connection.exec_driver_sql(statement, (name,))
    await stack.services.scheduler.wake()
    run = await run_of(http, f"schedule:{name}")
    assert run["params"] == {"about": name, "size": 0}
    found: list[Any] = []

    async def is_recorded() -> bool:
        found[:] = (await http.get(f"{SCHEDULES}/{name}/runs")).json()
        return all(row["state"] != "PENDING" for row in found)

    await until(is_recorded)
    newest = found[0]
    assert (newest["state"], newest["run_id"], newest["run_state"]) == ("SUBMITTED", run["run_id"], "QUEUED")
    assert (await http.get(f"{SCHEDULES}/{name}")).json()["last_run_id"] == run["run_id"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cron": "0 25 * * *"}, "hour '25' is not valid (0-23)"),
        ({"cron": "* *"}, "has 2 fields, expected 5"),
        ({"cron": None}, "cron: Input should be a valid string"),
        ({"time_zone": "Europe/Berln"}, "did you mean Europe/Berlin"),
        ({"catch_up": "some"}, "catch_up: Input should be 'skip', 'latest' or 'all'"),
        ({"catch_up_limit": 0}, "catch_up_limit: Input should be greater than or equal to 1"),
        ({"misfire_grace_s": 0}, "misfire_grace_s"),
        ({"starts_at": "2026-01-01T00:00:00"}, "starts_at: Input should have timezone info"),
        ({"ends_at": "2020-01-01T00:00:00Z"}, "would never fire"),
        ({"params": {"sise": 1}}, "parameters.sise: unknown"),
        ({"params": {"size": "${{ trigger.date }}"}}, "parameters.size: expected int"),
        ({"params": {"about": "${{ steps.a.output }}"}}, "here expressions read trigger.name"),
        ({"spec": {"name": "report"}}, "steps: required, but missing"),
        ({"spec": "report.yaml"}, "spec: Input should be"),
        ({"sepc": {}}, "sepc: Extra inputs are not permitted"),
    ],
)
async def test_a_bad_schedule_is_400_and_leaves_nothing(
    http: httpx.AsyncClient, changes: dict[str, Any], message: str
) -> None:
    path = f"{SCHEDULES}/{unique('s')}"
    expect_error(await http.put(path, json=schedule(**changes)), 400, INVALID, message)
    assert (await http.get(path)).status_code == 404


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"spec": {}, "cron": "@daily", "params": {"a": "\\u0000"}}']
)
async def test_a_body_that_is_none_is_400(http: httpx.AsyncClient, body: bytes) -> None:
    for path in (f"{SCHEDULES}/x", f"{TRIGGERS}/x"):
        assert (await http.put(path, content=body)).status_code == 400


async def test_a_name_is_part_of_keys_and_so_is_plain(http: httpx.AsyncClient) -> None:
    for name in ("1st", "a:b", "a b", "x" * 64, "%00", "ä"):
        assert (await http.put(f"{SCHEDULES}/{name}", json=schedule())).status_code == 400, name
        assert (await http.put(f"{TRIGGERS}/{name}", json=webhook())).status_code == 400, name


# -- triggers --------------------------------------------------------------------------------


async def test_a_trigger_is_put_read_paused_resumed_and_deleted(http: httpx.AsyncClient) -> None:
    path = f"{TRIGGERS}/{unique('t')}"
    on = {"kind": "registry", "events": ["alias_set"], "model": "digits*", "alias": "champion"}
    made = await put(http, path, trigger(on, params={"about": "${{ trigger.event.model }}"}, max_per_hour=5))
    assert (made["on"], made["max_per_hour"], made["paused"]) == (on, 5, False)
    assert (await http.get(path)).json() == made
    assert made in (await http.get(TRIGGERS, params={"limit": 1000})).json()
    assert (await http.get(f"{path}/definition")).json()["name"] == "report"
    assert (await http.post(f"{path}/pause")).json()["paused"] is True
    assert (await http.post(f"{path}/resume")).json()["paused"] is False
    assert (await http.get(f"{path}/runs")).json() == []
    assert (await http.delete(path)).status_code == 200
    for method, there in (("GET", path), ("DELETE", path), ("POST", f"{path}/resume"), ("GET", f"{path}/runs"),
                          ("POST", f"{path}/fire")):  # fmt: skip
        expect_error(await http.request(method, there), 404, MISSING, "No trigger with name=")


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ({}, "on: Unable to extract tag using discriminator 'kind'"),
        ({"kind": "mail"}, "on: Input tag 'mail' found using 'kind' does not match any of the expected tags"),
        ({"kind": "registry", "events": ["born"]}, "on.registry.events.0: Input should be 'model_created'"),
        ({"kind": "pipeline"}, "on.pipeline.pipelines: Field required"),
        ({"kind": "pipeline", "pipelines": ["rep*"]}, "it would start itself"),
        ({"kind": "pipeline", "pipelines": ["a"], "states": ["RUNNING"]}, "on.pipeline.states.0"),
        ({"kind": "webhook"}, "secret: a webhook with bearer authentication needs one"),
        ({"kind": "webhook", "secret": "short"}, "secret: has 5 characters, expected 16 to 200"),
        ({"kind": "webhook", "secret": SECRET, "auth": "none"}, "on.webhook.auth"),
        ({"kind": "webhook", "secret": SECRET, "when": "yes"}, "filter.when: expected an expression"),
        ({"kind": "webhook", "secret": SECRET, "model": "x"}, "on.webhook.model: Extra inputs are not permitted"),
    ],
)
async def test_a_bad_trigger_is_400_and_leaves_nothing(
    http: httpx.AsyncClient, on: dict[str, Any], message: str
) -> None:
    path = f"{TRIGGERS}/{unique('t')}"
    expect_error(await http.put(path, json=trigger(on)), 400, INVALID, message)
    assert (await http.get(path)).status_code == 404


async def test_a_registered_version_starts_a_run(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    name, model = unique("t"), unique("model")
    params = {"about": "${{ trigger.event.model }}", "size": "${{ trigger.event.version }}"}
    await put(http, f"{TRIGGERS}/{name}", trigger({"kind": "registry", "model": model}, params=params))
    await mlflow.call("POST", "registered-models/create", name=model)
    await mlflow.call("POST", "model-versions/create", name=model, source="s3://bucket/model")
    run = await run_of(http, f"trigger:{name}")
    assert run["params"] == {"about": model, "size": 1}


# -- webhooks --------------------------------------------------------------------------------


async def test_a_webhook_starts_a_run_once_per_delivery(http: httpx.AsyncClient) -> None:
    name = unique("t")
    await put(http, f"{TRIGGERS}/{name}", webhook(params={"about": "${{ trigger.event.ref }}"}))
    for header in ("Idempotency-Key", "X-GitHub-Delivery"):
        response = await http.post(
            f"{TRIGGERS}/{name}/fire", json={"ref": "main"}, headers={**BEARER, header: "delivery-1"}
        )
        assert response.status_code == 202
        assert response.json()["event_id"] == "delivery-1"
    run = await run_of(http, f"trigger:{name}")
    assert run["params"] == {"about": "main", "size": 0}

    async def is_submitted() -> bool:
        found = (await http.get(f"{TRIGGERS}/{name}/runs/delivery-1")).json()
        return bool(found["run_id"] == run["run_id"])

    await until(is_submitted)
    repeated = await http.post(f"{TRIGGERS}/{name}/fire", headers={**BEARER, "Idempotency-Key": "delivery-1"})
    assert repeated.json() == {
        "event_id": "delivery-1", "state": "SUBMITTED", "reason": "", "run_id": run["run_id"],
    }  # fmt: skip
    expect_error(await http.get(f"{TRIGGERS}/{name}/runs/nothing"), 404, MISSING, "decided nothing about 'nothing'")


async def test_a_signed_webhook(http: httpx.AsyncClient) -> None:
    name = unique("t")
    made = await put(http, f"{TRIGGERS}/{name}", webhook(on={"auth": "signature"}))
    assert made["on"] == {"kind": "webhook", "auth": "signature"}
    body = b'{"action": "published"}'
    headers = {"X-Hub-Signature-256": signature(SECRET, body)}
    assert (await http.post(f"{TRIGGERS}/{name}/fire", content=body, headers=headers)).status_code == 202
    for wrong in ({}, BEARER, {"X-Hub-Signature-256": signature("another secret", body)}):
        response = await http.post(f"{TRIGGERS}/{name}/fire", content=body, headers=wrong)
        expect_error(response, 403, "PERMISSION_DENIED", "X-Mlplat-Signature-256")
    altered = await http.post(f"{TRIGGERS}/{name}/fire", content=body + b" ", headers=headers)
    assert altered.status_code == 403
    await run_of(http, f"trigger:{name}")


async def test_what_a_webhook_refuses(http: httpx.AsyncClient) -> None:
    path = f"{TRIGGERS}/{unique('t')}"
    await put(http, path, webhook(params={"size": "${{ trigger.event.size }}"}, max_per_hour=1))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": SECRET}):
        expect_error(await http.post(f"{path}/fire", headers=headers), 403, "PERMISSION_DENIED", "Bearer <secret>")
    for body in (b"[]", b"1", b"{", b"\xff", b"[" * 60_000):
        expect_error(await http.post(f"{path}/fire", content=body, headers=BEARER), 400, INVALID, "the body is not")
    large = b'{"a": "' + b"x" * MAX_BODY_BYTES + b'"}'
    expect_error(await http.post(f"{path}/fire", content=large, headers=BEARER), 413, "BAD_REQUEST", "at most 65536")
    for delivery in ("", "x" * 129, "a b"):
        headers = {**BEARER, "Idempotency-Key": delivery}
        expect_error(await http.post(f"{path}/fire", headers=headers), 400, INVALID, "visible ASCII characters")
    unfit = await http.post(f"{path}/fire", json={"size": "\x00"}, headers=BEARER)
    assert (unfit.status_code, unfit.json()["state"]) == (202, "FAILED")
    assert "parameters.size: expected int" in unfit.json()["reason"]
    response = await http.post(f"{path}/fire", json={}, headers=BEARER)
    expect_error(response, 429, "RESOURCE_EXHAUSTED", "has fired 1 times within an hour")
    assert response.headers["retry-after"] == "1"


async def test_a_condition_that_is_not_met_is_no_error(http: httpx.AsyncClient) -> None:
    path = f"{TRIGGERS}/{unique('t')}"
    await put(http, path, webhook(on={"when": "${{ trigger.event.ref == 'main' }}"}))
    ignored = (await http.post(f"{path}/fire", json={"ref": "other"}, headers=BEARER)).json()
    assert (ignored["state"], ignored["run_id"]) == ("IGNORED", None)
    assert (await http.get(f"{path}/runs")).json() == []


async def test_the_bodies_are_in_the_document_of_the_api(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    for path in (f"{SCHEDULES}/{{name}}", f"{TRIGGERS}/{{name}}"):
        schema = document["paths"][path]["put"]["requestBody"]["content"]["application/json"]["schema"]
        assert {"spec", "params", "paused"} <= set(schema["properties"])
        assert "$ref" not in json.dumps(schema)


# -- Python and the shell --------------------------------------------------------------------


async def test_schedules_and_triggers_from_python(served: Served) -> None:
    spec = build_spec(SPEC)
    name = unique("s")
    start = datetime.now(UTC) + timedelta(days=400)
    made = await asyncio.to_thread(
        mlplat.schedule, name, spec, "@daily", time_zone="Asia/Tokyo", params={"size": 1}, starts_at=start
    )
    assert (made["name"], made["time_zone"]) == (name, "Asia/Tokyo")
    assert datetime.fromisoformat(made["next_at"]) > start
    with pytest.raises(InvalidInput, match="hour '77' is not valid"):
        await asyncio.to_thread(mlplat.schedule, name, spec, "0 77 * * *")
    for auth in ("bearer", "signature"):
        name = unique("t")
        on = {"kind": "webhook", "auth": auth, "secret": SECRET}
        await asyncio.to_thread(mlplat.trigger, name, spec, on)
        fired = await asyncio.to_thread(fire_trigger, name, {"a": 1}, SECRET, delivery="d")
        assert fired["event_id"] == "d"
        with pytest.raises(PermissionDenied):
            await asyncio.to_thread(fire_trigger, name, {"a": 1}, "wrong")
    with pytest.raises(NotFound):
        await asyncio.to_thread(fire_trigger, unique("t"), {}, SECRET)


async def test_the_commands(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "report.yaml"
    file.write_text(json.dumps(SPEC))

    async def run(*arguments: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    name = unique("s")
    options = ["--cron", "0 3 * * *", "--tz", "Europe/Berlin", "-p", "about=${{ trigger.date }}", "-p", "size=4"]
    assert "next at" in await run("schedule", "set", name, str(file), *options)
    assert name in await run("schedule", "list", "--limit", "1000")
    assert (await run("schedule", "next", name, "-n", "3")).count("T03:00:00+0") == 3
    assert "is paused" in await run("schedule", "pause", name)
    assert "next at" in await run("schedule", "resume", name)
    assert "event" in await run("schedule", "runs", name)
    assert "is deleted" in await run("schedule", "delete", name)

    name = unique("t")
    shown = await run("trigger", "set", name, str(file), "--webhook", "bearer", "-p", "about=${{ trigger.event.ref }}")
    secret_file = tmp_path / "secret"
    secret_file.write_text(shown.partition("(not shown again): ")[2])
    fired = await run(
        "trigger", "fire", name, "--secret-file", str(secret_file), "--event", '{"ref": "x"}', "--delivery", "d1"
    )
    assert fired.startswith("d1: ")
    assert "secret" not in await run(
        "trigger", "set", name, str(file), "--webhook", "bearer"
    )  # it keeps the one it has
    assert "d1" in await run("trigger", "runs", name)
    assert "is paused" in await run("trigger", "pause", name)
    assert "goes on" in await run("trigger", "resume", name)
    assert name in await run("trigger", "list", "--limit", "1000")
    assert "is deleted" in await run("trigger", "delete", name)
    await run("trigger", "set", name, str(file), "--registry", "alias_set", "--alias", "champion", "--paused")
    assert "alias=champion" in await run("trigger", "list", "--limit", "1000")
    await run("trigger", "delete", name)
    await run("trigger", "set", name, str(file), "--pipeline", "prepare", "--state", "FAILED")
    await run("trigger", "delete", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trigger", "set", "t", "FILE"], "say one of --registry EVENT"),
        (["trigger", "set", "t", "FILE", "--registry", "alias_set", "--pipeline", "x"], "say one of"),
        (["trigger", "fire", "t", "--secret-file", "FILE", "--event", "{"], "--event is not JSON"),
        (["trigger", "fire", "t", "--secret-file", "FILE", "--event", "[]"], "--event is not a JSON object"),
        (["trigger", "fire", "t", "--secret-file", "/nowhere"], "/nowhere: cannot be read"),
        (["schedule", "set", "s", "FILE", "--cron", "@daily", "-p", "size"], "-p size: expected key=value"),
        (
            ["schedule", "set", "s", "FILE", "--cron", "@daily", "-p", "size=x"],
            "parameters.size: expected int, got 'x'",
        ),
    ],
)
async def test_what_the_commands_refuse(served: Served, tmp_path: Path, arguments: list[str], message: str) -> None:
    file = tmp_path / "report.yaml"
    file.write_text(json.dumps(SPEC))
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    result = await asyncio.to_thread(CliRunner().invoke, app, given)
    assert isinstance(result.exception, InvalidInput)
    assert message in result.exception.message
