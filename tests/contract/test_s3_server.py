"""The S3 server of the tests is a real one: what other tests rely on, and that it keeps what it acknowledged."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from mlplat.artifacts.store import ArtifactStore
from tests.contract.buckets import Bucket
from tests.platform import eventually
from tests.s3 import S3Server

PART_BYTES = 5 * 1024 * 1024
WRITERS = 8


@pytest.fixture
def bucket(s3_server: S3Server) -> Bucket:
    return Bucket(s3_server)


@pytest.mark.parametrize("key", ["a", "deep/er/ü n/🧪.bin", "a b%41+c", "x//y", "q?uo'te\"&<>"])
def test_what_was_put_is_got(bucket: Bucket, key: str) -> None:
    bucket.put(key, b"0123456789")
    assert bucket.get(key) == b"0123456789"
    assert (bucket.get(key, Range="bytes=3-5"), bucket.get(key, Range="bytes=-2")) == (b"345", b"89")
    assert bucket.keys() == [key]
    head = bucket.client.head_object(Bucket=bucket.name, Key=key)
    assert head["ETag"] == f'"{hashlib.md5(b"0123456789").hexdigest()}"'
    bucket.client.delete_object(Bucket=bucket.name, Key=key)
    assert bucket.keys() == []
    with pytest.raises(ClientError, match="NoSuchKey"):
        bucket.get(key)


def test_a_listing_has_all_pages(bucket: Bucket) -> None:
    keys = [f"{letter}/{number:03}" for letter in "ab" for number in range(60)]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda key: bucket.put(key, b""), keys))
    pages = bucket.client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket.name, PaginationConfig={"PageSize": 50}
    )
    assert [[entry["Key"] for entry in page["Contents"]] for page in pages] == [keys[:50], keys[50:100], keys[100:]]
    assert bucket.keys("b/") == keys[60:]
    folders = bucket.client.list_objects_v2(Bucket=bucket.name, Delimiter="/")["CommonPrefixes"]
    assert [folder["Prefix"] for folder in folders] == ["a/", "b/"]


def test_an_upload_in_parts_appears_when_it_is_complete(bucket: Bucket) -> None:
    where, bodies = {"Bucket": bucket.name, "Key": "parts"}, [os.urandom(PART_BYTES), b"the end"]
    completion = bucket.put_parts("parts", bodies)
    assert bucket.keys() == []
    bucket.client.complete_multipart_upload(**completion)
    assert bucket.get("parts") == b"".join(bodies)
    assert bucket.client.head_object(**where)["ETag"].endswith('-2"')
    upload = where | {"UploadId": bucket.client.create_multipart_upload(**where)["UploadId"]}
    bucket.client.abort_multipart_upload(**upload)
    with pytest.raises(ClientError, match="NoSuchUpload"):
        bucket.client.upload_part(**upload, PartNumber=1, Body=b"late")


def test_presigned_urls_open_what_they_name(bucket: Bucket) -> None:
    with httpx.Client(trust_env=False, timeout=30) as anybody:
        assert anybody.put(bucket.url("put_object", "k"), content=b"by URL").status_code == 200
        opened = anybody.get(bucket.url("get_object", "k"))
        assert (opened.status_code, opened.content) == (200, b"by URL")
        tampered = bucket.url("get_object", "k").replace("/k?", "/other?")
        assert anybody.get(tampered).status_code == 403
        assert anybody.get(bucket.url("get_object", "k").partition("?")[0]).status_code == 403


def test_a_wrong_secret_is_refused(s3_server: S3Server, bucket: Bucket) -> None:
    stranger = s3_server.client(secret_key="wrong")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        stranger.put_object(Bucket=bucket.name, Key="k", Body=b"x")
    assert bucket.keys() == []


def test_of_writers_who_want_to_be_the_first_one_is(bucket: Bucket) -> None:
    def write(key: str, number: int, together: threading.Barrier) -> int | None:
        together.wait(30)
        try:
            bucket.put(key, b"%d" % number * 1000, IfNoneMatch="*")
        except ClientError as error:
            if error.response["Error"]["Code"] != "PreconditionFailed":
                raise
            return None
        return number

    with ThreadPoolExecutor(WRITERS) as pool:
        for key in ("first", "second", "third"):
            together = threading.Barrier(WRITERS)
            written = list(pool.map(write, [key] * WRITERS, range(WRITERS), [together] * WRITERS))
            (winner,) = [number for number in written if number is not None]
            assert bucket.get(key) == b"%d" % winner * 1000


def _write(bucket: Bucket, writer: int, acknowledged: dict[str, bytes]) -> None:
    """Writes objects until that fails."""
    number = 0
    with suppress(ClientError, BotoCoreError):
        while True:
            key, body = f"{writer}/{number}", os.urandom(20_000)
            bucket.put(key, body)
            acknowledged[key] = body
            number += 1


@pytest.mark.parametrize(
    ("end", "left"),
    [(S3Server.kill_gateway, {"ceph-mon", "ceph-osd"}), (S3Server.kill, set()), (S3Server.stop, set())],
    ids=["gateway-killed", "all-killed", "stopped"],
)
def test_what_was_acknowledged_is_there_after_it_ended(
    s3_server: S3Server, bucket: Bucket, end: Callable[[S3Server], None], left: set[str]
) -> None:
    acknowledged: dict[str, bytes] = {}
    try:
        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(_write, bucket, writer, acknowledged) for writer in range(4)]
            eventually(lambda: len(acknowledged) > 40, what="objects are written")
            end(s3_server)
            for writer in writers:
                writer.result(60)
        assert {process.name() for process in s3_server.processes} == left
        with pytest.raises(BotoCoreError, match="Could not connect"):
            bucket.get("0/0")
    finally:
        s3_server.start_gateway()
    assert {key: bucket.get(key) for key in acknowledged} == acknowledged
    assert set(acknowledged) <= set(bucket.keys())


def test_it_listens_on_this_machine_alone(s3_server: S3Server) -> None:
    sockets = [
        connection
        for process in s3_server.processes
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    ]
    assert s3_server.port in {connection.laddr.port for connection in sockets}
    assert {connection.laddr.ip for connection in sockets} == {"127.0.0.1"}


def test_its_environment_leads_the_artifact_store_there(s3_server: S3Server, s3_url: str) -> None:
    store, body = ArtifactStore(f"{s3_url}/root"), os.urandom(5_000_000)
    store.write("run/large", [body])
    store.write("run/small", [b"small"])
    assert b"".join(store.read("run/large")) == body
    assert [(entry.path, entry.size) for entry in store.list("run")] == [("large", len(body)), ("small", 5)]
    listed = s3_server.client().list_objects_v2(Bucket=s3_url.removeprefix("s3://"))["Contents"]
    files = [entry["Key"] for entry in listed if "/.blobs/" not in entry["Key"]]
    assert files == ["root/run/large", "root/run/small"]
    assert len(listed) > len(files)
