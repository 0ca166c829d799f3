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
from dataclasses import dataclass
from urllib.parse import urlsplit

HEAD_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Load:
    """What a load run measured: requests a second, and every request's latency in ms."""

    rate: float
    latencies_ms: list[float]


@dataclass(frozen=True)
class _Plan:
    host: str
    port: int
    clients: int
    rate: float | None
    requests: list[bytes]


def run_load(url: str, requests: Sequence[tuple[str, str, object]], clients: int, rate: float | None = None) -> Load:
    """Sends every request once, over ``clients`` connections; fails if one is refused.

    Args:
        requests: (method, path, JSON body or bytes or None).
        rate: requests a second that are offered, whatever the answers do; latencies then count from the
            time at which a request was due. None: every client sends when it has its answer.
    """
    return start_load(url, requests, clients, rate)()


def start_load(
    url: str, requests: Sequence[tuple[str, str, object]], clients: int, rate: float | None = None
) -> Callable[[], Load]:
    """As ``run_load``, in the background: call what it returns to wait for the figures."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    encoded = [_encode(parts.netloc, *request) for request in requests]
    plan = _Plan(parts.hostname, parts.port or 80, clients, rate, encoded)
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
        figures = json.loads(answer)
        return Load(figures["rate"], figures["latencies_ms"])

    return finish


def _encode(host: str, method: str, path: str, body: object) -> bytes:
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "application/vnd.apache.arrow.stream" if isinstance(body, bytes) else "application/json"
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
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


async def _client(plan: _Plan, due: Iterator[tuple[float, bytes]], latencies: list[float]) -> None:
    reader, writer = await asyncio.open_connection(plan.host, plan.port, limit=HEAD_LIMIT)
    for at, request in due:
        began = time.perf_counter()
        if at:
            await asyncio.sleep(max(0.0, at - began))
            began = at
        await _exchange(reader, writer, request)
        latencies.append((time.perf_counter() - began) * 1000)
    writer.close()


async def _main(plan: _Plan) -> dict[str, object]:
    latencies: list[float] = []
    began = time.perf_counter()
    due = ((began + number / plan.rate if plan.rate else 0.0, request) for number, request in enumerate(plan.requests))
    await asyncio.gather(*(_client(plan, due, latencies) for _ in range(plan.clients)))
    return {"rate": len(latencies) / (time.perf_counter() - began), "latencies_ms": latencies}


if __name__ == "__main__":
    json.dump(asyncio.run(_main(pickle.load(sys.stdin.buffer))), sys.stdout)
