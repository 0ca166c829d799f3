"""Load over HTTP from a process of its own, so that the generator does not share the tester's interpreter."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx


@dataclass(frozen=True)
class Load:
    """What a load run measured: requests a second, and every request's latency in ms."""

    rate: float
    latencies_ms: list[float]


def run_load(url: str, requests: Sequence[tuple[str, str, object]], clients: int) -> Load:
    """Sends every request once, over ``clients`` connections; fails if one is refused.

    Args:
        requests: (method, path, JSON body or None).
    """
    plan = json.dumps({"url": url, "clients": clients, "requests": list(requests)})
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.load"],
        input=plan,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return Load(answer["rate"], answer["latencies_ms"])


async def _main(plan: dict[str, object]) -> dict[str, object]:
    queue = iter(plan["requests"])  # type: ignore[call-overload]
    latencies: list[float] = []

    async def client(http: httpx.AsyncClient) -> None:
        for method, path, body in queue:
            began = time.perf_counter()
            answer = await http.request(method, path, content=None if body is None else json.dumps(body).encode(),
                                        headers={"Content-Type": "application/json"})  # fmt: skip
            latencies.append((time.perf_counter() - began) * 1000)
            answer.raise_for_status()

    clients = [
        httpx.AsyncClient(base_url=str(plan["url"]), timeout=60, trust_env=False)
        for _ in range(int(str(plan["clients"])))
    ]
    for http in clients:
        await http.get("/health")
    began = time.perf_counter()
    await asyncio.gather(*(client(http) for http in clients))
    seconds = time.perf_counter() - began
    return {"rate": len(latencies) / seconds, "latencies_ms": latencies}


if __name__ == "__main__":
    json.dump(asyncio.run(_main(json.load(sys.stdin))), sys.stdout)
