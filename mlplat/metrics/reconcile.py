"""Making the metric store agree with Postgres about runs that were purged or moved.

Postgres says which experiment a run belongs to, and whether there is such a run at all. The same call
may come any number of times, in any order: it looks at Postgres anew and moves or removes what differs.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlplat.metrics import changes
from mlplat.metrics.store import MetricStore


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
            stored = store.query(changes.stored_rows(run_ids))
            if any(stored["rows"].to_pylist()):
                store.change(changes.forget(run_ids))
                freed = sum(stored["bytes"].to_pylist())
        elif any(store.query(changes.stored_elsewhere(run_ids, experiment_id))["rows"].to_pylist()):
            store.change(changes.rehome(run_ids, experiment_id))
    return freed
