"""The native API: metric batches, blobs, pipeline runs and status."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pyarrow as pa
import pytest

from mlplat.execution.capture import log_folder
from mlplat.http.bodies import MAX_BATCH_BYTES
from mlplat.metrics.model import Point, encode
from mlplat.pipelines.model import WHOLE_STEP, Attempt, AttemptState, State, StepRun
from mlplat.pipelines.transitions import TransitionWriter
from tests.contract.chdb import batch, unique
from tests.contract.pipelines import change, transition
from tests.contract.waiting import until
from tests.http.conftest import MLflow, Stack, expect_error

INVALID = "INVALID_PARAMETER_VALUE"
MISSING = "RESOURCE_DOES_NOT_EXIST"
RUNS = "/api/v1/pipeline-runs"
NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


def _spec(**changes: Any) -> dict[str, Any]:
    spec = {
        "name": "demo",
        "parameters": {"lr": {"type": "float", "default": 0.1}},
        "steps": {
            "zeta": {"uses": "os:getcwd", "with": {"x": "${{ params.lr }}"}},
            "alpha": {"uses": "os:getcwd", "needs": ["zeta"]},
        },
    }
    return spec | changes


async def _submit(http: httpx.AsyncClient, **fields: Any) -> str:
    response = await http.post(RUNS, json={"spec": _spec(), "idempotency_key": unique("key")} | fields)
    assert response.status_code == 200, response.text
    assert set(response.json()) == {"run_id"}
    return str(response.json()["run_id"])


async def test_an_arrow_batch_is_counted_and_shows_in_its_run(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    experiment = await mlflow.experiment()
    run_id = await mlflow.run(experiment)
    points = [Point("loss", 1 / (step + 1), 1_000 + step, step) for step in range(2_000)]
    body = batch(run_id, points)
    for _repeat in range(2):
        response = await http.post("/api/v1/metrics", content=body)
        assert (response.status_code, response.json()) == (200, {"points": 2_000})
    assert (await mlflow.data(run_id))["metrics"] == {"loss": 1 / 2_000}
    history = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="loss")
    assert [(point["step"], point["value"]) for point in history["metrics"]] == [(p.step, p.value) for p in points]


async def test_concurrent_batches_are_all_there(http: httpx.AsyncClient, mlflow: MLflow) -> None:
    run_id = await mlflow.run()
    bodies = [batch(run_id, [Point("m", 1.0, 1, 3 * number + i) for i in range(3)]) for number in range(60)]
    answers = await asyncio.gather(*(http.post("/api/v1/metrics", content=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    history = await mlflow.call("GET", "metrics/get-history", run_id=run_id, metric_key="m")
    assert [point["step"] for point in history["metrics"]] == list(range(180))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not an Arrow IPC stream"),
        (b'{"run_id": "x"}', "not an Arrow IPC stream"),
        (batch("r", [Point("m", 1.0, 1, 1)])[:-30], "not an Arrow IPC stream"),
        (encode(pa.table({"run_id": ["x"]})), "have the columns"),
    ],
)
async def test_a_malformed_batch_is_400(http: httpx.AsyncClient, body: bytes, message: str) -> None:
    expect_error(await http.post("/api/v1/metrics", content=body), 400, INVALID, message)


@pytest.mark.parametrize("path", ["/api/v1/metrics", "/api/v1/blobs", "/api/2.0/mlflow/runs/search"])
async def test_a_body_that_declares_too_much_is_413_before_it_is_read(http: httpx.AsyncClient, path: str) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(10_000):
            read += 1
            yield b"x" * 1_000_000

    response = await http.post(
        path, content=endless(), headers={"Content-Length": "10000000000", "Content-Type": "application/json"}
    )
    expect_error(response, 413, "BAD_REQUEST", "10000000000 bytes")
    assert read <= 1


async def test_a_body_that_grows_too_large_is_413(http: httpx.AsyncClient) -> None:
    sent = 0

    async def growing() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 2 * MAX_BATCH_BYTES:
            sent += 8 * 1024 * 1024
            yield bytes(8 * 1024 * 1024)

    response = await http.post("/api/v1/metrics", content=growing())
    expect_error(response, 413, "BAD_REQUEST", f"more than {MAX_BATCH_BYTES} bytes")
    assert sent <= MAX_BATCH_BYTES + 8 * 1024 * 1024


async def test_a_blob_is_stored_under_its_digest(http: httpx.AsyncClient, stack: Stack) -> None:
    for body in (b"", b"some bytes", bytes(range(256)) * 10_000):
        for _repeat in range(2):
            response = await http.post("/api/v1/blobs", content=body)
            assert response.json() == {"digest": hashlib.sha256(body).hexdigest()}
        assert stack.services.artifacts.get_blob(response.json()["digest"]) == body


async def test_a_submitted_run_is_assigned_and_read_back(http: httpx.AsyncClient, stack: Stack) -> None:
    run_id = await _submit(http, params={"lr": 1}, submitted_by="ann", priority=7)

    async def is_assigned() -> bool:
        return stack.executor.runs.get(run_id) == 1

    await until(is_assigned)
    found = (await http.get(f"{RUNS}/{run_id}")).json()
    assert datetime.fromisoformat(found.pop("created_at")).tzinfo is not None
    steps = found.pop("steps")
    assert found == {
        "run_id": run_id, "pipeline": "demo", "state": "QUEUED", "error": None, "params": {"lr": 1.0},
        "submitted_by": "ann", "source": "", "priority": 7, "concurrency_key": None, "resumed_from": None,
        "stopping": None, "seq": 0, "started_at": None, "finished_at": None, "output": None, "attempts": [],
        "signals": [],
    }  # fmt: skip
    assert list(steps) == ["zeta", "alpha"]  # in the order of the definition
    assert steps["zeta"] == {
        "state": "PENDING", "attempt": 0, "failures": 0, "error": None, "output": None, "retry_at": None,
        "queued_at": None, "started_at": None, "finished_at": None, "reused_from": None, "items": None,
    }  # fmt: skip
    definition = (await http.get(f"{RUNS}/{run_id}/definition")).json()
    assert list(definition["steps"]) == ["zeta", "alpha"]
    assert definition["name"] == "demo"


async def test_the_same_key_gives_the_same_run(http: httpx.AsyncClient) -> None:
    key = unique("key")
    answers = await asyncio.gather(*(_submit(http, idempotency_key=key) for _ in range(5)))
    assert len(set(answers)) == 1
    response = await http.post(RUNS, json={"spec": _spec(), "params": {"lr": 0.5}, "idempotency_key": key})
    expect_error(response, 400, INVALID, "a different submission")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spec": {}}, "definition: name: required, but missing"),
        ({"spec": _spec(name="no spaces")}, "definition: name: not a valid name"),
        ({"spec": _spec(steps={})}, "definition: steps:"),
        ({"spec": _spec(surprise=1)}, "definition: surprise: unknown field"),
        ({"spec": _spec(steps={"a": {"uses": "os"}})}, "definition: steps.a.uses: expected module:function"),
        ({"spec": _spec(steps={"a": {"uses": "os:getcwd", "needs": ["b"]}})}, "steps.a.needs.0: unknown step 'b'"),
        (
            {"spec": _spec(steps={"a": {"uses": "os:getcwd", "with": {"x": "${{ params.lo }}"}}})},
            "steps.a.with.x: unknown parameter 'lo'",
        ),
        (
            {"spec": _spec(steps={one: {"uses": "os:getcwd", "needs": [other]} for one, other in ("ab", "ba")})},
            "wait for one another",
        ),
        ({"spec": _spec(steps={"a": {"uses": "no_such_module_here:f"}})}, "steps.a.uses: cannot import"),
        ({"spec": _spec(steps={"a": {"uses": "os:no_such_function"}})}, "steps.a.uses: module 'os' has no function"),
        ({"params": {"nobody": 1}}, "parameters.nobody: unknown"),
        ({"params": {"lr": "fast"}}, "parameters.lr: expected float"),
        ({"spec": "text"}, "expected an object with 'name' and 'steps'"),
        ({"params": []}, "`$.params`"),
        ({"idempotency_key": ""}, "`$.idempotency_key`"),
        ({"idempotency_key": "x" * 201}, "`$.idempotency_key`"),
        ({"idempotency_key": "a\x00"}, "may not contain NUL"),
        ({"submitted_by": 7}, "`$.submitted_by`"),
        ({"submitted_by": "a\x00"}, "may not contain NUL"),
        ({"priority": 101}, "`$.priority`"),
        ({"priority": 1.5}, "`$.priority`"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"params": {"lr": "a\x00"}}, "parameters.lr"),
        ({"spec": _spec(description="a\x00b")}, "description: may not contain NUL"),
        ({"spec": _spec(steps={"a": {"uses": "os:getcwd", "with": {"x": ["\x00"]}}})}, "steps.a.with.x.0: may not"),
        ({"spec": _spec(steps={"a": {"command": "echo", "env": {"variables": {"A": "\x00"}}}})}, "may not contain NUL"),
        ({"spec": _spec(steps={"a": {"uses": "os:getcwd", "with": {"x": {"k\x00": 1}}}})}, "may not contain NUL"),
        ({"spec": _spec(steps={"a": {}})}, "steps.a: needs exactly one of uses, command"),
        ({"spec": _spec(steps={"a": {"uses": "os:getcwd", "command": "ls"}})}, "it has uses and command"),
        ({"resumed_from": "a\x00"}, "NUL"),
    ],
)  # fmt: skip
async def test_a_malformed_pipeline_is_400_and_says_where(
    http: httpx.AsyncClient, fields: dict[str, Any], message: str
) -> None:
    body = {"spec": _spec(), "idempotency_key": unique("key")} | fields
    expect_error(await http.post(RUNS, json=body), 400, INVALID, message)


async def test_every_problem_of_a_pipeline_is_named(http: httpx.AsyncClient) -> None:
    steps = {"a": {"uses": "os"}, "b": {"uses": "os:getcwd", "retry": {"max_attempts": 0}}}
    response = await http.post(RUNS, json={"spec": _spec(steps=steps), "idempotency_key": unique("key")})
    assert response.status_code == 400
    lines = response.json()["message"].splitlines()
    assert [line.split(": ")[1] for line in lines] == ["steps.a.uses", "steps.b.retry.max_attempts"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"spec": {}}', b"\xff"])
async def test_a_body_that_is_no_submission_is_400(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post(RUNS, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()) == {"error_code", "message"}


async def test_runs_are_listed_newest_first_by_page(http: httpx.AsyncClient) -> None:
    ids = [await _submit(http) for _ in range(4)][::-1]

    async def listed(**query: int) -> list[str]:
        response = await http.get(RUNS, params=query)
        assert response.status_code == 200
        return [run["run_id"] for run in response.json()]

    assert (await listed())[:4] == ids
    assert await listed(limit=2) == ids[:2]
    assert await listed(limit=2, offset=1) == ids[1:3]
    [run] = (await http.get(RUNS, params={"limit": 1})).json()
    assert (run["pipeline"], run["state"]) == ("demo", "QUEUED")
    assert "steps" not in run


async def test_runs_are_listed_by_what_they_are(http: httpx.AsyncClient) -> None:
    name = unique("named").replace("_", "-")
    ids = [await _submit(http, spec=_spec(name=name), submitted_by=by) for by in ("ann", "bob")]

    async def listed(**query: str) -> list[str]:
        response = await http.get(RUNS, params={"pipeline": name} | query)
        assert response.status_code == 200
        return [run["run_id"] for run in response.json()]

    assert await listed() == ids[::-1]
    assert await listed(submitted_by="bob", state="QUEUED", source="") == [ids[1]]
    assert await listed(state="FAILED") == []
    expect_error(await http.get(f"{RUNS}?state=NEW"), 400, INVALID, "query.state")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "offset=-1", "offset="])
async def test_a_page_out_of_bounds_is_400(http: httpx.AsyncClient, query: str) -> None:
    expect_error(await http.get(f"{RUNS}?{query}"), 400, INVALID, f"query.{query.partition('=')[0]}")


async def test_an_unknown_run_is_404(http: httpx.AsyncClient) -> None:
    for path in ("nobody", "nobody/logs"):
        expect_error(await http.get(f"{RUNS}/{path}"), 404, MISSING, "No pipeline run with id=nobody exists")


async def _play(stack: Stack, run_id: str) -> None:
    """What an executor would have written: a step that failed once, and a fan-out half done."""
    writer = TransitionWriter(stack.engine, "executor")
    later = NOW + timedelta(seconds=1)
    await writer.write(
        transition(
            run_id,
            (await stack.services.pipelines.get_run(run_id)).epoch,
            [
                StepRun("zeta", WHOLE_STEP, State.SUCCEEDED, attempt=2, failures=1, started_at=NOW, finished_at=later,
                        output={"kind": "json", "value": {"acc": [0.5, None]}}),
                StepRun("alpha", WHOLE_STEP, State.RUNNING, items=2, started_at=later),
                StepRun("alpha", 0, State.SUCCEEDED, attempt=1, output={"kind": "json", "value": 1}),
                StepRun("alpha", 1, State.FAILED, attempt=1, failures=1, error="boom <b>"),
            ],
            [
                Attempt("zeta", WHOLE_STEP, 1, AttemptState.FAILED, NOW, NOW, NOW, "ValueError: no"),
                Attempt("zeta", WHOLE_STEP, 2, AttemptState.SUCCEEDED, NOW + timedelta(seconds=2), NOW, later,
                        node="node-1", progress={"done": 1.0, "text": "all"}),
                Attempt("alpha", 1, 1, AttemptState.FAILED, NOW + timedelta(seconds=3), NOW, later, "boom <b>"),
            ],
            change(run_id, State.RUNNING, started_at=NOW),
        )
    )  # fmt: skip
    await writer.close()


async def test_a_run_shows_its_steps_items_and_attempts(http: httpx.AsyncClient, stack: Stack) -> None:
    run_id = await _submit(http)
    await _play(stack, run_id)
    found = (await http.get(f"{RUNS}/{run_id}")).json()
    assert (found["state"], found["started_at"], found["seq"]) == ("RUNNING", "2025-01-02T03:04:05Z", 1)
    zeta, alpha = found["steps"]["zeta"], found["steps"]["alpha"]
    assert (zeta["state"], zeta["attempt"], zeta["failures"], zeta["output"]) == (
        "SUCCEEDED", 2, 1, {"acc": [0.5, None]},
    )  # fmt: skip
    assert [(item["state"], item["attempt"], item["error"], item["output"]) for item in alpha["items"]] == [
        ("SUCCEEDED", 1, None, 1), ("FAILED", 1, "boom <b>", None),
    ]  # fmt: skip
    assert alpha["output"] is None
    assert [(entry["step"], entry["item"], entry["attempt"], entry["state"]) for entry in found["attempts"]] == [
        ("zeta", None, 1, "FAILED"), ("zeta", None, 2, "SUCCEEDED"), ("alpha", 1, 1, "FAILED"),
    ]  # fmt: skip
    assert (found["attempts"][1]["node"], found["attempts"][1]["progress"]) == ("node-1", {"done": 1.0, "text": "all"})


async def test_a_run_is_cancelled_and_says_by_whom(http: httpx.AsyncClient, stack: Stack) -> None:
    run_id = await _submit(http)
    response = await http.post(f"{RUNS}/{run_id}/cancel", json={"by": "ann", "comment": "enough"})
    assert (response.status_code, response.json()["run_id"]) == (200, run_id)
    [signal] = (await http.get(f"{RUNS}/{run_id}")).json()["signals"]
    assert (signal["kind"], signal["step"], signal["by"], signal["comment"]) == ("cancel", "", "ann", "enough")
    [heard] = [signal for signal in await stack.services.pipelines.find_signals("executor") if signal.run_id == run_id]
    assert heard.by == "ann"


async def test_an_approval_is_decided_over_http(http: httpx.AsyncClient, stack: Stack) -> None:
    run_id = await _submit(http, spec=_spec(steps={"ask": {"approval": {"approvers": ["ann"]}}}))
    path = f"{RUNS}/{run_id}/steps"
    expect_error(await http.post(f"{path}/ask/approve", json={"by": "ann"}), 400, INVALID, "'ask' is PENDING")
    writer = TransitionWriter(stack.engine, "executor")
    await writer.write(transition(run_id, 1, [StepRun("ask", WHOLE_STEP, State.QUEUED)]))
    await writer.close()
    expect_error(await http.post(f"{path}/ask/reject", json={"by": "eve"}), 403, "PERMISSION_DENIED", "'eve' may not")
    expect_error(await http.post(f"{path}/nobody/approve", json={"by": "ann"}), 404, MISSING, "no step 'nobody'")
    assert (await http.post(f"{path}/ask/approve", json={"by": "ann"})).status_code == 200
    [signal] = (await http.get(f"{RUNS}/{run_id}")).json()["signals"]
    assert (signal["kind"], signal["step"]) == ("approve", "ask")


@pytest.mark.parametrize("path", ["cancel", "steps/zeta/approve", "steps/zeta/reject"])
@pytest.mark.parametrize(
    "body", [{"by": "a\x00"}, {"comment": "\x00"}, {"by": 7}, {"by": "x" * 201}, {"comment": "x" * 2_001}, []]
)
async def test_what_people_say_is_checked(http: httpx.AsyncClient, path: str, body: Any) -> None:
    run_id = await _submit(http)
    response = await http.post(f"{RUNS}/{run_id}/{path}", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error_code"] == INVALID
    assert (await http.get(f"{RUNS}/{run_id}")).json()["signals"] == []


@pytest.mark.parametrize(
    "path", ["%00", "%00/logs", "x%00/definition", "?pipeline=%00", "?submitted_by=a%00", "?source=%00"]
)
async def test_a_nul_in_an_address_finds_nothing_or_is_refused(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(f"{RUNS}{path if path.startswith('?') else '/' + path}")
    assert response.status_code in {400, 404}, response.text


async def test_a_run_goes_on_from_one_that_is_over(http: httpx.AsyncClient, stack: Stack) -> None:
    run_id = await _submit(http)
    again = {"spec": _spec(), "idempotency_key": unique("key"), "resumed_from": run_id}
    expect_error(await http.post(RUNS, json=again), 400, INVALID, f"run {run_id} is QUEUED")
    writer = TransitionWriter(stack.engine, "executor")
    await writer.write(transition(run_id, 1, run=change(run_id, State.FAILED, error="no")))
    await writer.close()
    expect_error(await http.post(RUNS, json=again | {"from_step": "x"}), 400, INVALID, "no step 'x'")
    other = again | {"spec": _spec(name="other")}
    expect_error(await http.post(RUNS, json=other), 400, INVALID, "is one of 'demo', not of 'other'")
    missing = again | {"resumed_from": "nobody"}
    expect_error(await http.post(RUNS, json=missing), 404, MISSING, "No pipeline run with id=nobody exists")
    new_id = (await http.post(RUNS, json=again | {"from_step": "alpha"})).json()["run_id"]
    assert (await http.get(f"{RUNS}/{new_id}")).json()["resumed_from"] == run_id


async def test_logs_have_a_heading_for_each_attempt(http: httpx.AsyncClient, stack: Stack) -> None:
    run_id = await _submit(http)
    await _play(stack, run_id)
    artifacts = stack.services.artifacts
    artifacts.write(f"{log_folder(run_id, 'zeta', WHOLE_STEP, 2)}/000000.log", ["first ä\nsec".encode()])
    artifacts.write(f"{log_folder(run_id, 'zeta', WHOLE_STEP, 2)}/000001.log", [b"ond \xff no newline"])
    artifacts.write(f"{log_folder(run_id, 'alpha', 1, 1)}/000000.log", [b"from the item\n"])
    response = await http.get(f"{RUNS}/{run_id}/logs")
    assert response.headers["content-type"].startswith("text/plain")
    zeta = "── zeta · attempt 1 · FAILED\n── zeta · attempt 2 · SUCCEEDED\nfirst ä\nsecond \ufffd no newline\n"
    alpha = "── alpha[1] · attempt 1 · FAILED\nfrom the item\n"
    assert response.text == alpha + zeta  # in the order in which they ended
    assert (await http.get(f"{RUNS}/{run_id}/logs?step=alpha")).text == alpha
    expect_error(await http.get(f"{RUNS}/{run_id}/logs?step=beta"), 404, MISSING, "no step 'beta'")


async def test_the_status_has_a_row_for_each_actor(http: httpx.AsyncClient, stack: Stack) -> None:
    row = {"actor": "metric-shard-0", "node": "127.0.0.1", "pid": 7, "restarts": 1, "health": "ok", "lag": "0"}
    gone = {"actor": "gateway", "node": "-", "pid": None, "restarts": 0, "health": "missing", "lag": "-"}
    stack.actors.rows[:] = [row, gone]
    try:
        assert (await http.get("/api/v1/status")).json() == [row, gone]
    finally:
        stack.actors.rows.clear()
