"""Moving runs to another experiment.

Contract: Postgres decides, in one transaction; the metric store follows before the call returns, or at
the next purge, move or start of a gateway when something dies in between. Artifacts stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import and_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import run, run_tag
from mlplat.errors import InvalidInput, NotFound
from mlplat.tracking.datasets import move_links
from mlplat.tracking.experiments import require_active_experiment
from mlplat.tracking.filters import is_short
from mlplat.tracking.metric_outbox import MetricOutbox, note
from mlplat.tracking.model import PARENT_RUN_TAG

MAX_RUNS = 10_000


class RunMover:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine, outbox: MetricOutbox) -> None:
        self._engine = engine
        self._outbox = outbox

    async def move(self, run_ids: Sequence[str], experiment_id: int, *, with_children: bool) -> list[str]:
        """Moves runs, with all their descendants if asked; all of them or none.

        Returns:
            The ids of the runs that are in the experiment now, those that were there before included.

        Raises:
            NotFound: no such run or experiment.
            InvalidInput: the experiment or a run is deleted, or these are more than ``MAX_RUNS`` runs.
            Unavailable: the metric store has not followed yet; repeat the call.
        """
        async with self._engine.begin() as connection:
            await require_active_experiment(connection, experiment_id)
            moved = sorted(set(run_ids) | (await _descendants(connection, run_ids) if with_children else set()))
            if len(moved) > MAX_RUNS:
                raise InvalidInput(f"These are {len(moved)} runs; at most {MAX_RUNS} move in one call.")
            await _check_runs(connection, moved, set(run_ids))
            await connection.execute(
                update(run)
                .where(run.c.run_id.in_(moved), run.c.experiment_id != experiment_id)
                .values(experiment_id=experiment_id, deleted_with_experiment=False)
            )
            await move_links(connection, moved, experiment_id)
            await note(connection, moved)
        await self._outbox.settle()
        return moved


async def _descendants(connection: AsyncConnection, run_ids: Sequence[str]) -> set[str]:
    """Runs below these, deleted ones included: a child follows its parent also when it is restored later."""
    # The index has short values only, and no run id is longer.
    parent, is_parent_tag = run_tag.c.value, and_(run_tag.c.key == PARENT_RUN_TAG, is_short(run_tag.c.value))
    tree = select(run_tag.c.run_id).where(is_parent_tag, parent.in_(run_ids)).cte(recursive=True)
    tree = tree.union(select(run_tag.c.run_id).where(is_parent_tag, parent == tree.c.run_id))
    return set((await connection.execute(select(tree.c.run_id))).scalars())


async def _check_runs(connection: AsyncConnection, moved: Sequence[str], named: set[str]) -> None:
    """Locks the runs in one order for all who lock several."""
    query = select(run.c.run_id, run.c.deleted, run.c.purge_started_at).where(run.c.run_id.in_(moved))
    rows = (await connection.execute(query.order_by(run.c.run_id).with_for_update())).all()
    missing = sorted(named - {row.run_id for row in rows})
    if missing:
        raise NotFound(f"Run with id={missing[0]} not found")
    for row in rows:
        if row.purge_started_at is not None:
            raise InvalidInput(f"The run {row.run_id} is being purged.")
        if row.deleted and row.run_id in named:
            raise InvalidInput(f"The run {row.run_id} is deleted; restore it first.")
