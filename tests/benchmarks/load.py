"""Load over HTTP from a process of its own, so that the generator does not share the tester's interpreter.

Requests are encoded before the clock starts and sent over plain sockets: on a machine of two cores a
full HTTP client would take as much of them as the server does.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

HEAD_LIMIT = 64 * 1024
#: (method, path, JSON body or bytes or None)
Request = tuple[str, str, object]


@dataclass(frozen=True)
class Load:
    """What a load run measured: requests a second, every request's latency in ms, and answers if asked for."""

    rate: float
    latencies_ms: list[float]
    answers: list[Any]


@dataclass(frozen=True)
class _Plan:
    host: str
    port: int
    clients: int
    rate: float | None
    keep_answers: bool
    requests: list[bytes]


def run_load(
    url: str, requests: Sequence[Request], clients: int, rate: float | None = None, *, keep_answers: bool = False
) -> Load:
    """Sends every request once, over ``clients`` connections; fails if one is refused.

    Args:
        rate: requests a second that are offered, whatever the answers do; latencies then count from the
            time at which a request was due. None: every client sends when it has its answer.
        keep_answers: the JSON answers come back too, in the order of the requests.
    """
    return start_load(url, requests, clients, rate, keep_answers=keep_answers)()


def start_load(
    url: str, requests: Sequence[Request], clients: int, rate: float | None = None, *, keep_answers: bool = False
) -> Callable[[], Load]:
    """As ``run_load``, in the background: call what it returns to wait for the figures."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    encoded = [_encode(parts.netloc, *request) for request in requests]
    plan = _Plan(parts.hostname, parts.port or 80, clients, rate, keep_answers, encoded)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    pickle.dump(plan, process.stdin)
    process.stdin.close()

    def finish() -> Load:
        assert process.stdout is not None
        answer = process.stdout.read()
        assert process.wait(60) == 0, "the load generator failed"
        return Load(**json.loads(answer))

    return finish


def _encode(host: str, method: str, path: str, body: object) -> bytes:
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "application/vnd.apache.arrow.stream" if isinstance(body, bytes) else "application/json"
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    status = head[9:12]
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
    else:
        start = lowered.index(b"content-length:") + len(b"content-length:")
        body = await reader.readexactly(int(lowered[start : lowered.index(b"\r\n", start)]))
    assert status == b"200", f"{request[:120]!r} → {head!r}{body[:500]!r}"
    return body


async def _client(plan: _Plan, due: Iterator[tuple[int, float, bytes]], load: Load) -> None:
    reader, writer = await asyncio.open_connection(plan.host, plan.port, limit=HEAD_LIMIT)
    for number, at, request in due:
        began = time.perf_counter()
        if at:
            await asyncio.sleep(max(0.0, at - began))
            began = at
        answer = await _exchange(reader, writer, request)
        load.latencies_ms.append((time.perf_counter() - began) * 1000)
        if plan.keep_answers:
            load.answers[number] = json.loads(answer)
    writer.close()


async def _main(plan: _Plan) -> Load:
    load = Load(0.0, [], [None] * len(plan.requests) if plan.keep_answers else [])
    began = time.perf_counter()
    due = (
        (number, began + number / plan.rate if plan.rate else 0.0, request)
        for number, request in enumerate(plan.requests)
    )
    await asyncio.gather(*(_client(plan, due, load) for _ in range(plan.clients)))
    return replace(load, rate=len(plan.requests) / (time.perf_counter() - began))


if __name__ == "__main__":
    json.dump(asdict(asyncio.run(_main(pickle.load(sys.stdin.buffer)))), sys.stdout)
