"""The practical floor of durable orchestration: Ray tasks, and a fenced row in Postgres for each start and end.

``python -m tests.benchmarks.pipeline_floor POSTGRES_URL`` in the environment of a cluster. Prints one line per
shape: its name, seconds of plain Ray tasks, seconds with the rows. There is no scheduler here, no HTTP, no rules and
no logs: what a real one costs on top of this is what it is worth.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence

import psycopg
import ray

ROUNDS = 3
Graph = Mapping[int, Sequence[int]]


@ray.remote(num_cpus=1)
def step(*_earlier: object) -> int:
    """A step that does nothing."""
    return 1


class Rows:
    """One writer that commits whatever is queued, in one statement, under an epoch."""

    def __init__(self, connection: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
        self._connection = connection
        self._queue: list[tuple[int, str, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()

    async def write(self, node: int, state: str) -> None:
        """Returns when the row is durable."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((node, state, done))
        self._wake.set()
        await done

    async def run(self) -> None:
        """The writer's loop."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            group, self._queue = self._queue, []
            latest = {node: state for node, state, _done in group}
            await self._connection.execute(_WRITE, {"nodes": list(latest), "states": list(latest.values())})
            for _node, _state, done in group:
                done.set_result(None)


_WRITE = """
    WITH held AS MATERIALIZED (SELECT epoch FROM floor_lease WHERE epoch = 1 FOR SHARE)
    INSERT INTO floor_row (node, state)
    SELECT t.* FROM held, unnest(%(nodes)s::int[], %(states)s::text[]) AS t(node, state)
    ON CONFLICT (node) DO UPDATE SET state = excluded.state"""


async def drive(graph: Graph, rows: Rows | None) -> float:
    """Runs the graph; the seconds it took."""
    began = time.perf_counter()
    done: dict[int, asyncio.Task[None]] = {}

    async def one(node: int) -> None:
        for need in graph[node]:
            await done[need]
        if rows is not None:
            await rows.write(node, "RUNNING")
        await step.remote()
        if rows is not None:
            await rows.write(node, "SUCCEEDED")

    for node in graph:
        done[node] = asyncio.create_task(one(node))
    await asyncio.gather(*done.values())
    return time.perf_counter() - began


def _plain(graph: Graph) -> float:
    """Ray's own dependencies do the waiting."""
    began = time.perf_counter()
    refs: dict[int, ray.ObjectRef[int]] = {}
    for node, needs in graph.items():
        refs[node] = step.remote(*(refs[need] for need in needs))
    ray.get(list(refs.values()))
    return time.perf_counter() - began


def shapes() -> dict[str, Graph]:
    """Each shape of the benchmark as nodes with their needs."""
    return {
        "chain": {node: [node - 1] if node else [] for node in range(50)},
        "fan-out": {**{node: [] for node in range(1_000)}, 1_000: list(range(1_000))},
        "10 all-to-all layers": {
            10 * layer + number: [10 * (layer - 1) + other for other in range(10)] if layer else []
            for layer in range(10)
            for number in range(10)
        },
        "submissions": {3 * run + number: [3 * run + number - 1] if number else [] for run in range(200)
                        for number in range(3)},
    }  # fmt: skip


async def main(url: str) -> None:
    """Measures and prints."""
    connection = await psycopg.AsyncConnection.connect(url.replace("postgresql+psycopg", "postgresql"), autocommit=True)
    for statement in (
        "CREATE TEMP TABLE floor_lease (epoch bigint)",
        "INSERT INTO floor_lease VALUES (1)",
        "DROP TABLE IF EXISTS floor_row",
        "CREATE TABLE floor_row (node int PRIMARY KEY, state text)",
    ):
        await connection.execute(statement)
    rows = Rows(connection)
    writer = asyncio.create_task(rows.run())
    await asyncio.gather(*(step.remote() for _ in range(100)))
    results: list[tuple[str, float, float]] = []
    for name, graph in shapes().items():
        plain: list[float] = []
        durable: list[float] = []
        for _ in range(ROUNDS):
            plain.append(_plain(graph))
            await connection.execute("TRUNCATE floor_row")
            durable.append(await drive(graph, rows))
        results.append((name, min(plain), min(durable)))
    writer.cancel()
    await connection.execute("DROP TABLE floor_row")
    await connection.close()
    for name, seconds, with_rows in results:
        print(f"{name}\t{seconds}\t{with_rows}")


if __name__ == "__main__":
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    asyncio.run(main(sys.argv[1]))
