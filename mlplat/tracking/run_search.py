"""Run search across both stores: metric predicates are asked of the metric store, the rest of Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from mlplat.metrics import queries
from mlplat.metrics.queries import Statement
from mlplat.tracking.filters import compile_filter, compile_order, visible
from mlplat.tracking.model import Run, ViewType
from mlplat.tracking.runs import RunStore
from mlplat.tracking.search import Comparison, Entity, comparisons, parse_filter, parse_order


class MetricReader(Protocol):
    """Reads of the metric store that see every acknowledged point."""

    async def query(self, statement: Statement) -> pa.Table:
        """The statement's rows."""
        ...


@dataclass(frozen=True)
class MetricPoint:
    """The last value of one metric of one run."""

    key: str
    value: float
    step: int
    timestamp: int


@dataclass(frozen=True)
class FoundRun:
    """A run with its last metric values."""

    run: Run
    metrics: list[MetricPoint]


async def with_metrics(reader: MetricReader, runs: Sequence[Run]) -> list[FoundRun]:
    """Adds the last value of every metric; one query for all runs."""
    if not runs:
        return []
    experiment_ids = sorted({run.experiment_id for run in runs})
    table = await reader.query(queries.latest(experiment_ids, [run.run_id for run in runs]))
    points: dict[str, list[MetricPoint]] = {run.run_id: [] for run in runs}
    for row in table.to_pylist():
        points[row["run_id"]].append(MetricPoint(row["key"], row["value"], row["step"], row["timestamp"]))
    return [FoundRun(run, points[run.run_id]) for run in runs]


async def search_runs(
    store: RunStore,
    reader: MetricReader,
    experiment_ids: Sequence[int],
    filter_text: str,
    order_texts: Sequence[str],
    view: ViewType,
    limit: int,
    offset: int,
) -> list[FoundRun]:
    """Runs of the experiments that satisfy the filter, ordered, with metrics.

    Raises:
        InvalidInput: the filter or an order is malformed.
    """
    predicate = parse_filter(filter_text)
    orders = [parse_order(text) for text in order_texts]
    if not experiment_ids:
        return []
    metric_comparisons = {c for c in comparisons(predicate) if c.field.entity is Entity.METRIC}
    order_keys = {order.field.key for order in orders if order.field.entity is Entity.METRIC}
    metric_runs, metric_values = await asyncio.gather(
        _matching_runs(reader, experiment_ids, metric_comparisons), _last_values(reader, experiment_ids, order_keys)
    )
    condition = visible(experiment_ids, view) & compile_filter(predicate, metric_runs)
    runs = await store.search(condition, compile_order(orders, metric_values), limit, offset)
    return await with_metrics(reader, runs)


async def _matching_runs(
    reader: MetricReader, experiment_ids: Sequence[int], wanted: set[Comparison]
) -> dict[Comparison, list[str]]:
    found: dict[Comparison, list[str]] = {}
    for comparison in wanted:
        assert isinstance(comparison.value, float)
        table = await reader.query(
            queries.runs_where(experiment_ids, comparison.field.key, comparison.comparator, comparison.value)
        )
        found[comparison] = table["run_id"].to_pylist()
    return found


async def _last_values(
    reader: MetricReader, experiment_ids: Sequence[int], keys: set[str]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for key in keys:
        table = await reader.query(queries.last_values(experiment_ids, key))
        found[key] = dict(zip(table["run_id"].to_pylist(), table["value"].to_pylist(), strict=True))
    return found
