"""Search of models and versions, in the language of run search; their own fields are in ``filters``.

How many entries (tags, params, aliases …) pass each comparison is counted first, but no further than ``LARGE``. If few
pass one that must hold, the search starts from these, and looks each of their versions up. Else versions are walked in
their order, on an index, until the page is full, which is soon: many pass. Sets that are large are not gathered for
that, but looked into for each version that the walk comes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Row,
    Select,
    Subquery,
    and_,
    func,
    select,
    true,
)

from mlplat.db.tables import model_version, registered_model
from mlplat.errors import InvalidInput
from mlplat.registry.filters import MODELS, NEWEST_FIRST, VERSIONS, RegistryCompiler, names_prompts
from mlplat.registry.model import ModelVersion, RegisteredModel
from mlplat.registry.store import RegistryStore
from mlplat.tracking.fields import MODEL_VERSION_FIELDS, REGISTERED_MODEL_FIELDS, Entity
from mlplat.tracking.filters import among
from mlplat.tracking.metric_walk import MetricReader, runs_of_comparisons, split_tests, walk
from mlplat.tracking.orders import Order, compile_order
from mlplat.tracking.paging import SortValue, decode_token, digest, encode_token
from mlplat.tracking.search import AllOf, Comparison, OrderBy, comparisons, parse_filter, parse_orders

#: So few are found by name sooner than in a walk over a million.
FEW = 2_000
#: Sets of entries are counted up to here.
LARGE = 20_000
#: So many comparisons of a filter are counted.
MAX_COUNTED = 16
#: Up to so many runs the metric store tests by name: their ids travel in a request line of 1 MiB at most.
MAX_TESTED = 2_000


@dataclass(frozen=True)
class ModelPage:
    """Some of the found models, and the token of the next page, if there is one."""

    models: list[RegisteredModel]
    next_token: str | None = None


@dataclass(frozen=True)
class VersionPage:
    """Some of the found versions, and the token of the next page, if there is one."""

    versions: list[ModelVersion]
    next_token: str | None = None


async def search_models(
    store: RegistryStore, filter_text: str, order_texts: Sequence[str], limit: int, page_token: str | None = None
) -> ModelPage:
    """A page of the models that satisfy the filter, ordered, then by name.

    Raises:
        InvalidInput: the filter or an order is malformed, or the token belongs to another search.
    """
    predicate = parse_filter(filter_text, REGISTERED_MODEL_FIELDS)
    order = compile_order(parse_orders(order_texts, REGISTERED_MODEL_FIELDS), MODELS)
    compiler = RegistryCompiler(MODELS)
    condition = compiler.compile(predicate)
    if not names_prompts(predicate):
        condition = and_(condition, compiler.is_no_prompt())
    query = select(registered_model.c.name, *order.labelled()).select_from(_joined(registered_model, order))
    searched = digest("models", filter_text, list(order_texts))
    if page_token:
        condition = and_(condition, order.after(decode_token(page_token, searched, order.kinds)))
    rows = await store.select(query.where(condition).order_by(*order.clauses).limit(limit + 1))
    models = await store.load_models([row.name for row in rows[:limit]])
    return ModelPage(models, encode_token(searched, rows[limit - 1][1:]) if len(rows) > limit else None)


async def search_versions(
    store: RegistryStore,
    reader: MetricReader,
    filter_text: str,
    order_texts: Sequence[str],
    limit: int,
    page_token: str | None = None,
) -> VersionPage:
    """A page of the versions that satisfy the filter, ordered (by default newest first), then by name and number.

    Raises:
        InvalidInput: the filter or an order is malformed, or the token belongs to another search.
    """
    search = _VersionSearch(store, reader, filter_text, order_texts)
    searched = digest("versions", filter_text, list(order_texts))
    cursor = decode_token(page_token, searched, search.order.kinds) if page_token else None
    found = await search.page(cursor, limit + 1)
    versions = await store.load_versions([(hit.name, hit.version) for hit in found[:limit]])
    return VersionPage(versions, encode_token(searched, found[limit - 1].values) if len(found) > limit else None)


@dataclass(frozen=True)
class _Hit:
    name: str
    version: int
    run_id: str
    values: list[SortValue]


class _VersionSearch:
    def __init__(
        self, store: RegistryStore, reader: MetricReader, filter_text: str, order_texts: Sequence[str]
    ) -> None:
        self._store = store
        self._reader = reader
        predicate = parse_filter(filter_text, MODEL_VERSION_FIELDS)
        self._hides_prompts = not names_prompts(predicate)
        self._tests, self._rest = split_tests(predicate)
        self.order = compile_order(_version_orders(order_texts), VERSIONS)
        unknown = dict.fromkeys(comparisons(self._rest), "")
        RegistryCompiler(VERSIONS, unknown).compile(self._rest)  # refuses bad values before anything is asked

    async def page(self, cursor: list[SortValue] | None, limit: int) -> list[_Hit]:
        metric_runs = await runs_of_comparisons(self._reader, None, self._rest)
        sizes = await self._sizes()
        compiler = RegistryCompiler(VERSIONS, metric_runs, {part for part, size in sizes.items() if size > LARGE})
        start = self._start(sizes)
        condition = compiler.compile(AllOf(tuple(part for part in self._rest.operands if part != start)))
        if self._hides_prompts:
            condition = and_(condition, compiler.is_no_prompt())
        if self._tests:
            condition = and_(condition, model_version.c.run_id.is_not(None))

        async def rows(cursor: list[SortValue] | None, limit: int, passing: str | None = None) -> list[_Hit]:
            inside = condition if passing is None else and_(condition, among(passing, model_version.c.run_id))
            return await self._select(start, inside, cursor, limit)

        if not self._tests:
            return await rows(cursor, limit)
        return await walk(self._reader, rows, None, self._tests, cursor, limit, MAX_TESTED)

    async def _sizes(self) -> dict[Comparison, int]:
        """How many entries pass comparisons of the filter; more than ``LARGE`` are not told apart."""
        compiler = RegistryCompiler(VERSIONS)
        wanted = [part for part in dict.fromkeys(comparisons(self._rest)) if compiler.is_countable(part)][:MAX_COUNTED]
        if not wanted:
            return {}
        counts = []
        for part in wanted:
            some = compiler.entries(part).query.limit(LARGE + 1).subquery()
            counts.append(select(func.count()).select_from(some).scalar_subquery())
        [row] = await self._store.select(select(*counts))
        return dict(zip(wanted, row, strict=True))

    def _start(self, sizes: dict[Comparison, int]) -> Comparison | None:
        """What must hold and has the fewest entries, if these are few."""
        parts = [part for part in self._rest.operands if isinstance(part, Comparison) and part in sizes]
        smallest = min(parts, key=sizes.__getitem__, default=None)
        return None if smallest is None or sizes[smallest] > FEW else smallest

    async def _select(
        self, start: Comparison | None, condition: ColumnElement[bool], cursor: list[SortValue] | None, limit: int
    ) -> list[_Hit]:
        source: FromClause = model_version
        if start is not None:
            source = _started(start)
        version = model_version.c
        query: Select[Any] = select(version.name, version.version, version.run_id, *self.order.labelled())
        query = query.select_from(_joined(source, self.order)).where(condition)
        if cursor is not None:
            query = query.where(self.order.after(cursor))
        query = query.order_by(*self.order.clauses).limit(limit)
        return [_hit(row) for row in await self._store.select(query, row_by_row=start is not None)]


def _version_orders(texts: Sequence[str]) -> tuple[OrderBy, ...]:
    orders = parse_orders(texts, MODEL_VERSION_FIELDS)
    for order in orders:
        if order.field.entity is Entity.METRIC:
            raise InvalidInput(f"Invalid order_by clause '{order.field}': versions cannot be ordered by metrics.")
    return orders or (NEWEST_FIRST,)


def _started(start: Comparison) -> FromClause:
    """The versions that have entries that pass, each once."""
    found = RegistryCompiler(VERSIONS).entries(start)
    owners: Subquery = found.query.subquery()
    distinct = select(*owners.c).distinct().subquery("start")
    mine = (theirs == ours for theirs, ours in zip(distinct.c, found.owner, strict=True))
    return distinct.join(model_version, and_(true(), *mine))


def _joined(source: FromClause, order: Order) -> FromClause:
    for table, on in order.joins:
        source = source.outerjoin(table, on)
    return source


def _hit(row: Row[Any]) -> _Hit:
    return _Hit(row.name, row.version, row.run_id or "", list(row[3:]))
