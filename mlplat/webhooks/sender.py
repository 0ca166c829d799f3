"""Sends requests to addresses that were checked, and reads no more of the answers than it needs."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import httpx

from mlplat.errors import InvalidInput
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.model import MAX_ERROR, Answer, retry_after_s

TIMEOUT_S = 10.0
CHECK_TIMEOUT_S = 3.0
MAX_CONNECTIONS = 100
#: Of an answer: what is read, and what is kept.
MAX_ANSWER_BYTES = 64 * 1024
KEPT_BYTES = 1_000
#: Of a host, in the order in which they are tried.
MAX_ADDRESSES = 3

#: The addresses of a host.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_kind, address in found))


class Refused(Exception):
    """The host is at an address where no webhook may go."""


class GuardedTransport(httpx.AsyncBaseTransport):
    """Looks a host up once, checks all of its addresses, and connects to one of these and to no name: who answers a
    second look-up differently gains nothing. TLS and ``Host`` are still the name's."""

    def __init__(self, targets: Targets, resolve: Resolver, context: ssl.SSLContext) -> None:
        self._targets = targets
        self._resolve = resolve
        # No connection is used twice: it would belong to an address, whichever name it was opened for.
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0)
        self._inner = httpx.AsyncHTTPTransport(verify=context, trust_env=False, limits=limits)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx.

        Raises:
            Refused: see there.
        """
        url, failure = request.url, httpx.ConnectError("no address")
        host = url.raw_host.decode("ascii")
        for address in (await self.find_addresses(host, url.port or (443 if url.scheme == "https" else 80)))[
            :MAX_ADDRESSES
        ]:
            there = httpx.Request(
                request.method, url.copy_with(host=address), headers=request.headers, stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )  # fmt: skip
            try:
                return await self._inner.handle_async_request(there)
            except httpx.ConnectError as error:
                failure = error
        raise failure

    async def find_addresses(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host, all of which may be called.

        Raises:
            OSError: it has none.
            Refused: one of them may not.
        """
        addresses = await self._resolve(host, port)
        for address in addresses:
            refusal = self._targets.refusal(host, address)
            if refusal is not None:
                raise Refused(refusal)
        return addresses

    async def aclose(self) -> None:
        """Closes what is open."""
        await self._inner.aclose()


class Sender:
    """Posts to receivers. Safe for concurrent use in one event loop.

    Args:
        targets: what is allowed beyond public addresses.
        context: by default the certificates of this machine and those of certifi.
    """

    def __init__(
        self,
        targets: Targets,
        resolve: Resolver = look_up,
        *,
        context: ssl.SSLContext | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._transport = GuardedTransport(targets, resolve, context or _default_context())
        self._client = httpx.AsyncClient(
            transport=self._transport, timeout=timeout_s, trust_env=False, follow_redirects=False,
            headers={"User-Agent": "mlplat", "Accept": "*/*", "Accept-Encoding": "identity"},
        )  # fmt: skip

    async def check(self, url: str) -> None:
        """Tells early that a host may not be called. One that cannot be looked up now may be there later.

        Raises:
            InvalidInput: it may not be called.
        """
        try:
            parts = httpx.URL(url)
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(CHECK_TIMEOUT_S):
                    await self._transport.find_addresses(parts.raw_host.decode("ascii"), parts.port or 443)
        except (Refused, httpx.InvalidURL, UnicodeError) as error:
            raise InvalidInput(f"url: {error}") from error

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Posts once, and says what became of it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._client.stream("POST", url, content=body, headers=dict(headers)) as response:
                    return _judged(response, await _beginning(response))
        except (TimeoutError, httpx.TimeoutException):
            return Answer(None, f"no answer within {self._timeout_s:g} s")
        except Refused as refused:
            return Answer(None, str(refused))
        except socket.gaierror as error:
            return Answer(None, f"the host cannot be looked up: {error.strerror}"[:MAX_ERROR])
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            return Answer(None, _clean(f"{type(error).__name__}: {error}")[:MAX_ERROR])

    async def close(self) -> None:
        """Closes what is open."""
        await self._client.aclose()


async def _beginning(response: httpx.Response) -> str:
    """Of the answer's body, as it came: nobody unpacks what may be a bomb."""
    kept, size = b"", 0
    async for chunk in response.aiter_raw():
        kept += chunk[: KEPT_BYTES - len(kept)]
        size += len(chunk)
        if size >= MAX_ANSWER_BYTES:
            break
    return _clean(kept.decode(errors="replace"))


def _judged(response: httpx.Response, body: str) -> Answer:
    status, said = response.status_code, f": {body[:200]}" if body.strip() else ""
    if response.is_success:
        return Answer(status, body=body)
    wait_s = retry_after_s(response.headers.get("retry-after", ""), datetime.now(UTC))
    why = f"answered {status}; redirects are not followed" if response.is_redirect else f"answered {status}{said}"
    return Answer(status, why[:MAX_ERROR], wait_s, body)


def _clean(text: str) -> str:
    """Without what Postgres does not take."""
    return text.replace("\x00", "")


def _default_context() -> ssl.SSLContext:
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context
