"""The metrics of runs in a few numbers each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlplat.errors import InvalidInput
from mlplat.metrics import queries
from mlplat.metrics.curves import Query, RunOrigin

#: Series that one answer may tell of.
MAX_SUMMARIES = 200_000


@dataclass(frozen=True)
class MetricSummary:
    """A series: its last point, and the least and greatest of its numbers (None when all are NaN)."""

    key: str
    value: float
    step: int
    timestamp: int
    lowest: float | None
    highest: float | None


async def read_summaries(query: Query, runs: Sequence[RunOrigin]) -> dict[str, list[MetricSummary]]:
    """The series of each run, by key; one statement for all runs.

    Raises:
        InvalidInput: there are more than ``MAX_SUMMARIES``.
        Unavailable: the metric store is away.
    """
    found: dict[str, list[MetricSummary]] = {run.run_id: [] for run in runs}
    table = await query(queries.summaries(list(found), MAX_SUMMARIES + 1))
    if table.num_rows > MAX_SUMMARIES:
        raise InvalidInput(f"these runs have more than {MAX_SUMMARIES} metrics in all; ask for fewer runs")
    names = ("run_id", "key", "value", "step", "timestamp", "min_value", "max_value")
    for run_id, key, value, step, timestamp, lowest, highest in zip(
        *(table[name].to_pylist() for name in names), strict=True
    ):
        numbers = (lowest, highest) if lowest <= highest else (None, None)
        found[run_id].append(MetricSummary(key, value, step, timestamp, *numbers))
    return found


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
