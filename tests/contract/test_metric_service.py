"""The metric shard: acknowledged points are durable, counted once, and readable at once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import pyarrow as pa
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from cluster.ports import free_port
from mlplat.errors import Fenced, InvalidInput, Overloaded, Unavailable
from mlplat.metrics import queries
from mlplat.metrics.log import MetricLog
from mlplat.metrics.model import SCHEMA, Point, encode
from mlplat.metrics.service import MetricService
from mlplat.metrics.store import MetricStore
from tests.contract.chdb import (
    abandon,
    as_table,
    batch,
    new_run,
    new_service,
    service_on,
    stored,
    stored_points,
    unique,
)
from tests.contract.waiting import until

Starter = Callable[..., Awaitable[MetricService]]


@pytest.fixture
def shard() -> str:
    return unique("shard")


@pytest.fixture
async def run(engine: AsyncEngine) -> str:
    return await new_run(engine)


@pytest.fixture
async def start(engine: AsyncEngine, shard: str, metric_url: str) -> AsyncIterator[Starter]:
    """Starts services of one shard; those still there at the end are ended."""
    started: list[MetricService] = []

    async def starter(holder: str = "holder", ttl_s: float = 60.0) -> MetricService:
        service = new_service(engine, shard, holder, ttl_s, metric_url)
        await service.start()
        started.append(service)
        return service

    yield starter
    for service in started:
        await abandon(service)


async def _count(service: MetricService, run_id: str) -> int:
    return int(as_table(await service.query(stored_points(run_id)))["n"][0].as_py())


def _points(count: int, step: int = 0) -> list[Point]:
    return [Point("m", float(index), 1_000 + index, step + index) for index in range(count)]


async def test_a_query_sees_what_was_acknowledged_before_it(start: Starter, run: str) -> None:
    service = await start()
    for step in range(5):
        assert await service.append(batch(run, [Point("m", step / 10, 7, step)])) == 1
        rows = as_table(await service.query(queries.history(run, "m", 100))).to_pylist()
        assert [(row["step"], row["value"]) for row in rows] == [(done, done / 10) for done in range(step + 1)]


async def test_small_batches_weigh_what_they_take_in_memory(
    engine: AsyncEngine, shard: str, monkeypatch: pytest.MonkeyPatch, run: str, metric_url: str
) -> None:
    """A thousand batches of a point each take megabytes: beyond its bound the shard leaves them to the log."""
    monkeypatch.setattr("mlplat.metrics.service.MAX_CACHED_BYTES", 1024 * 1024)
    store = FailingStore(metric_url)
    service = service_on(engine, store, shard)
    await service.start()
    try:
        for start in range(0, 300, 50):
            await asyncio.gather(*(service.append(batch(run, _points(1, start + step))) for step in range(50)))
        assert 512 * 1024 < service.stats()["cached_bytes"] <= 1024 * 1024
        store.shut = False
        assert await _count(service, run) == 300, "the rest is in the log"
        assert service.stats()["cached_bytes"] == 0
    finally:
        await abandon(service)


async def test_what_was_flushed_leaves_the_log(start: Starter, engine: AsyncEngine, shard: str, run: str) -> None:
    service = await start()
    await asyncio.gather(*(service.append(batch(run, _points(10, 100 * index))) for index in range(10)))
    await service.barrier()
    last, flushed = await MetricLog(engine, shard).positions()
    assert last == flushed > 0
    assert await MetricLog(engine, shard).read_after(flushed, 10) == []
    assert service.lag() == "0"
    assert service.stats()["cached_bytes"] == 0


async def test_concurrent_small_batches_are_all_acknowledged_and_counted_once(
    start: Starter, engine: AsyncEngine, shard: str, run: str
) -> None:
    service = await start()
    answers = await asyncio.gather(
        *(service.append(batch(run, _points(1 + index % 5, 10 * index))) for index in range(400))
    )
    assert answers == [1 + index % 5 for index in range(400)]
    row = as_table(await service.query(stored_points(run))).to_pylist()[0]
    assert row["n"] == sum(answers)
    stats = service.stats()
    assert (stats["batches"], stats["points"], stats["flushed_points"]) == (400, sum(answers), sum(answers))
    assert stats["groups"] < 400  # they share commits
    assert (await MetricLog(engine, shard).positions())[0] == stats["groups"]


async def test_a_batch_that_is_sent_twice_counts_once(start: Starter, run: str) -> None:
    service = await start()
    body = batch(run, _points(20))
    await asyncio.gather(service.append(body), service.append(body))
    await service.append(body)
    assert await _count(service, run) == 20


async def test_an_empty_batch_is_fine_and_writes_nothing(start: Starter, engine: AsyncEngine, shard: str) -> None:
    service = await start()
    assert await service.append(encode(SCHEMA.empty_table())) == 0
    assert await MetricLog(engine, shard).positions() == (0, 0)


def _table(**replaced: pa.Array) -> pa.Table:
    columns = {
        "run_id": pa.array(["r"], pa.string()),
        "key": pa.array(["k"], pa.string()),
        "step": pa.array([0], pa.int64()),
        "timestamp": pa.array([0], pa.int64()),
        "value": pa.array([0.0], pa.float64()),
    }
    return pa.table(columns | replaced)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not an Arrow IPC stream"),
        (b"{}", "not an Arrow IPC stream"),
        (b"\xff" * 64, "not an Arrow IPC stream"),
        (encode(_table())[:-40], "not an Arrow IPC stream"),
        (encode(_table().drop_columns(["step"])), "have the columns"),
        (encode(_table(extra=pa.array([1]))), "have the columns"),
        (encode(_table().select(["key", "run_id", "step", "timestamp", "value"])), "have the columns"),
        (encode(_table(value=pa.array(["a"]))), "wrong type"),
        (encode(_table(step=pa.array([1.5]))), "wrong type"),
        (encode(_table(step=pa.array([2**64 - 1], pa.uint64()))), "wrong type"),
        (encode(_table(value=pa.array([[1.0]]))), "wrong type"),
        (encode(_table(value=pa.array([None], pa.float64()))), "nulls"),
        (encode(_table(run_id=pa.array([None], pa.string()))), "nulls"),
    ],
)
async def test_a_malformed_batch_is_refused_and_writes_nothing(
    start: Starter, engine: AsyncEngine, shard: str, body: bytes, message: str
) -> None:
    service = await start()
    with pytest.raises(InvalidInput, match=message):
        await service.append(body)
    assert await MetricLog(engine, shard).positions() == (0, 0)
    assert service.stats()["batches"] == 0


async def test_types_that_lose_nothing_are_converted(start: Starter, run: str) -> None:
    service = await start()
    body = encode(
        _table(
            run_id=pa.array([run]).dictionary_encode(),
            key=pa.array(["k"], pa.large_string()),
            step=pa.array([3], pa.int32()),
            value=pa.array([0.5], pa.float32()),
        ),
        "lz4",
    )
    assert await service.append(body) == 1
    rows = as_table(await service.query(queries.history(run, "k", 10))).to_pylist()
    assert [(row["step"], row["value"]) for row in rows] == [(3, 0.5)]


async def test_a_restarted_shard_replays_everything_that_was_acknowledged(
    start: Starter, engine: AsyncEngine, shard: str, run: str, metric_store: MetricStore
) -> None:
    first = await start()
    first._flusher.cancel()  # nothing reaches the metric store
    answers = [await first.append(batch(run, _points(10, 100 * index))) for index in range(20)]
    answers += await asyncio.gather(*(first.append(batch(run, _points(3, 10_000 + 10 * i))) for i in range(50)))
    last, flushed = await MetricLog(engine, shard).positions()
    assert (last, flushed) == (first.stats()["groups"], 0)
    assert last > 20
    await abandon(first)
    assert metric_store.query(stored_points(run))["n"].to_pylist() == [0]

    second = await start()
    assert await _count(second, run) == sum(answers) == 350
    assert second.stats()["replayed_groups"] == last
    assert await MetricLog(engine, shard).positions() == (last, last)


async def test_a_shard_that_died_between_insert_and_mark_counts_points_once(
    start: Starter, engine: AsyncEngine, shard: str, run: str, metric_store: MetricStore
) -> None:
    first = await start()
    first._flusher.cancel()
    await first.append(batch(run, _points(30)))
    [group] = await MetricLog(engine, shard).read_after(0, 10)
    assert group.points == 30
    metric_store.insert(stored(1, run, _points(30)))  # its last deed
    await abandon(first)
    second = await start()
    assert await _count(second, run) == 30
    rows = as_table(await second.query(queries.latest([run]))).to_pylist()
    assert [(row["value"], row["step"]) for row in rows] == [(29.0, 29)]


async def test_a_restarted_shard_goes_on_where_the_numbers_stopped(
    start: Starter, engine: AsyncEngine, shard: str, run: str
) -> None:
    for life in range(3):
        service = await start()
        await service.append(batch(run, _points(5, 10 * life)))
        if life % 2:
            await service.barrier()
        await abandon(service)
    last = await start()
    assert await _count(last, run) == 15
    assert await MetricLog(engine, shard).positions() == (3, 3)


async def test_stopping_flushes_and_gives_the_shard_to_another_holder_at_once(
    start: Starter, run: str, metric_store: MetricStore
) -> None:
    first = await start("h1")
    await first.append(batch(run, _points(5)))
    await first.stop()
    assert metric_store.query(stored_points(run))["n"].to_pylist() == [5]
    with pytest.raises(Unavailable):
        await first.append(batch(run, _points(5, 100)))
    second = await asyncio.wait_for(start("h2"), 10)
    assert second.stats()["replayed_groups"] == 0
    assert await _count(second, run) == 5


async def test_a_shard_that_was_taken_over_acknowledges_and_writes_nothing(
    start: Starter, engine: AsyncEngine, shard: str, run: str
) -> None:
    old, lost = await start(), await new_run(engine)
    await old.append(batch(run, _points(5)))
    new = await start()
    answers = await asyncio.gather(
        *(old.append(batch(lost, _points(3, 10 * index))) for index in range(5)), return_exceptions=True
    )
    assert all(isinstance(answer, Fenced) for answer in answers)
    assert old._lease.lost.is_set()
    with pytest.raises(Unavailable):
        await old.append(batch(lost, _points(3)))
    await new.append(batch(run, _points(5, 100)))
    assert (await _count(new, run), await _count(new, lost)) == (10, 0)
    assert await MetricLog(engine, shard).positions() == (2, 2)


async def test_appends_that_race_a_take_over_are_either_fenced_or_kept(start: Starter, run: str) -> None:
    old = await start()
    acknowledged: list[int] = []

    async def writer(number: int) -> None:
        for index in range(10_000):
            try:
                acknowledged.append(await old.append(batch(run, [Point("m", 1.0, number, index)])))
            except Unavailable:
                return

    writers = [asyncio.create_task(writer(number)) for number in range(6)]
    await until(lambda: _at_least(acknowledged, 60))
    new = await start()
    await asyncio.wait_for(asyncio.gather(*writers), 20)
    assert await _count(new, run) == len(acknowledged)


async def _at_least(items: list[int], count: int) -> bool:
    return len(items) >= count


class FailingStore(MetricStore):
    """The real store behind a door that can be shut."""

    shut = True

    def insert(self, points: pa.Table) -> None:
        """Refuses while the door is shut."""
        if self.shut:
            raise Unavailable("the door is shut")
        super().insert(points)


async def test_a_log_that_has_grown_too_large_is_not_added_to(
    engine: AsyncEngine, shard: str, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """Also by a shard that starts while the metric store is away."""
    monkeypatch.setattr("mlplat.metrics.service.RETRY_S", 0.05)
    monkeypatch.setattr("mlplat.metrics.service.LOG_SIZE_INTERVAL_S", 0.0)
    nowhere = f"clickhouse://127.0.0.1:{free_port()}"
    service = new_service(engine, shard, url=nowhere)
    await service.start()
    try:
        await service.append(batch(run, _points(5)))
        monkeypatch.setattr("mlplat.metrics.service.MAX_LOG_BYTES", 1)

        async def refuses() -> bool:
            try:
                await service.append(batch(run, _points(5)))
            except Overloaded as error:
                return "wait for the metric store; retry later" in error.message
            return False

        await until(refuses)
    finally:
        await abandon(service)


async def _flush_failed(service: MetricService) -> bool:
    return service.stats()["flush_errors"] > 0


async def test_appends_go_on_while_the_metric_store_is_away_and_reads_wait(
    engine: AsyncEngine, shard: str, metric_url: str, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    monkeypatch.setattr("mlplat.metrics.service.RETRY_S", 0.05)
    store = FailingStore(metric_url)
    service = service_on(engine, store, shard)
    await service.start()
    try:
        assert await service.append(batch(run, _points(5))) == 5
        assert await service.append(batch(run, _points(5, 100))) == 5
        with pytest.raises(Unavailable, match="2 groups behind"):
            await service.barrier(timeout_s=0.2)
        await until(lambda: _flush_failed(service))
        assert service.lag() == "2 groups: the door is shut"
        store.shut = False
        assert await _count(service, run) == 10
        assert service.lag() == "0"
    finally:
        await abandon(service)


async def test_a_shard_that_starts_while_the_metric_store_is_away_acknowledges(
    engine: AsyncEngine, shard: str, run: str
) -> None:
    service = new_service(engine, shard, url="clickhouse://127.0.0.1:1")
    try:
        await service.start()
        assert await service.append(batch(run, _points(5))) == 5
        with pytest.raises(Unavailable, match="does not answer"):
            await service.query(stored_points(run))
    finally:
        await abandon(service)


async def test_last_points_need_no_flush(start: Starter, run: str) -> None:
    service = await start()
    await service.append(batch(run, [Point("m", 1.0, 1, 1), Point("n", math.nan, 1, 1)]))
    await service.barrier()
    service._flusher.cancel()
    await service.append(batch(run, [Point("m", 2.0, 1, 2), Point("new", 5.0, 1, 0)]))
    await service.append(batch(run, [Point("m", 3.0, 1, 1)]))
    rows = as_table(await service.query(queries.latest([run]))).to_pylist()
    assert repr([(row["key"], row["value"], row["step"]) for row in rows]) == (
        "[('m', 2.0, 2), ('n', nan, 1), ('new', 5.0, 0)]"
    )
    assert service.stats()["lag_groups"] == 2
    with pytest.raises(Unavailable):  # what has to be flushed first is not
        await service.barrier([run], timeout_s=0.1)


async def test_reading_an_idle_shard_needs_no_flush(start: Starter) -> None:
    service = await start()
    service._flusher.cancel()
    assert await _count(service, unique("nobody")) == 0


async def test_a_query_that_the_store_refuses_is_unavailable(start: Starter) -> None:
    service = await start()
    with pytest.raises(Unavailable):
        await service.query(queries.Statement("SELECT nonsense"))
