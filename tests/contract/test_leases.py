"""Leases: one holder at a time, and no write of an epoch that is over."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import open_engine
from mlplat.db.lease import Lease, LeaseKeeper, acquire, release, renew, try_acquire
from mlplat.db.tables import lease, metric_flush
from mlplat.errors import Fenced
from mlplat.settings import embedded_postgres_url
from tests.contract.waiting import until

TTL_S = 0.3
#: So long that a busy machine does not keep its holder from renewing it.
KEPT_TTL_S = 2.0
LONG_S = 60.0
#: The fence as the shard's log and the scheduler's submissions have it.
_FENCED_INSERT = text(
    "WITH held AS MATERIALIZED (SELECT epoch FROM lease WHERE name = :lease AND epoch = :epoch FOR SHARE) "
    "INSERT INTO metric_flush (shard, seq) SELECT :shard, epoch FROM held RETURNING seq"
)


async def _row(engine: AsyncEngine, name: str) -> tuple[str, int, datetime]:
    async with engine.connect() as connection:
        row = (await connection.execute(select(lease).where(lease.c.name == name))).one()
    return row.holder, row.epoch, row.until


async def _held(engine: AsyncEngine, name: str, holder: str, ttl_s: float = LONG_S) -> Lease:
    taken = await try_acquire(engine, name, holder, ttl_s)
    assert taken is not None
    return taken


async def test_a_free_lease_is_taken_with_epoch_one(engine: AsyncEngine) -> None:
    before = time.monotonic()
    taken = await _held(engine, "a", "h1", 5.0)
    assert (taken.name, taken.holder, taken.epoch, taken.ttl_s) == ("a", "h1", 1, 5.0)
    assert before + 5.0 <= taken.deadline <= time.monotonic() + 5.0


async def test_a_held_lease_is_refused_to_others(engine: AsyncEngine) -> None:
    await _held(engine, "a", "h1")
    assert await try_acquire(engine, "a", "h2", LONG_S) is None
    assert (await _row(engine, "a"))[:2] == ("h1", 1)


async def test_leases_of_different_names_are_independent(engine: AsyncEngine) -> None:
    await _held(engine, "a", "h1")
    assert (await _held(engine, "b", "h2")).epoch == 1


async def test_an_expired_lease_is_taken_over_with_a_higher_epoch(engine: AsyncEngine) -> None:
    old = await _held(engine, "a", "h1", TTL_S)
    assert await try_acquire(engine, "a", "h2", LONG_S) is None
    new = await asyncio.wait_for(acquire(engine, "a", "h2", LONG_S), 10)
    assert new.epoch == old.epoch + 1
    assert time.monotonic() >= old.deadline - 0.05  # not before the old one ran out
    assert await try_acquire(engine, "a", "h1", LONG_S) is None


async def test_the_same_holder_takes_its_own_lease_again_at_once(engine: AsyncEngine) -> None:
    first = await _held(engine, "a", "h1")
    second = await _held(engine, "a", "h1")
    assert second.epoch == first.epoch + 1
    with pytest.raises(Fenced):
        await renew(engine, first)


async def test_of_many_who_ask_at_once_one_gets_it(engine: AsyncEngine) -> None:
    answers = await asyncio.gather(*(try_acquire(engine, "a", f"h{number}", LONG_S) for number in range(8)))
    won = [answer for answer in answers if answer is not None]
    assert [answer.epoch for answer in won] == [1]
    assert (await _row(engine, "a"))[0] == won[0].holder


async def test_renewing_extends_the_time_and_keeps_the_epoch(engine: AsyncEngine) -> None:
    held = await _held(engine, "a", "h1", 5.0)
    _holder, _epoch, ends_at = await _row(engine, "a")
    renewed = await renew(engine, held)
    assert renewed.epoch == held.epoch
    assert renewed.deadline > held.deadline
    assert (await _row(engine, "a"))[2] > ends_at


async def test_an_expired_lease_that_nobody_took_can_still_be_renewed(engine: AsyncEngine) -> None:
    held = await _held(engine, "a", "h1", 0.01)
    await asyncio.sleep(max(0.0, held.deadline - time.monotonic()))
    assert (await renew(engine, held)).epoch == held.epoch


async def test_renewing_an_old_epoch_is_fenced_and_leaves_the_new_holder_alone(engine: AsyncEngine) -> None:
    old = await _held(engine, "a", "h1", 0.01)
    await asyncio.wait_for(acquire(engine, "a", "h2", LONG_S), 10)
    before = await _row(engine, "a")
    with pytest.raises(Fenced, match="epoch 1 is over"):
        await renew(engine, old)
    assert await _row(engine, "a") == before


async def test_a_released_lease_is_free_at_once(engine: AsyncEngine) -> None:
    held = await _held(engine, "a", "h1")
    await release(engine, held)
    assert (await asyncio.wait_for(acquire(engine, "a", "h2", LONG_S), 5)).epoch == 2


async def test_releasing_an_old_epoch_does_nothing(engine: AsyncEngine) -> None:
    old = await _held(engine, "a", "h1")
    await _held(engine, "a", "h1")
    await release(engine, old)
    assert await try_acquire(engine, "a", "h2", LONG_S) is None


async def test_check_passes_for_the_current_epoch_and_raises_for_an_old_one(engine: AsyncEngine) -> None:
    old = await _held(engine, "a", "h1")
    async with engine.begin() as connection:
        await old.check(connection)
    new = await _held(engine, "a", "h1")
    async with engine.begin() as connection:
        await new.check(connection)
        with pytest.raises(Fenced):
            await old.check(connection)


async def test_a_take_over_waits_for_an_open_write_of_the_old_epoch(engine: AsyncEngine) -> None:
    old = await _held(engine, "a", "h1")
    async with engine.connect() as connection:
        async with connection.begin():
            await old.check(connection)
            take_over = asyncio.create_task(try_acquire(engine, "a", "h1", LONG_S))
            await until(lambda: _somebody_waits(engine))
            assert not take_over.done()
            await connection.execute(insert(metric_flush).values(shard="a", seq=1))
        taken = await asyncio.wait_for(take_over, 10)
    assert taken is not None
    assert taken.epoch == old.epoch + 1


async def _somebody_waits(engine: AsyncEngine) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with engine.connect() as connection:
        return bool((await connection.execute(text(query))).scalar_one())


async def _write_until_fenced(engine: AsyncEngine, held: Lease, writer: int, started: asyncio.Event) -> int:
    """Inserts rows with the fence in the statement itself; returns how many went in before the fence closed."""
    for number in range(100_000):
        row = {"lease": held.name, "epoch": held.epoch, "shard": f"{held.epoch}/{writer}/{number}"}
        async with engine.begin() as connection:
            if (await connection.execute(_FENCED_INSERT, row)).first() is None:
                return number
        started.set()
    raise AssertionError("the fence never closed")


async def _check_until_fenced(engine: AsyncEngine, held: Lease, writer: int, started: asyncio.Event) -> int:
    """Inserts rows after ``check`` in the same transaction; returns how many went in before the fence closed."""
    for number in range(100_000):
        name = f"{held.epoch}/{writer}/{number}"
        try:
            async with engine.begin() as connection:
                await held.check(connection)
                await connection.execute(insert(metric_flush).values(shard=name, seq=held.epoch))
        except Fenced:
            return number
        started.set()
    raise AssertionError("the fence never closed")


async def _rows_of(engine: AsyncEngine, epoch: int) -> int:
    query = select(func.count()).select_from(metric_flush).where(metric_flush.c.seq == epoch)
    async with engine.connect() as connection:
        return int((await connection.execute(query)).scalar_one())


async def test_no_row_of_an_old_epoch_appears_after_the_take_over_has_committed(engine: AsyncEngine) -> None:
    """Six writers of the old epoch race each take-over, in both forms of the fence."""
    held = await _held(engine, "leak", "h1")
    for _round in range(12):
        events = [asyncio.Event() for _ in range(6)]
        writers = [
            asyncio.create_task(
                (_write_until_fenced if number % 2 else _check_until_fenced)(engine, held, number, event)
            )
            for number, event in enumerate(events)
        ]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), 20)
        new = await try_acquire(engine, "leak", "h1", LONG_S)
        at_commit = await _rows_of(engine, held.epoch)
        written = sum(await asyncio.wait_for(asyncio.gather(*writers), 20))
        assert new is not None
        assert await _rows_of(engine, held.epoch) == at_commit == written
        held = new


async def test_a_keeper_keeps_its_lease_for_longer_than_its_time_to_live(engine: AsyncEngine) -> None:
    keeper = LeaseKeeper(engine, "a", "h1", KEPT_TTL_S)
    held = await keeper.start()
    ends_at = (await _row(engine, "a"))[2]
    deadline = time.monotonic() + 30
    while time.monotonic() < held.deadline + KEPT_TTL_S / 2:  # longer than its time
        assert await try_acquire(engine, "a", "h2", KEPT_TTL_S) is None
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert keeper.current.epoch == held.epoch
    assert (await _row(engine, "a"))[2] > ends_at
    await keeper.stop()


async def test_a_keeper_whose_lease_was_taken_says_so_and_refuses_to_fence_writes(engine: AsyncEngine) -> None:
    keeper = LeaseKeeper(engine, "a", "h1", TTL_S)
    await keeper.start()
    await _held(engine, "a", "h1")  # a second process of the same holder
    await asyncio.wait_for(keeper.lost.wait(), 10)
    with pytest.raises(Fenced):
        _ = keeper.current
    await keeper.stop()
    assert await try_acquire(engine, "a", "h2", LONG_S) is None  # stopping the loser frees nothing


async def test_a_keeper_that_was_not_started_has_no_lease(engine: AsyncEngine) -> None:
    with pytest.raises(Fenced):
        _ = LeaseKeeper(engine, "a", "h1", TTL_S).current


async def test_a_stopped_keeper_gives_its_lease_back(engine: AsyncEngine) -> None:
    keeper = LeaseKeeper(engine, "a", "h1", LONG_S)
    await keeper.start()
    await keeper.stop()
    assert keeper.lost.is_set()
    with pytest.raises(Fenced):
        _ = keeper.current
    assert (await asyncio.wait_for(acquire(engine, "a", "h2", LONG_S), 5)).epoch == 2


async def test_a_keeper_waits_for_the_holder_before_it(engine: AsyncEngine) -> None:
    first = await _held(engine, "a", "h1", TTL_S)
    keeper = LeaseKeeper(engine, "a", "h2", LONG_S)
    held = await asyncio.wait_for(keeper.start(), 10)
    assert held.epoch == first.epoch + 1
    assert time.monotonic() >= first.deadline - 0.05
    await keeper.stop()


async def test_a_keeper_whose_database_is_gone_gives_up_when_its_time_runs_out(
    engine: AsyncEngine, database_url: str, state_dir: Path
) -> None:
    keeper = LeaseKeeper(engine, "a", "h1", TTL_S)
    held = await keeper.start()
    database = database_url.partition("?")[0].rpartition("/")[2]
    admin = open_engine(embedded_postgres_url(state_dir), "tests", pool_size=1)
    async with admin.begin() as connection:
        await connection.execute(text(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false"))
        await connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": database}
        )
    await admin.dispose()
    await asyncio.wait_for(keeper.lost.wait(), 15)
    assert time.monotonic() > held.deadline
    with pytest.raises(Fenced):
        _ = keeper.current
