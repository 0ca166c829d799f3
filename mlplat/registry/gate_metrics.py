"""The metrics that gates look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlplat.metrics import queries
from mlplat.metrics.curves import Query


async def read_last_values(query: Query, run_ids: Iterable[str]) -> Mapping[str, Mapping[str, float]]:
    """The last value of each metric of each run; a run without metrics has an empty entry.

    Raises:
        Unavailable: the metric store is away.
    """
    found: dict[str, dict[str, float]] = {run_id: {} for run_id in run_ids}
    table = await query(queries.latest(list(found)))
    rows = zip(*(table[name].to_pylist() for name in ("run_id", "key", "value")), strict=True)
    for run_id, key, value in rows:
        found[run_id][key] = value
    return found
