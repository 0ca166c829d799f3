"""The HTTP client of the platform: JSON calls with retries, and errors as exceptions."""

from __future__ import annotations

import uuid
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from mlplat import errors
from mlplat.artifacts.blobs import Blobs
from mlplat.artifacts.digests import content_digest
from mlplat.artifacts.model import proxied_path
from mlplat.errors import PlatformError, Unavailable
from mlplat.sdk.context import current_step
from mlplat.sdk.near import open_near
from mlplat.settings import Settings

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0
RETRY_FOR_S = 60.0
#: A store that takes in less than this counts as one that hangs.
STORED_BYTES_PER_S = 8 * 1024 * 1024
_RETRIED_STATUS = {408, 429, 502, 503, 504}

_BY_CODE: dict[str, type[PlatformError]] = {
    "INVALID_PARAMETER_VALUE": errors.InvalidInput,
    "BAD_REQUEST": errors.InvalidInput,
    "RESOURCE_ALREADY_EXISTS": errors.AlreadyExists,
    "RESOURCE_CONFLICT": errors.Conflict,
    "INVALID_STATE": errors.Corrupted,
    "RESOURCE_DOES_NOT_EXIST": errors.NotFound,
    "ENDPOINT_NOT_FOUND": errors.NotFound,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "TEMPORARILY_UNAVAILABLE": errors.Unavailable,
}


class Chunking(NamedTuple):
    """The average size of chunks in bytes, whether they may go straight to the bucket and come from there, and the
    folder that they are in with the text by which to know it."""

    average: int
    direct: bool
    folder: tuple[str, str] | None


class _TryAgain(Exception):
    """An answer or a failure after which the same request may succeed."""


class Client:
    """Talks to one platform. Thread-safe.

    Every request is retried for ``retry_for_s`` seconds while the platform is out of reach, so callers
    must send requests that may arrive twice (an idempotency key, a digest, or a plain write).
    """

    def __init__(
        self, url: str | None = None, retry_for_s: float = RETRY_FOR_S, timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self.url = (url or default_url()).rstrip("/")
        self._retry_for_s = retry_for_s
        self._timeout_s = timeout_s
        self._chunking: Chunking | None = None
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        # trust_env: a proxy of the environment has no business with the platform's own address.
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def get(self, path: str, /, **query: Any) -> Any:
        """The JSON answer of a GET; query values that are None are left out."""
        return self._call("GET", path, params={key: value for key, value in query.items() if value is not None}).json()

    def get_bytes(self, path: str, /, **query: Any) -> bytes:
        """The raw answer of a GET; query values that are None are left out."""
        return self._call("GET", path, params={key: value for key, value in query.items() if value is not None}).content

    def post(self, path: str, body: Any, *, idempotency_key: str | None = None, by: str | None = None) -> Any:
        """The JSON answer of a POST; with a key, the platform acts once however often it arrives.

        ``by`` is the user's name, where the platform keeps who did it.
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        if by is not None:
            headers["Authorization"] = f"Basic {b64encode(f'{by}:'.encode()).decode()}"
        return self._call("POST", path, json=body, headers=headers).json()

    def post_once(self, path: str, body: Any, by: str | None = None) -> Any:
        """As ``post``; the platform acts once, however often it has to be sent."""
        return self.post(path, body, idempotency_key=uuid.uuid4().hex, by=by)

    def post_bytes(self, path: str, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON answer of a POST with a raw body, for storing which the platform gets time by its size."""
        sent = {"Content-Type": content_type, **(headers or {})}
        return self._call("POST", path, content=body, headers=sent, timeout=self._time_for(len(body))).json()

    def post_parts(self, path: str, parts: Sequence[bytes | memoryview], content_type: str) -> Any:
        """The JSON answer of a POST whose body consists of parts. They are sent one by one: from a body as long as all
        of them together, the rest would be copied for each piece that the network takes."""
        size = sum(map(len, parts))
        sent = {"Content-Type": content_type, "Content-Length": str(size)}
        return self._call("POST", path, content=parts, headers=sent, timeout=self._time_for(size)).json()

    def put_bytes(self, path: str, body: bytes, sha256: str) -> None:
        """Stores bytes with a PUT, which is refused when they do not arrive with this SHA-256 (hex)."""
        headers = {"Content-Digest": content_digest(sha256)}
        self._call("PUT", path, content=body, headers=headers, timeout=self._time_for(len(body)))

    def chunking(self) -> Chunking:
        """How the platform's artifact store keeps files."""
        if self._chunking is None:
            answer = self.get("/api/v1/artifacts/chunking")
            folder = (answer["folder"], answer["place"]) if answer.get("folder") else None
            self._chunking = Chunking(answer["average_bytes"], answer["direct"], folder)
        return self._chunking

    def near(self) -> Blobs | None:
        """The platform's folder of chunks, if this process has it, too."""
        folder = self.chunking().folder
        return None if folder is None else open_near(*folder)

    def give_up_near(self) -> None:
        """The platform has another folder by now: what follows goes by way of it."""
        self._chunking = self.chunking()._replace(folder=None)

    def give_up_direct(self) -> None:
        """The bucket cannot be reached from here: what follows goes by way of the platform."""
        self._chunking = self.chunking()._replace(direct=False)

    def get_range(self, path: str, start: int, end: int, version: str) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of a file.

        Raises:
            Conflict: its ETag is not ``version`` any more.
        """
        headers = {"Range": f"bytes={start}-{end - 1}", "If-Match": f'"{version}"'}
        return self._call("GET", path, headers=headers, timeout=self._time_for(end - start)).content

    def put(self, path: str, body: Any) -> Any:
        """The JSON answer of a PUT."""
        return self._call("PUT", path, json=body).json()

    def patch(self, path: str, body: Any) -> Any:
        """The JSON answer of a PATCH."""
        return self._call("PATCH", path, json=body).json()

    def delete(self, path: str) -> Any:
        """The JSON answer of a DELETE."""
        return self._call("DELETE", path).json()

    def text(self, path: str, **query: Any) -> str:
        """The body of a GET as text."""
        return self._call("GET", path, params={k: v for k, v in query.items() if v is not None}).text

    def post_for_bytes(self, path: str, body: Any) -> bytes:
        """The raw answer of a POST."""
        return self._call("POST", path, json=body).content

    def download(self, path: str, into: BinaryIO, /, **query: Any) -> None:
        """Streams the body of a GET into a file from its start; starts over when the platform goes away meanwhile."""

        def receive() -> httpx.Response:
            into.seek(0)
            into.truncate()
            with self._http.stream("GET", quote(path), params=query) as response:
                if not response.is_success:
                    response.read()
                    return response
                for chunk in response.iter_bytes():
                    into.write(chunk)
                return response

        self._with_retries(receive)

    @contextmanager
    def stream(
        self, path: str, read_timeout_s: float, /, *, method: str = "GET", **query: Any
    ) -> Iterator[Iterator[bytes]]:
        """The body of a GET, or of another request without a body of its own, as it comes. Silence for
        ``read_timeout_s`` ends it, as does a broken connection, which is for the caller to take up again.

        Raises:
            Overloaded: at once, when the platform has as many streams as it takes.
        """
        timeout = httpx.Timeout(self._timeout_s, connect=min(self._timeout_s, CONNECT_TIMEOUT_S), read=read_timeout_s)
        params = {key: value for key, value in query.items() if value is not None}

        def send() -> httpx.Response:
            response = self._http.send(
                self._http.build_request(method, path, params=params, timeout=timeout), stream=True
            )
            if not response.is_success:
                with closing(response):
                    response.read()
            return response

        with closing(self._with_retries(send, _RETRIED_STATUS - {429})) as response:
            yield _until_broken(response)

    def _time_for(self, size: int) -> httpx.Timeout:
        """Time in which ``size`` bytes are stored, too."""
        read_s = self._timeout_s + size / STORED_BYTES_PER_S
        return httpx.Timeout(self._timeout_s, connect=min(self._timeout_s, CONNECT_TIMEOUT_S), read=read_s)

    def exchange(self, send: Callable[[httpx.Client], httpx.Response]) -> httpx.Response:
        """The answer to a request that is none of the kinds above; it is sent again when they are."""
        return self._with_retries(lambda: send(self._http))

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._with_retries(lambda: self._http.request(method, path, **options))

    def _with_retries(self, send: Any, retried: Collection[int] = _RETRIED_STATUS) -> httpx.Response:
        retries = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, _TryAgain)),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            stop=stop_after_delay(self._retry_for_s),
            reraise=True,
        )
        try:
            for attempt in retries:
                with attempt:
                    return self._checked(send, retried)
        except _TryAgain as error:
            cause = error.__cause__
            if isinstance(cause, PlatformError):
                raise cause from None
            raise Unavailable(
                f"no answer from {self.url}: {cause}. Is the platform up (mlplat status)? MLPLAT_URL names another one."
            ) from cause
        raise AssertionError("tenacity re-raises the last error")

    @staticmethod
    def _checked(send: Any, retried: Collection[int]) -> httpx.Response:
        try:
            response: httpx.Response = send()
        except httpx.TransportError as error:
            raise _TryAgain from error
        if response.is_success:
            return response
        error_ = _error_of(response)
        # HAProxy rewrites "no replica" to a 500 without our JSON: that one is worth another try, ours is not.
        is_ours = response.headers.get("content-type", "").startswith("application/json")
        if response.status_code in retried or (response.status_code == 500 and not is_ours):
            raise _TryAgain from error_
        raise error_


def _error_of(response: httpx.Response) -> PlatformError:
    try:
        body = response.json()
        return _BY_CODE.get(body["error_code"], PlatformError)(body["message"])
    except (ValueError, KeyError, TypeError):  # not the platform speaks, but something on the way to it
        return Unavailable(f"{response.request.method} {response.request.url}: HTTP {response.status_code}")


def _until_broken(response: httpx.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_bytes()
    except httpx.TransportError:
        return


def artifact_root(artifact_uri: str) -> str:
    """The HTTP path below which a run's artifacts are written.

    Raises:
        InvalidInput: they live elsewhere, not behind the platform.
    """
    return f"{ARTIFACTS}/{proxied_path(artifact_uri)}"


def default_url() -> str:
    """The platform of the step under way, else of ``MLPLAT_URL``, else of this machine."""
    step = current_step()
    return step.http_url if step is not None else Settings().http_url


@lru_cache(maxsize=16)
def client_for(url: str, retry_for_s: float = RETRY_FOR_S, timeout_s: float = READ_TIMEOUT_S) -> Client:
    """One shared client per platform, patience and process."""
    return Client(url, retry_for_s, timeout_s)
