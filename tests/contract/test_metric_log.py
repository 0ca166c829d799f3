"""The durable log in front of the metric store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import Lease, try_acquire
from mlplat.errors import Fenced, InvalidInput, NotFound
from mlplat.metrics.log import Group, MetricLog, ends_slot
from mlplat.tracking.model import RunUpdate
from mlplat.tracking.runs import RunStore, write_update
from tests.contract.chdb import new_run


async def _held(engine: AsyncEngine, shard: str = "s") -> Lease:
    held = await try_acquire(engine, shard, "holder", 60.0)
    assert held is not None
    return held


_OPENED: list[MetricLog] = []


@pytest.fixture(autouse=True)
async def _disconnect(engine: AsyncEngine) -> AsyncIterator[None]:
    yield
    while _OPENED:
        await _OPENED.pop().disconnect()


def _open(engine: AsyncEngine, shard: str = "s") -> MetricLog:
    _OPENED.append(MetricLog(engine, shard))
    return _OPENED[-1]


async def _log(engine: AsyncEngine, shard: str = "s") -> MetricLog:
    log = _open(engine, shard)
    await log.prepare()
    return log


def _group(seq: int) -> Group:
    return Group(seq, seq * 10, b"body %d" % seq)


async def test_an_empty_log_starts_at_zero(engine: AsyncEngine) -> None:
    log = await _log(engine)
    assert await log.positions() == (0, 0)
    assert await log.read_after(0, 10) == []


async def test_groups_are_read_as_they_were_appended_in_order_and_pages(engine: AsyncEngine) -> None:
    log, held = await _log(engine), await _held(engine)
    groups = [_group(seq) for seq in range(1, 8)]
    for group in groups:
        await log.append(held, group, [])
    assert await log.positions() == (7, 0)
    assert await log.read_after(0, 100) == groups
    assert await log.read_after(2, 3) == groups[2:5]
    assert await log.read_after(7, 3) == []
    assert await log.read_after(2, 100, max_points=71) == groups[2:5], "30 and 40 points, and those that follow 70"
    assert await log.read_after(2, 100, max_points=70) == groups[2:4]
    assert await log.read_after(2, 100, max_points=1) == groups[2:3], "one at least"


async def test_a_body_of_any_bytes_comes_back(engine: AsyncEngine) -> None:
    log, held = await _log(engine), await _held(engine)
    body = bytes(range(256)) * 5_000
    await log.append(held, Group(1, 1, body), [])
    assert (await log.read_after(0, 1))[0].body == body


async def test_a_number_is_taken_once(engine: AsyncEngine) -> None:
    log, held = await _log(engine), await _held(engine)
    answers = await asyncio.gather(
        *(_open(engine).append(held, Group(1, writer, b"%d" % writer), []) for writer in range(5)),
        return_exceptions=True,
    )
    assert sum(answer is True for answer in answers) == 1
    assert sum(isinstance(answer, IntegrityError) for answer in answers) == 4
    winner = answers.index(True)
    assert [group.points for group in await log.read_after(0, 10)] == [winner]


async def test_only_runs_that_may_be_written_to_get_points(engine: AsyncEngine) -> None:
    log, held = await _log(engine), await _held(engine)
    alive, dead = await new_run(engine), await new_run(engine)
    await RunStore(engine).set_deleted(dead, True)
    assert await log.append(held, _group(1), [alive])
    for refused in ([dead], [alive, dead], ["nobody"], [alive, "nobody"]):
        assert not await log.append(held, _group(2), refused)
    assert await log.positions() == (1, 0)
    refusals = await log.refusals([alive, dead, "nobody"])
    assert {run_id: type(error) for run_id, error in refusals.items()} == {dead: InvalidInput, "nobody": NotFound}
    assert await log.experiments_of([alive, dead, "nobody"]) == {alive: 1, dead: 1}


async def test_a_group_and_what_belongs_to_it_are_one_transaction(engine: AsyncEngine) -> None:
    log, held, run_id = await _log(engine), await _held(engine), await new_run(engine)
    write = partial(write_update, new=RunUpdate(run_id, {"lr": "0.1"}, {"t": "1"}))
    assert await log.append_with(held, _group(1), write)
    change = partial(write_update, new=RunUpdate(run_id, {"other": "2", "lr": "0.2"}, {"t": "2"}))
    with pytest.raises(InvalidInput, match="Changing param values"):
        await log.append_with(held, _group(2), change)
    assert await log.positions() == (1, 0)
    stored = await RunStore(engine).get(run_id)
    assert (stored.params, stored.tags) == ({"lr": "0.1"}, {"t": "1"})
    await _held(engine)
    with pytest.raises(Fenced):
        await log.append_with(held, _group(2), write)


async def test_shards_do_not_see_one_another(engine: AsyncEngine) -> None:
    first, second = await _log(engine), await _log(engine, "t")
    held_first, held_second = await _held(engine), await _held(engine, "t")
    await first.append(held_first, _group(1), [])
    await second.append(held_second, _group(1), [])
    await second.append(held_second, _group(2), [])
    await second.mark_flushed(held_second, 2)
    assert await first.positions() == (1, 0)
    assert await second.positions() == (2, 2)
    assert len(await first.read_after(0, 10)) == 1


async def test_partitions_of_flushed_groups_are_emptied_and_others_are_kept(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlplat.metrics.log.GROUPS_PER_SLOT", 4)
    log, held = await _log(engine), await _held(engine)
    for seq in range(1, 7):  # 1-3 in the first partition, 4-6 in the second
        await log.append(held, _group(seq), [])
    for flushed, left in ((2, [1, 2, 3, 4, 5, 6]), (3, [4, 5, 6]), (5, [4, 5, 6])):
        await log.mark_flushed(held, flushed)
        await log.truncate_flushed(held, flushed)
        assert [group.seq for group in await log.read_after(0, 1_000)] == left
        assert await log.positions() == (6, flushed)
    for seq in range(7, 14):  # goes around: 12 and 13 are in the first partition again
        await log.append(held, _group(seq), [])
    await log.truncate_flushed(held, 11)
    assert [group.seq for group in await log.read_after(0, 1_000)] == [12, 13]
    assert [ends_slot(*pair) for pair in ((1, 3), (3, 4), (2, 9), (4, 7))] == [False, True, True, False]


async def test_what_is_flushed_is_behind_the_mark(engine: AsyncEngine) -> None:
    log, held = await _log(engine), await _held(engine)
    for seq in range(1, 6):
        await log.append(held, _group(seq), [])
    await log.mark_flushed(held, 3)
    assert await log.positions() == (5, 3)
    assert [group.seq for group in await log.read_after(3, 10)] == [4, 5]
    assert await log.size_bytes() > 0


async def test_numbers_go_on_after_everything_was_flushed(engine: AsyncEngine) -> None:
    log, held = await _log(engine), await _held(engine)
    await log.append(held, _group(1), [])
    await log.mark_flushed(held, 1)
    assert (await MetricLog(engine, "s").positions())[0] == 1
    await log.append(held, _group(2), [])
    assert await log.positions() == (2, 1)


async def test_an_old_epoch_appends_nothing(engine: AsyncEngine) -> None:
    log, old = await _log(engine), await _held(engine)
    await log.append(old, _group(1), [])
    new = await _held(engine)
    with pytest.raises(Fenced, match="epoch 1 is over"):
        await log.append(old, _group(2), [])
    assert await log.positions() == (1, 0)
    await log.append(new, _group(2), [])
    assert await log.positions() == (2, 0)


async def test_an_old_epoch_drops_nothing(engine: AsyncEngine) -> None:
    log, old = await _log(engine), await _held(engine)
    await log.append(old, _group(1), [])
    await _held(engine)
    for drop in (log.mark_flushed, log.truncate_flushed):
        with pytest.raises(Fenced):
            await drop(old, 1)
    assert await log.positions() == (1, 0)
    assert await log.read_after(0, 10) == [_group(1)]


async def test_a_lease_of_another_name_is_no_licence(engine: AsyncEngine) -> None:
    other = await _held(engine, "other")
    gone = Lease("nobody", "h", 1, 60.0, other.deadline)
    with pytest.raises(Fenced):
        await (await _log(engine)).append(gone, _group(1), [])
    assert await MetricLog(engine, "s").positions() == (0, 0)
