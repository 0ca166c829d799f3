"""The proxy before the tests' S3 server: each fault fires and shows, and a client that tries again gets through."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, ReadTimeoutError

from mlplat.artifacts.store import ArtifactStore
from tests.contract.buckets import Bucket
from tests.faults.s3_faults import Fault, S3Faults
from tests.platform import eventually
from tests.s3 import S3Server

ATTEMPTS = 4
BODY = os.urandom(300_000)
#: A wait that no test outlives, unless it is ended.
FOR_EVER_S = 3_600
Strike = Callable[[S3Faults], Fault]


@pytest.fixture
def fragile(s3_server: S3Server, s3_faults: S3Faults) -> Bucket:
    """A bucket behind the proxy, whose client tries once."""
    return Bucket(s3_server, s3_server.client(s3_faults.url))


@pytest.fixture
def patient(s3_server: S3Server, s3_faults: S3Faults) -> Bucket:
    """A bucket behind the proxy, whose client tries again, soon."""
    return Bucket(s3_server, s3_server.client(s3_faults.url, attempts=ATTEMPTS, timeout_s=2))


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def _seen(caught: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    """Status and code of an error."""
    response: Any = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def test_without_faults_everything_passes_as_it_is(fragile: Bucket, s3_server: S3Server, s3_faults: S3Faults) -> None:
    fragile.put("a b%41+ü/🧪", BODY, ContentType="application/x-thing")
    fragile.put("empty", b"")
    assert (fragile.get("a b%41+ü/🧪"), fragile.get("empty")) == (BODY, b"")
    assert fragile.get("a b%41+ü/🧪", Range="bytes=1000-2000") == BODY[1000:2001]
    completion = fragile.put_parts("large", [BODY * 20, BODY])
    fragile.client.complete_multipart_upload(**completion)
    assert fragile.get("large") == BODY * 21
    head = fragile.client.head_object(Bucket=fragile.name, Key="a b%41+ü/🧪")
    assert (head["ContentLength"], head["ContentType"]) == (len(BODY), "application/x-thing")
    assert fragile.keys() == ["a b%41+ü/🧪", "empty", "large"]
    with httpx.Client(trust_env=False, timeout=30) as anybody:
        chunked = anybody.put(fragile.url("put_object", "k"), content=iter([BODY]))
        assert (chunked.status_code, "MissingContentLength" in chunked.text) == (411, True)
        assert anybody.put(fragile.url("put_object", "k"), content=BODY).status_code == 200
        assert anybody.get(fragile.url("get_object", "k")).content == BODY
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        s3_server.client(s3_faults.url, secret_key="wrong").put_object(Bucket=fragile.name, Key="k", Body=BODY)
    with pytest.raises(ClientError, match="NoSuchKey"):
        fragile.get("missing")


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
@pytest.mark.parametrize("done", [False, True])
def test_an_error_shows_and_says_nothing_about_what_was_done(
    fragile: Bucket, s3_faults: S3Faults, status: int, code: str, done: bool
) -> None:
    fault = s3_faults.answer("^PUT .*/k$", status, done=done)
    with pytest.raises(ClientError) as caught:
        fragile.put("k", BODY)
    assert _seen(caught) == (status, code)
    assert fault.fired == 1
    assert fragile.keys() == (["k"] if done else [])


def test_a_broken_request_leaves_nothing(fragile: Bucket, s3_faults: S3Faults) -> None:
    fault = s3_faults.break_request("^PUT .*/k$")
    with pytest.raises(HTTPClientError):
        fragile.put("k", BODY)
    assert (fault.fired, fragile.keys()) == (1, [])


def test_a_broken_answer_to_a_write_hides_that_it_was_done(fragile: Bucket, s3_faults: S3Faults) -> None:
    fault = s3_faults.break_answer("^PUT .*/k$")
    with pytest.raises(HTTPClientError):
        fragile.put("k", BODY)
    assert (fault.fired, fragile.get("k")) == (1, BODY)


def test_a_broken_answer_to_a_read_shows_while_it_is_read(fragile: Bucket, s3_faults: S3Faults) -> None:
    fragile.put("k", BODY)
    fault = s3_faults.break_answer("^GET .*/k$")
    body = fragile.client.get_object(Bucket=fragile.name, Key="k")["Body"]
    with pytest.raises(BotoCoreError):
        body.read()
    assert (fault.fired, fragile.get("k")) == (1, BODY)


@pytest.mark.parametrize("done", [False, True])
def test_a_success_may_be_an_error_when_parts_are_put_together(
    fragile: Bucket, s3_faults: S3Faults, done: bool
) -> None:
    fault = s3_faults.fail_completion(done=done)
    completion = fragile.put_parts("k", [BODY])
    with httpx.Client(trust_env=False, timeout=30) as plain:
        params = {name: completion[name] for name in ("Bucket", "Key", "UploadId")}
        url = fragile.client.generate_presigned_url("complete_multipart_upload", Params=params)
        etag = completion["MultipartUpload"]["Parts"][0]["ETag"]
        parts = f"<Part><PartNumber>1</PartNumber><ETag>{etag}</ETag></Part>"
        answer = plain.post(url, content=f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>")
    assert (answer.status_code, "<Code>InternalError</Code>" in answer.text) == (200, True)
    assert (fault.fired, fragile.keys()) == (1, ["k"] if done else [])


def test_a_swallowed_request_is_given_up_by_its_client(s3_server: S3Server, s3_faults: S3Faults) -> None:
    hasty = Bucket(s3_server, s3_server.client(s3_faults.url, timeout_s=0.3))
    for done in (False, True):
        fault = s3_faults.swallow("^PUT .*/k$", done=done)
        with pytest.raises(ReadTimeoutError):
            hasty.put("k", b"x")
        assert (fault.fired, hasty.keys()) == (1, ["k"] if done else [])


@pytest.mark.parametrize(
    "strike",
    [
        lambda faults: faults.answer("^PUT", 500),
        lambda faults: faults.answer("^PUT", 503),
        lambda faults: faults.answer("^PUT", 503, done=True),
        lambda faults: faults.break_request("^PUT"),
        lambda faults: faults.break_answer("^PUT"),
        lambda faults: faults.swallow("^PUT"),
        lambda faults: faults.fail_completion(),
    ],
    ids=["500", "503", "503-done", "broken-request", "broken-answer", "swallowed", "200"],
)
def test_a_client_that_tries_again_gets_through(patient: Bucket, s3_faults: S3Faults, strike: Strike) -> None:
    fault = strike(s3_faults)
    patient.client.complete_multipart_upload(**patient.put_parts("parts", [BODY]))
    patient.put("k", BODY)
    assert fault.fired == 1
    assert (patient.get("k"), patient.get("parts")) == (BODY, BODY)


@pytest.mark.parametrize(
    "strike",
    [lambda faults: faults.delay("^PUT", FOR_EVER_S), lambda faults: faults.slow_down("^PUT", 1_000)],
    ids=["delayed", "slow"],
)
def test_what_is_slow_goes_on_when_it_is_healed(
    fragile: Bucket, s3_faults: S3Faults, thread: ThreadPoolExecutor, strike: Strike
) -> None:
    fault = strike(s3_faults)
    writing: Future[None] = thread.submit(fragile.put, "k", BODY)
    eventually(lambda: fault.fired == 1, what="the fault fires")
    assert not writing.done()
    assert fragile.keys() == []
    s3_faults.heal()
    writing.result(30)
    assert fragile.get("k") == BODY


def test_a_slow_answer_arrives_in_pieces(fragile: Bucket, s3_faults: S3Faults) -> None:
    fragile.put("k", BODY)
    fault = s3_faults.slow_down("^GET .*/k$", 10_000)
    body = fragile.client.get_object(Bucket=fragile.name, Key="k")["Body"]
    start = body.read(1_500)
    assert fault.fired == 1
    s3_faults.heal()
    assert start + body.read() == BODY


def test_a_fault_strikes_what_it_names_so_often_and_no_more(fragile: Bucket, s3_faults: S3Faults) -> None:
    put_twice = s3_faults.answer(r"^PUT /[^/]+/hit/a b$", 503, times=2)
    list_always = s3_faults.answer(r"^GET .*[?&]prefix=hit/", 500, times=None)
    fragile.put("hit/other", b"x")
    for _ in range(2):
        with pytest.raises(ClientError):
            fragile.put("hit/a b", b"x")
    fragile.put("hit/a b", b"x")
    assert fragile.get("hit/a b") == b"x"
    for _ in range(3):
        with pytest.raises(ClientError):
            fragile.keys("hit/")
    assert fragile.keys() == ["hit/a b", "hit/other"]
    assert (put_twice.fired, list_always.fired) == (2, 3)
    s3_faults.heal()
    assert fragile.keys("hit/") == ["hit/a b", "hit/other"]


def test_a_server_that_is_down_is_down_behind_the_proxy(fragile: Bucket, s3_server: S3Server) -> None:
    fragile.put("k", BODY)
    try:
        s3_server.kill_gateway()
        with pytest.raises(HTTPClientError):
            fragile.get("k")
    finally:
        s3_server.start_gateway()
    assert fragile.get("k") == BODY


def test_the_artifact_store_tries_again(s3_url: str, s3_faults: S3Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_faults.url)
    store = ArtifactStore(s3_url)
    faults = [
        s3_faults.answer("^PUT .*/k$", 503, times=2),
        s3_faults.answer("^HEAD .*/k$", 503),
        s3_faults.answer("^GET .*/k$", 500),
    ]
    store.write("k", [BODY])
    assert b"".join(store.read("k")) == BODY
    assert [fault.fired for fault in faults] == [2, 1, 1]
