"""The HTTP client: what it sends, what it tries again, and what it raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import httpx
import pytest

from mlplat import errors
from mlplat.errors import Overloaded, PlatformError, Unavailable
from mlplat.sdk import context
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.client import Client, client_for, default_url
from mlplat.sdk.context import StepContext, current_step, enter_step

URL = "http://platform.test:8700"
#: A step's checkpoints and progress, where nobody asks for them.
NOTHING = (cast("Checkpoints", None), print)
Answer = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class Platform:
    """Answers requests from a list, the last answer again and again."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.bodies: list[bytes] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.bodies.append(request.read())
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(request)

    def client(self, retry_for_s: float = 10.0) -> Client:
        client = Client(URL + "/", retry_for_s=retry_for_s)
        client._http = httpx.Client(base_url=URL, transport=httpx.MockTransport(self.handle))
        return client


def refused(status: int, code: str, message: str = "no") -> httpx.Response:
    return httpx.Response(status, json={"error_code": code, "message": message})


def ok(**body: Any) -> httpx.Response:
    return httpx.Response(200, json=body)


def test_get_sends_the_query_without_what_is_none() -> None:
    platform = Platform(ok(n=1))
    assert platform.client().get("/api/x", limit=3, step=None, name="a b&c") == {"n": 1}
    assert str(platform.requests[0].url) == f"{URL}/api/x?limit=3&name=a+b%26c"
    assert platform.requests[0].method == "GET"


def test_post_sends_json_and_no_key_unless_told() -> None:
    platform = Platform(ok())
    platform.client().post("/api/x", {"a": [1, None]})
    assert platform.bodies == [b'{"a":[1,null]}']
    assert platform.requests[0].headers["content-type"] == "application/json"
    assert "idempotency-key" not in platform.requests[0].headers


def test_every_repetition_carries_the_same_idempotency_key_and_body() -> None:
    platform = Platform(httpx.ConnectError("refused"), refused(503, "TEMPORARILY_UNAVAILABLE"), ok(id=1))
    assert platform.client().post("/api/x", {"a": 1}, idempotency_key="key-1") == {"id": 1}
    assert [request.headers["idempotency-key"] for request in platform.requests] == ["key-1"] * 3
    assert platform.bodies == [b'{"a":1}'] * 3


def test_bytes_are_sent_with_their_type() -> None:
    platform = Platform(ok(digest="d"))
    assert platform.client().post_bytes("/api/blobs", b"\x00\xff", "application/octet-stream") == {"digest": "d"}
    assert platform.bodies == [b"\x00\xff"]
    assert platform.requests[0].headers["content-type"] == "application/octet-stream"


def test_text_is_the_body() -> None:
    platform = Platform(httpx.Response(200, text="line\nü"))
    assert platform.client().text("/logs", step=None) == "line\nü"
    assert str(platform.requests[0].url) == f"{URL}/logs"


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
        httpx.ReadError("reset"),
        refused(503, "TEMPORARILY_UNAVAILABLE"),
        refused(429, "RESOURCE_EXHAUSTED"),
        httpx.Response(502),
        httpx.Response(504, text="gateway"),
        httpx.Response(408),
        httpx.Response(500, text="no replica"),
    ],
)
def test_passing_trouble_is_tried_again(trouble: Answer) -> None:
    platform = Platform(trouble, ok(n=1))
    assert platform.client().get("/x") == {"n": 1}
    assert len(platform.requests) == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refused(400, "INVALID_PARAMETER_VALUE"), errors.InvalidInput),
        (refused(400, "BAD_REQUEST"), errors.InvalidInput),
        (refused(400, "RESOURCE_ALREADY_EXISTS"), errors.AlreadyExists),
        (refused(404, "RESOURCE_DOES_NOT_EXIST"), errors.NotFound),
        (refused(403, "PERMISSION_DENIED"), errors.PermissionDenied),
        (refused(413, "BAD_REQUEST"), errors.InvalidInput),
        (refused(500, "INTERNAL_ERROR"), errors.PlatformError),
        (refused(418, "SOMETHING_NEW"), errors.PlatformError),
    ],
)
def test_a_refusal_is_raised_at_once_as_its_error(answer: httpx.Response, error: type[PlatformError]) -> None:
    platform = Platform(answer)
    with pytest.raises(PlatformError) as caught:
        platform.client().get("/x")
    assert type(caught.value) is error
    assert caught.value.message == "no"
    assert len(platform.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404, text="<html>"),
        httpx.Response(404),
        httpx.Response(404, json=[]),
        httpx.Response(404, json="text"),
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(404, json={"error_code": ["x"], "message": "m"}),
        httpx.Response(302, headers={"location": "/y"}),
    ],
)
def test_an_answer_of_somebody_else_names_the_request(answer: httpx.Response) -> None:
    platform = Platform(answer)
    with pytest.raises(Unavailable, match=rf"GET http://platform\.test:8700/x: HTTP {answer.status_code}"):
        platform.client().get("/x")
    assert len(platform.requests) == 1


def test_giving_up_says_what_to_check() -> None:
    platform = Platform(httpx.ConnectError("Connection refused"))
    with pytest.raises(Unavailable) as caught:
        platform.client(retry_for_s=0).get("/x")
    assert caught.value.message == (
        f"no answer from {URL}: Connection refused. Is the platform up (mlplat status)? MLPLAT_URL names another one."
    )
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (refused(503, "TEMPORARILY_UNAVAILABLE", "restarting"), Unavailable, "restarting"),
        (refused(429, "RESOURCE_EXHAUSTED", "full"), Overloaded, "full"),
        (httpx.Response(502), Unavailable, f"GET {URL}/x: HTTP 502"),
    ],
)
def test_giving_up_on_an_answer_raises_its_error(answer: Answer, error: type[PlatformError], message: str) -> None:
    with pytest.raises(PlatformError) as caught:
        Platform(answer).client(retry_for_s=0).get("/x")
    assert type(caught.value) is error
    assert caught.value.message == message


def test_retries_end_after_their_time() -> None:
    platform = Platform(httpx.ConnectError("refused"))
    with pytest.raises(Unavailable):
        platform.client(retry_for_s=0.2).get("/x")
    assert len(platform.requests) > 1


def test_an_error_of_the_program_is_not_tried_again() -> None:
    platform = Platform(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        platform.client().get("/x")
    assert len(platform.requests) == 1


@pytest.fixture
def step() -> Iterator[StepContext]:
    """A step attempt under way."""
    entered = StepContext("p", "run1", "train", None, 2, 3, "http://step.test", *NOTHING)
    before = context._current.get()
    enter_step(entered)
    yield entered
    context._current.set(before)


def test_outside_of_a_step_the_environment_says_where_the_platform_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_URL", "http://env.test/")
    assert current_step() is None
    assert default_url() == "http://env.test"
    assert Client().url == "http://env.test"


def test_inside_of_a_step_the_step_does(step: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_URL", "http://env.test/")
    assert current_step() == step
    assert default_url() == "http://step.test"
    assert Client("http://given.test/").url == "http://given.test"


def test_an_attempt_has_the_same_label_everywhere() -> None:
    assert StepContext("p", "r", "s", None, 2, 3, "", *NOTHING).label == "r/s/-1/2"
    assert StepContext("p", "r", "s", 0, 1, 3, "", *NOTHING).label == "r/s/0/1"


def test_a_platform_has_one_client_per_process() -> None:
    assert client_for("http://one.test") is client_for("http://one.test")
    assert client_for("http://one.test") is not client_for("http://two.test")
