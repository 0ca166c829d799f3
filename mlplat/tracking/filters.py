"""Filter trees → SQL. Values are always bound, never spliced.

A test of a param or tag becomes ``id IN (SELECT …)`` over an index that has all it needs. Postgres evaluates
such a set once and probes it while it walks the rows in order: the cost is bounded by the entries of one key,
however wrong the planner's guess about the value is. For a few candidates (``probe``) it looks each one up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    CompoundSelect,
    Select,
    Table,
    Text,
    and_,
    exists,
    false,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import BigInteger

from mlplat.db.tables import dataset, number_sql, run, run_input, short_value
from mlplat.metrics.ranking import SEPARATOR
from mlplat.tracking.fields import Entity
from mlplat.tracking.model import ViewType, from_ms
from mlplat.tracking.search import AllOf, AnyOf, Comparison, Not, Predicate
from mlplat.tracking.search_tables import Tables

#: Runs that a metric comparison holds for: run ids, joined by ``SEPARATOR``.
MetricRuns = Mapping[Comparison, str]
#: Tests of an entry that mean its absence or presence.
_ABSENT, _PRESENT = "IS NULL", "IS NOT NULL"


@dataclass(frozen=True)
class Entries:
    """The entries that pass a comparison: queries, whose columns ``names`` are those of their ``owner``."""

    owner: tuple[Column[Any], ...]
    names: tuple[Column[Any], ...]
    queries: list[Select[Any]]

    @property
    def query(self) -> Select[Any] | CompoundSelect[Any]:
        """All of them; an owner may occur more than once."""
        return union_all(*self.queries) if len(self.queries) > 1 else self.queries[0]


_DATASET_COLUMNS: dict[str, ColumnElement[Any]] = {
    "name": dataset.c.name,
    "digest": dataset.c.digest,
    "context": run_input.c.tags.op("->>", return_type=Text())("mlflow.data.context"),
}


def shown(table: Table, view: ViewType) -> ColumnElement[bool]:
    """What the view shows of a table with a ``deleted`` column."""
    deleted: ColumnElement[bool] = table.c.deleted
    return {ViewType.ALL: true(), ViewType.ACTIVE_ONLY: not_(deleted), ViewType.DELETED_ONLY: deleted}[view]


def visible(experiment_ids: Sequence[int], view: ViewType) -> ColumnElement[bool]:
    """Runs of the experiments that the view shows."""
    if len(experiment_ids) == 1:  # an index has these in order
        inside: ColumnElement[bool] = run.c.experiment_id == experiment_ids[0]
    else:  # one array parameter: a list would be one parameter per id, and Postgres takes 65,535
        inside = run.c.experiment_id == func.any(literal(list(experiment_ids), ARRAY(BigInteger)))
    return and_(inside, shown(run, view))


def among(run_ids: str, column: ColumnElement[Any] = run.c.run_id) -> ColumnElement[bool]:
    """Runs whose ids are in a joined text. Postgres takes that apart far sooner than it reads an array."""
    return column == func.any(func.string_to_array(literal(run_ids, Text), SEPARATOR))


def is_short(value: Column[Any]) -> ColumnElement[bool]:
    """Exactly the predicate of the index on short values."""
    return func.length(value) <= literal_column(str(short_value(value.table.name)))


class FilterCompiler:
    """Filter trees of one kind → conditions."""

    def __init__(self, tables: Tables, metric_runs: MetricRuns | None = None, *, probe: bool = False) -> None:
        """``metric_runs`` has the runs of every metric comparison; ``probe``: there are few candidates."""
        self._tables = tables
        self._metric_runs = {} if metric_runs is None else metric_runs
        self._probe = probe

    def compile(self, predicate: Predicate) -> ColumnElement[bool]:
        """The condition of a tree.

        Raises:
            InvalidInput: a time that is none.
        """
        match predicate:
            case AllOf(operands):
                return and_(true(), *map(self.compile, operands))
            case AnyOf(operands):
                return or_(false(), *map(self.compile, operands))
            case Not(operand):
                return not_(self.compile(operand))
            case Comparison():
                return self.compare(predicate)

    def compare(self, comparison: Comparison) -> ColumnElement[bool]:
        """The condition of one comparison."""
        named, tables = comparison.field, self._tables
        if named.entity is Entity.METRIC:
            if tables.run is None:
                return among(self._metric_runs[comparison])
            return and_(tables.run.is_not(None), among(self._metric_runs[comparison], tables.run))
        if not self.is_of_entries(comparison):
            return TESTS[comparison.comparator](tables.attributes[named.key], bound(comparison))
        if comparison.comparator == _ABSENT:
            return not_(self._has(Comparison(named, _PRESENT, None)))
        return self._has(comparison)

    def is_of_entries(self, comparison: Comparison) -> bool:
        """Whether it asks for an entry that passes, of which a row has any number."""
        named = comparison.field
        if named.entity is Entity.ATTRIBUTE:
            return named.key in self._tables.many
        return named.entity is not Entity.METRIC

    def is_probed(self, comparison: Comparison) -> bool:
        """Whether its entries are looked up row by row, rather than all at once."""
        return self._probe

    def lookup(self, query: Select[Any]) -> Select[Any]:
        """The query of a row's own entries, as it is to be planned."""
        return query

    def entries(self, comparison: Comparison) -> Entries:
        """The entries (params, tags, datasets, one of many) that pass."""
        owner = self._tables.owner(comparison.field.entity)
        if comparison.field.entity is Entity.DATASET:
            return Entries(owner, (run_input.c.run_id,), [_datasets(comparison)])
        if comparison.field.entity is Entity.ATTRIBUTE:
            value = self._tables.many[comparison.field.key]
            names = tuple(value.table.c[column.name] for column in owner)
            return Entries(owner, names, [select(*names).where(TESTS[comparison.comparator](value, comparison.value))])
        pairs = self._tables.pairs[comparison.field.entity]
        names = tuple(pairs.c[column.name] for column in owner)
        return Entries(owner, names, [select(*names).where(each) for each in entry_conditions(pairs, comparison)])

    def _has(self, comparison: Comparison) -> ColumnElement[bool]:
        found = self.entries(comparison)
        if self.is_probed(comparison):
            mine = and_(*(ours == theirs for ours, theirs in zip(found.names, found.owner, strict=True)))
            bases = [column.table for column in found.owner]
            return or_(*(once(exists(self.lookup(query.where(mine)).correlate(*bases))) for query in found.queries))
        one = found.owner[0] if len(found.owner) == 1 else tuple_(*found.owner)
        return once(one.in_(found.query))


def once(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """A test of a set, made once.

    Written plainly, the planner turns it into a join and trusts its guess about how many match.
    """
    return condition.op("IS", is_comparison=True)(true())


def _datasets(comparison: Comparison) -> Select[Any]:
    joined = run_input.join(dataset, dataset.c.dataset_id == run_input.c.dataset_id)
    value = _DATASET_COLUMNS[comparison.field.key]
    return select(run_input.c.run_id).select_from(joined).where(TESTS[comparison.comparator](value, comparison.value))


def entry_conditions(pairs: Table, comparison: Comparison) -> list[ColumnElement[bool]]:
    """Conditions of which an entry passes one, each for one index."""
    key = pairs.c.key == comparison.field.key
    if comparison.is_numeric:
        number = pairs.c.number if "number" in pairs.c else literal_column(number_sql(f"{pairs.name}.value"))
        return [and_(key, number.is_not(None), TESTS[comparison.comparator](number, comparison.value))]
    value: Column[Any] = pairs.c.value
    test = true() if comparison.value is None else TESTS[comparison.comparator](value, comparison.value)
    conditions = [and_(key, is_short(value), test)]
    wanted = comparison.value if isinstance(comparison.value, tuple) else (comparison.value,)
    only_short = all(isinstance(text, str) and len(text) <= short_value(pairs.name) for text in wanted)
    if comparison.comparator not in {"=", "IN"} or not only_short:
        conditions.append(and_(key, not_(is_short(value)), test))
    return conditions


def bound(comparison: Comparison) -> float | str | tuple[float | datetime, ...] | tuple[str, ...] | datetime | None:
    """A comparison's value as its column has it: times are no numbers there."""
    value = comparison.value
    if comparison.field.key.endswith(("_time", "_timestamp")):
        if isinstance(value, tuple):
            return tuple(from_ms(int(item)) for item in value)
        if isinstance(value, float):
            return from_ms(int(value))
    return value


#: What each comparator of the grammar does to a column and a bound value.
TESTS: dict[str, Callable[[ColumnElement[Any], Any], ColumnElement[bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "LIKE": lambda left, right: left.like(right),
    "ILIKE": lambda left, right: left.ilike(right),
    "IN": lambda left, right: left.in_(right),
    "NOT IN": lambda left, right: left.not_in(right),
    "IS NULL": lambda left, _none: left.is_(None),
    "IS NOT NULL": lambda left, _none: left.is_not(None),
}
