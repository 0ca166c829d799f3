"""Chunks straight to the platform's bucket and from there, by URLs that the platform has signed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from mlplat.artifacts.chunking import unpack
from mlplat.artifacts.digests import s3_checksum, sha256
from mlplat.artifacts.layout import PACKED
from mlplat.errors import Corrupted, InvalidInput, Unavailable

ATTEMPTS = 4
CONNECT_TIMEOUT_S, TIMEOUT_S = 5.0, 60.0


class Unreachable(Unavailable):
    """The bucket does not answer as it should: the platform is the other way."""


def send(urls: Mapping[str, str], chunks: Mapping[str, bytes | memoryview]) -> None:
    """Sends chunks, by their SHA-256 in hex.

    Raises:
        Unreachable: one of them did not arrive.
    """
    with _client() as http:
        for digest, chunk in chunks.items():
            _exchange(http, "PUT", urls[digest], s3_checksum(digest), bytes(chunk))


def fetch(urls: Sequence[str], chunks: Sequence[tuple[str, int]]) -> list[bytes]:
    """The bytes of chunks, SHA-256 in hex and size of each, checked.

    Raises:
        Unreachable: one of them did not come.
        Corrupted: other bytes came.
    """
    with _client() as http:
        stored = [_exchange(http, "GET", url, {}, b"") for url in urls]
    return [_checked(url, body, *chunk) for url, body, chunk in zip(urls, stored, chunks, strict=True)]


def _client() -> httpx.Client:
    return httpx.Client(timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S))


def _exchange(http: httpx.Client, method: str, url: str, headers: Mapping[str, str], body: bytes) -> bytes:
    retries = Retrying(
        retry=retry_if_exception_type(httpx.HTTPError),
        wait=wait_random_exponential(multiplier=0.2, max=2),
        stop=stop_after_attempt(ATTEMPTS),
        reraise=True,
    )
    try:
        for attempt in retries:
            with attempt:
                response = http.request(method, url, headers=headers, content=body or None)
                response.raise_for_status()
                return response.content
    except httpx.HTTPError as error:
        raise Unreachable(f"the bucket cannot be reached from here: {error}") from error
    raise AssertionError("tenacity re-raises the last error")


def _checked(url: str, stored: bytes, digest: str, size: int) -> bytes:
    try:
        body = unpack(stored, size) if PACKED in url.partition("?")[0].rpartition("/")[2] else stored
    except InvalidInput as error:
        raise Corrupted(f"chunk {digest} came damaged") from error
    if sha256(body) != digest:
        raise Corrupted(f"chunk {digest} came damaged")
    return body
