"""The filesystem of artifacts: its paths, its errors, and what it makes of a server's answers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from mlplat import errors
from mlplat.sdk import artifact_bytes
from mlplat.sdk.artifact_bytes import Part, as_os_errors, fetch
from mlplat.sdk.client import Client
from mlplat.sdk.filesystem import ArtifactFileSystem

URL = "http://platform.test:8700"
BODY = b"0123456789"


def client(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    """A client of a server that answers like this."""
    found = Client(URL, retry_for_s=0)
    found._http = httpx.Client(base_url=URL, transport=httpx.MockTransport(answer))
    return found


def ranged(request: httpx.Request, body: bytes = BODY, **headers: str) -> httpx.Response:
    """What a server says that knows ranges."""
    first, last = (int(number) for number in request.headers["range"].removeprefix("bytes=").split("-"))
    if first >= len(body):
        return httpx.Response(416, headers={"Content-Range": f"bytes */{len(body)}", **headers})
    part = body[first : last + 1]
    about = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(body)}", **headers}
    return httpx.Response(206, content=part, headers=about)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("mlplat://run/a/b", "run/a/b"),
        ("mlplat://run/a/b/", "run/a/b"),
        ("run//a/./b", "run/a/b"),
        ("mlplat:///run", "run"),
        ("mlplat://", ""),
        ("mlplat://run/why?x=1#y%20", "run/why?x=1#y%20"),
        ("run/../x", "run/../x"),
    ],
)
def test_a_path_in_normal_form(given: str, path: str) -> None:
    assert ArtifactFileSystem._strip_protocol(given) == path


def test_instances_of_one_platform_are_equal() -> None:
    first, other = ArtifactFileSystem(url=f"{URL}/"), ArtifactFileSystem(url="http://other.test")
    assert first == pickle.loads(pickle.dumps(first)) == ArtifactFileSystem(url=URL, retry_for_s=1)
    assert first != other
    assert first.fsid != other.fsid
    assert first.unstrip_protocol("run/a") == "mlplat://run/a"


def test_ranges_are_fetched_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_bytes, "PIECE_BYTES", 3)
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["range"])
        assert request.url.raw_path.endswith(b"/a%20b%3F")
        return ranged(request, ETag='"v1"')

    assert fetch(client(answer), "a b?", 0, None) == Part(BODY, 10, '"v1"')
    assert asked == ["bytes=0-2", "bytes=3-5", "bytes=6-8", "bytes=9-11"]
    assert fetch(client(answer), "a b?", 2, 6) == Part(b"2345", 10, '"v1"')
    assert fetch(client(answer), "a b?", 12, None) == Part(b"", 10, '"v1"')


def test_a_server_without_ranges_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_bytes, "PIECE_BYTES", 3)
    whole = client(lambda _request: httpx.Response(200, content=BODY))
    assert fetch(whole, "f", 0, None) == Part(BODY, 10, None)
    assert fetch(whole, "f", 2, 4) == Part(b"23", 10, None)
    assert fetch(whole, "f", 12, 14) == Part(b"", 10, None)


@pytest.mark.parametrize("second", [{"body": BODY, "ETag": '"v2"'}, {"body": BODY + b"more", "ETag": '"v1"'}])
def test_pieces_of_two_versions_are_not_joined(monkeypatch: pytest.MonkeyPatch, second: dict[str, Any]) -> None:
    monkeypatch.setattr(artifact_bytes, "PIECE_BYTES", 6)
    versions: list[dict[str, Any]] = [{"ETag": '"v1"'}, second]
    changing = client(lambda request: ranged(request, **versions.pop(0)))
    with pytest.raises(OSError, match="replaced while it was read"):
        fetch(changing, "f", 0, None)


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (errors.NotFound, FileNotFoundError),
        (errors.PermissionDenied, PermissionError),
        (errors.AlreadyExists, FileExistsError),
        (errors.InvalidInput, ValueError),
        (errors.Unavailable, errors.Unavailable),
    ],
)
def test_errors_are_pythons_own(said: type[errors.PlatformError], raised: type[Exception]) -> None:
    with pytest.raises(raised) as caught, as_os_errors("run/a"):
        raise said("no")
    assert type(caught.value) is raised
    if isinstance(caught.value, OSError):
        assert caught.value.filename == "run/a"


def test_an_etag_is_the_key_of_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/runs/get"):
            return httpx.Response(200, json={"run": {"info": {"artifact_uri": "mlflow-artifacts:/0/run/artifacts"}}})
        assert request.url.path.endswith("/0/run/artifacts/f")
        return ranged(request, ETag='"v1"')

    found = client(answer)
    monkeypatch.setattr("mlplat.sdk.artifact_tree._client_of", lambda *_key: found)
    files = ArtifactFileSystem(url=URL)
    assert files.info("run/f") == {"name": "run/f", "size": 10, "type": "file", "ETag": '"v1"'}
    assert files.ukey("run/f") == '"v1"'


def test_artifacts_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"run": {"info": {"artifact_uri": "s3://bucket/run"}}}
    found = client(lambda _request: httpx.Response(200, json=answer))
    monkeypatch.setattr("mlplat.sdk.artifact_tree._client_of", lambda *_key: found)
    with pytest.raises(ValueError, match="s3://bucket/run, which this platform does not serve"):
        ArtifactFileSystem(url=URL).ls("run")
