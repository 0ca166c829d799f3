"""Making the metric store agree with Postgres about runs that were purged or moved.

Postgres says which experiment a run belongs to, and whether there is such a run at all. The same call
may come any number of times, in any order: it looks at Postgres anew and moves or removes what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import run
from mlplat.metrics import queries
from mlplat.metrics.store import MetricStore

#: Ids travel in the request line of a ClickHouse server, which is at most 1 MiB long.
MAX_RUN_IDS = 1_000


async def experiments_of(engine: AsyncEngine, run_ids: Sequence[str]) -> dict[str, int | None]:
    """The experiment of each run, None where there is no such run."""
    query = select(run.c.run_id, run.c.experiment_id).where(run.c.run_id.in_(run_ids))
    async with engine.connect() as connection:
        known = {row.run_id: row.experiment_id for row in await connection.execute(query)}
    return {run_id: known.get(run_id) for run_id in run_ids}


def apply(store: MetricStore, experiments: Mapping[str, int | None]) -> int:
    """Removes runs that have no experiment, puts the others under theirs; returns the bytes freed (an estimate).

    Blocks. Raises:
        Unavailable: the store refused or is out of reach; repeat the call.
    """
    homes: dict[int | None, list[str]] = {}
    for run_id, experiment_id in experiments.items():
        homes.setdefault(experiment_id, []).append(run_id)
    freed = 0
    for experiment_id, run_ids in homes.items():
        if experiment_id is None:
            stored = store.query(queries.stored_rows(run_ids))
            if any(stored["rows"].to_pylist()):
                store.change(queries.forget(run_ids))
                freed = sum(stored["bytes"].to_pylist())
        elif any(store.query(queries.stored_elsewhere(run_ids, experiment_id))["rows"].to_pylist()):
            store.change(queries.rehome(run_ids, experiment_id))
    return freed
