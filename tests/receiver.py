"""Receivers of webhooks on real ports."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers

from mlplat.webhooks.signing import DELIVERY, verify

SECRET = "the-secret-of-tests"


@dataclass(frozen=True)
class Received:
    """A request that arrived, signed as it has to be."""

    path: str
    headers: Headers
    body: dict[str, Any]

    @property
    def delivery(self) -> str:
        """The id of the delivery."""
        return self.headers[DELIVERY]


@dataclass
class Receiver:
    """Takes what comes. ``answers`` are the statuses of the next requests (0: none at all), before 200 holds.

    ``connections`` counts who connected, whatever they sent: a canary's stays 0.
    """

    answers: list[int] = field(default_factory=list)
    headers: str = ""
    secret: str = SECRET
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    before: Callable[[Received], Awaitable[None]] | None = None
    extra: bytes = b""

    async def start(self, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Receiver:
        """Listens."""
        self._server = await asyncio.start_server(
            self._serve, host, self.port, ssl=context, family=socket.AF_INET if ":" not in host else socket.AF_INET6
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Closes the port."""
        self._server.close()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}/hook"

    def told(self, *fields: str) -> list[Any]:
        """Fields of the events so far."""
        return [tuple(item.body.get(name) for name in fields) for item in self.received]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = Headers(raw=[_header(line) for line in lines if line])
        body = await reader.readexactly(int(headers["content-length"]))
        verify(self.secret, headers, body, time.time())
        got = Received(first.split()[1], headers, json.loads(body))
        self.received.append(got)
        if self.before is not None:
            await self.before(got)
        status = self.answers.pop(0) if self.answers else 200
        if not status:
            await reader.read()  # until the other side gives up
            return
        said = b"said so" + self.extra
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(said)}\r\n{self.headers}\r\n"
        writer.write(head.encode() + said)
        await writer.drain()


def _header(line: str) -> tuple[bytes, bytes]:
    name, _colon, value = line.partition(":")
    return name.lower().encode(), value.strip().encode()
