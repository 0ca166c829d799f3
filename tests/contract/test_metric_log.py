"""The durable log in front of the metric store."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import Lease, try_acquire
from mlplat.errors import Fenced
from mlplat.metrics.log import Group, MetricLog


async def _held(engine: AsyncEngine, shard: str = "s") -> Lease:
    held = await try_acquire(engine, shard, "holder", 60.0)
    assert held is not None
    return held


def _group(seq: int) -> Group:
    return Group(seq, seq * 10, b"body %d" % seq)


async def test_an_empty_log_starts_at_zero(engine: AsyncEngine) -> None:
    log = MetricLog(engine, "s")
    assert await log.positions() == (0, 0)
    assert await log.read_after(0, 10) == []


async def test_groups_are_read_as_they_were_appended_in_order_and_pages(engine: AsyncEngine) -> None:
    log, held = MetricLog(engine, "s"), await _held(engine)
    groups = [_group(seq) for seq in range(1, 8)]
    for group in groups:
        await log.append(held, group)
    assert await log.positions() == (7, 0)
    assert await log.read_after(0, 100) == groups
    assert await log.read_after(2, 3) == groups[2:5]
    assert await log.read_after(7, 3) == []


async def test_a_body_of_any_bytes_comes_back(engine: AsyncEngine) -> None:
    log, held = MetricLog(engine, "s"), await _held(engine)
    body = bytes(range(256)) * 5_000
    await log.append(held, Group(1, 1, body))
    assert (await log.read_after(0, 1))[0].body == body


async def test_a_number_is_taken_once(engine: AsyncEngine) -> None:
    log, held = MetricLog(engine, "s"), await _held(engine)
    answers = await asyncio.gather(
        *(log.append(held, Group(1, writer, b"%d" % writer)) for writer in range(5)), return_exceptions=True
    )
    assert sum(answer is None for answer in answers) == 1
    assert sum(isinstance(answer, IntegrityError) for answer in answers) == 4
    winner = answers.index(None)
    assert [group.points for group in await log.read_after(0, 10)] == [winner]


async def test_shards_do_not_see_one_another(engine: AsyncEngine) -> None:
    first, second = MetricLog(engine, "s"), MetricLog(engine, "t")
    held_first, held_second = await _held(engine), await _held(engine, "t")
    await first.append(held_first, _group(1))
    await second.append(held_second, _group(1))
    await second.append(held_second, _group(2))
    await second.mark_flushed(held_second, 2)
    assert await first.positions() == (1, 0)
    assert await second.positions() == (2, 2)
    assert len(await first.read_after(0, 10)) == 1


async def test_marking_drops_what_is_flushed_and_keeps_the_rest(engine: AsyncEngine) -> None:
    log, held = MetricLog(engine, "s"), await _held(engine)
    for seq in range(1, 6):
        await log.append(held, _group(seq))
    await log.mark_flushed(held, 3)
    assert await log.positions() == (5, 3)
    assert [group.seq for group in await log.read_after(0, 10)] == [4, 5]
    await log.mark_flushed(held, 5)
    assert await log.positions() == (5, 5)
    assert await log.read_after(0, 10) == []


async def test_numbers_go_on_after_everything_was_flushed(engine: AsyncEngine) -> None:
    log, held = MetricLog(engine, "s"), await _held(engine)
    await log.append(held, _group(1))
    await log.mark_flushed(held, 1)
    assert (await MetricLog(engine, "s").positions())[0] == 1
    await log.append(held, _group(2))
    assert await log.positions() == (2, 1)


async def test_an_old_epoch_appends_nothing(engine: AsyncEngine) -> None:
    log, old = MetricLog(engine, "s"), await _held(engine)
    await log.append(old, _group(1))
    new = await _held(engine)
    with pytest.raises(Fenced, match="epoch 1 is over"):
        await log.append(old, _group(2))
    assert await log.positions() == (1, 0)
    await log.append(new, _group(2))
    assert await log.positions() == (2, 0)


async def test_an_old_epoch_drops_nothing(engine: AsyncEngine) -> None:
    log, old = MetricLog(engine, "s"), await _held(engine)
    await log.append(old, _group(1))
    await _held(engine)
    with pytest.raises(Fenced):
        await log.mark_flushed(old, 1)
    assert await log.positions() == (1, 0)
    assert await log.read_after(0, 10) == [_group(1)]


async def test_a_lease_of_another_name_is_no_licence(engine: AsyncEngine) -> None:
    other = await _held(engine, "other")
    gone = Lease("nobody", "h", 1, 60.0, other.deadline)
    with pytest.raises(Fenced):
        await MetricLog(engine, "s").append(gone, _group(1))
    assert await MetricLog(engine, "s").positions() == (0, 0)
