"""The app on a real port, which can go away, hang, or fail, and come back on the same port."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass
class Served:
    """``mood`` is ok, refuses (503), breaks (500 of somebody else) or hangs; ``requests`` are the paths so far.

    ``moods`` are those of the next requests, before ``mood`` holds.
    """

    app: ASGIApp
    mood: str = "ok"
    moods: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    port: int = 0

    async def start(self) -> None:
        """Listens, on the same port as before."""
        self._socket = socket.create_server(("127.0.0.1", self.port), backlog=100)
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            self._answer, interface="asgi3", log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._task = asyncio.get_running_loop().create_task(self._serve())
        while not self._server.started:
            assert not self._task.done(), "uvicorn did not start"
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """The port is closed afterwards; stopping twice is fine."""
        if self._task.done():
            return
        self._server.should_exit = self._server.force_exit = True
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(self._task, 10)
        self._socket.close()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        await self._server._serve([self._socket])  # serve() would take the test process' signals

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests.append(scope["path"])
        mood = self.moods.pop(0) if self.moods else self.mood
        if mood == "ok":
            await self.app(scope, receive, send)
            return
        if mood == "hangs":
            await asyncio.sleep(60)
        status = 503 if mood == "refuses" else 500
        answer: Any = PlainTextResponse("somebody else's words", status_code=status)
        await answer(scope, receive, send)
