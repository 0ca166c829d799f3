"""Run search across both stores.

Metrics live in ClickHouse, everything else in Postgres; neither can answer alone. A search takes one of two
plans. In both a page costs the same wherever it is: it starts after the sort values of the last row before it.

**Direct**: the order's first key is in Postgres, which walks the runs in order and stops at the end of the page.
With metric tests that must hold together, see ``metric_walk``. Of every other metric test ClickHouse is asked for all
runs that pass: it answers with one text of ids, which Postgres takes as a set.

**Driven**: the order's first key is a metric. ClickHouse filters and orders, and hands over slices of candidates,
each complete with the ties of its last value; Postgres drops those that are deleted, moved or do not pass the
rest of the filter, breaks the ties and sorts. Slices grow until the page is full. When the first slice does not
fill it, Postgres is asked whether only a few runs can pass at all: then these are the one slice that is left.
Runs without the metric come last: they are found by the direct plan, with the runs that have it left out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, FromClause, Row, and_, not_, select, true

from mlplat.db.tables import run
from mlplat.metrics import queries, ranking
from mlplat.tracking.fields import Entity, Field
from mlplat.tracking.filters import FilterCompiler, MetricRuns, among, visible
from mlplat.tracking.metric_walk import MetricReader, ask, runs_of_comparisons, split_tests, walk
from mlplat.tracking.model import Run, ViewType
from mlplat.tracking.orders import MetricValues, Order, compile_order
from mlplat.tracking.paging import Kind, SortValue, decode_token, digest, encode_token
from mlplat.tracking.runs import RunStore
from mlplat.tracking.search import OrderBy, comparisons, parse_filter, parse_orders
from mlplat.tracking.search_tables import RUNS

#: The first slice of a driven search is at least this long, each later one longer by the factor.
FIRST_SLICE = 256
SLICE_GROWTH = 16
#: Up to so many candidates are looked up one by one.
MAX_PROBED = 5_000
#: Up to so many runs a direct search lets the metric store test by name; to name more takes longer than to test all.
MAX_TESTED = 512
#: So many runs are few enough to be named in one statement to the metric store.
FEW = 2_000
#: Ids travel in the request line of a ClickHouse server, which is at most 1 MiB long.
RUNS_PER_READ = 2_000
#: Rank of a run without the metric: after numbers (0) and NaN (1).
MISSING = 2


class MetricPoint(msgspec.Struct, frozen=True):
    """The last value of one metric of one run."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True)
class FoundRun:
    """A run with its last metric values."""

    run: Run
    metrics: list[MetricPoint]


@dataclass(frozen=True)
class RunPage:
    """Some of the found runs, and the token of the next page, if there may be one."""

    runs: list[FoundRun]
    next_token: str | None = None


async def with_metrics(reader: MetricReader, runs: Sequence[Run]) -> list[FoundRun]:
    """Adds the last value of every metric."""
    points = await _last_points(reader, [run.run_id for run in runs])
    return [FoundRun(run, points[run.run_id]) for run in runs]


async def _last_points(reader: MetricReader, run_ids: Sequence[str]) -> dict[str, list[MetricPoint]]:
    """One query for all the runs of a usual page."""
    points: dict[str, list[MetricPoint]] = {run_id: [] for run_id in run_ids}
    for first in range(0, len(run_ids), RUNS_PER_READ):
        table = await reader.query(queries.latest(run_ids[first : first + RUNS_PER_READ]))
        columns = (table[name].to_pylist() for name in ("run_id", "key", "value", "timestamp", "step"))
        for run_id, key, value, timestamp, step in zip(*columns, strict=True):
            points[run_id].append(MetricPoint(key, value, timestamp, step))
    return points


async def search_runs(
    store: RunStore,
    reader: MetricReader,
    experiment_ids: Sequence[int],
    filter_text: str,
    order_texts: Sequence[str],
    view: ViewType,
    limit: int,
    page_token: str | None = None,
) -> RunPage:
    """A page of the experiments' runs that satisfy the filter, ordered, with metrics.

    Raises:
        InvalidInput: the filter or an order is malformed, or the token belongs to another search.
    """
    inside = sorted(set(experiment_ids))
    search = _Search(store, reader, inside, filter_text, order_texts, view)
    query = digest("runs", inside, filter_text, list(order_texts), view)
    cursor = decode_token(page_token, query, search.kinds) if page_token else None
    if not inside:
        return RunPage([])
    found = await search.page(cursor, limit + 1)
    run_ids = [hit.run_id for hit in found[:limit]]
    runs, points = await asyncio.gather(store.load(run_ids), _last_points(reader, run_ids))
    token = encode_token(query, found[limit - 1].values) if len(found) > limit else None
    return RunPage([FoundRun(run, points[run.run_id]) for run in runs], token)


@dataclass(frozen=True)
class _Hit:
    run_id: str
    values: list[SortValue]


@dataclass(frozen=True)
class _Slice:
    """Candidates of a driven search, and the last metric value among them."""

    values: MetricValues
    found: int
    last: float


class _Search:
    def __init__(
        self,
        store: RunStore,
        reader: MetricReader,
        experiment_ids: list[int],
        filter_text: str,
        order_texts: Sequence[str],
        view: ViewType,
    ) -> None:
        self._store = store
        self._reader = reader
        self._experiment_ids = experiment_ids
        self._visible = visible(experiment_ids, view)
        self._orders = parse_orders(order_texts)
        self._tests, self._rest = split_tests(parse_filter(filter_text))
        self._condition(dict.fromkeys(comparisons(self._rest), ""))  # refuses bad times before anything is asked

    @property
    def kinds(self) -> list[Kind]:
        """What a page token of this search holds."""
        nothing = MetricValues("", "", "")
        return compile_order(self._orders, RUNS, {order.field: nothing for order in self._orders}).kinds

    def _condition(self, metric_runs: MetricRuns, *, probe: bool = False) -> ColumnElement[bool]:
        """What is left of the filter without the metric tests that must hold together."""
        return FilterCompiler(RUNS, metric_runs, probe=probe).compile(self._rest)

    async def page(self, cursor: list[SortValue] | None, limit: int) -> list[_Hit]:
        self._metric_runs = await runs_of_comparisons(self._reader, self._experiment_ids, self._rest)
        if not self._orders or self._orders[0].field.entity is not Entity.METRIC:
            return await self._direct(self._orders, cursor, limit, true())
        hits = []
        if cursor is None or cursor[0] != MISSING:
            hits = await self._driven(cursor, limit)
        first = self._orders[0].field
        if len(hits) < limit and all(test.key != first.key for test in self._tests):
            hits += await self._without(first, cursor, limit - len(hits))
        return hits

    async def _driven(self, cursor: list[SortValue] | None, limit: int) -> list[_Hit]:
        first, others = self._orders[0], await self._values(self._orders[1:])
        hits: list[_Hit] = []
        size, few = max(FIRST_SLICE, 2 * limit), None
        start = None if cursor is None else (_number(cursor[:2]), False)
        while True:
            candidates = await self._slice(first, size, start, few)
            if candidates.found:
                order = compile_order(self._orders, RUNS, others | {first.field: candidates.values})
                condition = self._condition(self._metric_runs, probe=candidates.found <= MAX_PROBED)
                hits += await self._select(order, condition, cursor, limit - len(hits), inner=True)
            if len(hits) >= limit or candidates.found < size:
                return hits
            if size == max(FIRST_SLICE, 2 * limit):
                few = await self._few()
            start, size = (candidates.last, True), size * SLICE_GROWTH

    async def _few(self) -> list[str] | None:
        """The runs that Postgres' part of the filter passes, if there are only a few."""
        condition = self._condition(self._metric_runs)
        rows = await self._store.select(select(run.c.run_id).where(self._visible, condition).limit(FEW + 1))
        return [row.run_id for row in rows] if len(rows) <= FEW else None

    async def _slice(
        self, order: OrderBy, size: int, start: tuple[float, bool] | None, run_ids: list[str] | None
    ) -> _Slice:
        statement = ranking.ordered(
            self._experiment_ids, order.field.key, order.field.aggregate, order.ascending, self._tests, size, start,
            run_ids,
        )  # fmt: skip
        row = await ask(self._reader, statement)
        return _Slice(_values_of(row), row["found"], row["last"])

    async def _without(self, named: Field, cursor: list[SortValue] | None, limit: int) -> list[_Hit]:
        """Runs that have no value of a metric, in the order's other keys."""
        having = await ask(self._reader, ranking.values(self._experiment_ids, named.key, named.aggregate))
        rest = None if cursor is None or cursor[0] != MISSING else cursor[2:]
        hits = await self._direct(self._orders[1:], rest, limit, not_(among(having["run_ids"])))
        return [_Hit(hit.run_id, [MISSING, None, *hit.values]) for hit in hits]

    async def _direct(
        self, orders: Sequence[OrderBy], cursor: list[SortValue] | None, limit: int, condition: ColumnElement[bool]
    ) -> list[_Hit]:
        order = compile_order(orders, RUNS, await self._values(orders))
        condition = and_(condition, self._condition(self._metric_runs))
        if not self._tests:
            return await self._select(order, condition, cursor, limit)

        async def rows(cursor: list[SortValue] | None, limit: int, passing: str | None = None) -> list[_Hit]:
            inside = condition if passing is None else and_(condition, among(passing))
            return await self._select(order, inside, cursor, limit)

        return await walk(self._reader, rows, self._experiment_ids, self._tests, cursor, limit, MAX_TESTED)

    async def _select(
        self,
        order: Order,
        condition: ColumnElement[bool],
        cursor: list[SortValue] | None,
        limit: int,
        *,
        inner: bool = False,
    ) -> list[_Hit]:
        """``inner``: only runs that have the first join's row."""
        source: FromClause = run
        for number, (table, on) in enumerate(order.joins):
            source = source.join(table, on, isouter=number > 0 or not inner)
        query = select(run.c.run_id, *order.labelled()).select_from(source).where(self._visible, condition)
        if cursor is not None:
            query = query.where(order.after(cursor))
        rows = await self._store.select(query.order_by(*order.clauses).limit(limit))
        return [_hit(row) for row in rows]

    async def _values(self, orders: Sequence[OrderBy]) -> dict[Field, MetricValues]:
        """The values of all the metrics in an order, in all the runs."""
        wanted = [order.field for order in orders if order.field.entity is Entity.METRIC]
        statements = [ranking.values(self._experiment_ids, named.key, named.aggregate) for named in wanted]
        answers = await asyncio.gather(*(ask(self._reader, statement) for statement in statements))
        return {named: _values_of(answer) for named, answer in zip(wanted, answers, strict=True)}


def _values_of(row: dict[str, Any]) -> MetricValues:
    return MetricValues(row["run_ids"], row["in_experiments"], row["numbers"])


def _number(rank_and_value: list[SortValue]) -> float:
    rank, value = rank_and_value
    return math.nan if rank != 0 or not isinstance(value, int | float) else float(value)


def _hit(row: Row[Any]) -> _Hit:
    return _Hit(row[0], list(row[1:]))
