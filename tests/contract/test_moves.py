"""Moving runs: Postgres and the metric store agree on where they are, also after a crash."""

from __future__ import annotations

import asyncio

import pytest

from mlplat.errors import InvalidInput, NotFound, Unavailable
from mlplat.metrics import queries
from tests.contract.lifecycle import World


async def test_a_moved_run_is_found_by_metric_in_its_new_experiment_only(world: World) -> None:
    old, new = await world.experiment(), await world.experiment()
    moved, stays = await world.run(old), await world.run(old)
    uri = (await world.runs.get(moved)).artifact_uri
    assert await world.lifecycle.mover.move([moved], new, with_children=False) == [moved]
    assert await world.found_by_metric(old) == {stays}
    assert await world.found_by_metric(new) == {moved}
    found = await world.runs.get(moved)
    assert (found.experiment_id, found.artifact_uri) == (new, uri)
    rows = (await world.shard.query(queries.latest([moved]))).to_pylist()
    assert [(row["key"], row["value"], row["step"]) for row in rows] == [("loss", 2.0, 2)]
    await world.lifecycle.mover.move([moved], old, with_children=False)
    assert await world.found_by_metric(old) == {stays, moved}
    assert await world.found_by_metric(new) == set()


async def test_children_come_along_when_asked(world: World) -> None:
    old, new = await world.experiment(), await world.experiment()
    parent = await world.run(old, points=1)
    child = await world.run(old, parent=parent, points=1)
    grandchild = await world.run(old, parent=child, points=1)
    gone = await world.run(old, parent=parent, points=1, deleted=True)
    assert await world.lifecycle.mover.move([parent], new, with_children=False) == [parent]
    moved = await world.lifecycle.mover.move([parent], new, with_children=True)
    assert moved == sorted([parent, child, grandchild, gone])
    assert await world.found_by_metric(new) == {parent, child, grandchild, gone}


async def test_moves_that_make_no_sense_are_refused_and_change_nothing(world: World) -> None:
    old, new = await world.experiment(), await world.experiment()
    run_id, deleted = await world.run(old, points=0), await world.run(old, points=0, deleted=True)
    move = world.lifecycle.mover.move
    with pytest.raises(NotFound, match="Run with id=nobody"):
        await move([run_id, "nobody"], new, with_children=False)
    with pytest.raises(InvalidInput, match="is deleted"):
        await move([run_id, deleted], new, with_children=False)
    with pytest.raises(NotFound, match="Experiment"):
        await move([run_id], 999_999, with_children=False)
    await world.experiments.set_deleted(new, True)
    with pytest.raises(InvalidInput, match="is deleted"):
        await move([run_id], new, with_children=False)
    assert (await world.runs.get(run_id)).experiment_id == old


async def test_a_move_that_breaks_off_before_the_metric_store_is_caught_up_with(world: World) -> None:
    old, new = await world.experiment(), await world.experiment()
    run_id = await world.run(old)
    world.shard.away = Unavailable("the metric shard is restarting")
    with pytest.raises(Unavailable):
        await world.lifecycle.mover.move([run_id], new, with_children=False)
    await world.lifecycle.catch_up()  # still away: no error, the note stays
    world.shard.away = None
    await world.lifecycle.catch_up()
    assert await world.found_by_metric(new) == {run_id}
    assert await world.found_by_metric(old) == set()
    assert await world.count("metric_outbox") == 0


async def test_moves_that_cross_end_where_postgres_says(world: World) -> None:
    first, second = await world.experiment(), await world.experiment()
    runs = [await world.run(first, points=1) for _ in range(3)]
    targets = [second, first, second, first, second, second]
    moves = [
        world.lifecycle.mover.move(runs[index % 2 :], target, with_children=False)
        for index, target in enumerate(targets)
    ]
    await asyncio.gather(*moves)
    homes = {run_id: (await world.runs.get(run_id)).experiment_id for run_id in runs}
    for experiment in (first, second):
        assert await world.found_by_metric(experiment) == {run_id for run_id in runs if homes[run_id] == experiment}
    assert await world.count("metric_outbox") == 0
