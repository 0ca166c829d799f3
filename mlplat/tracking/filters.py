"""Filter and order trees → SQL. Values are always bound, never spliced.

A test of a param or tag becomes ``id IN (SELECT …)`` over an index that has all it needs. Postgres evaluates
such a set once and probes it while it walks the rows in order: the cost is bounded by the entries of one key,
however wrong the planner's guess about the value is. For a few candidates (``probe``) it looks each one up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    FromClause,
    Select,
    Table,
    Text,
    and_,
    case,
    cast,
    column,
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
from sqlalchemy.types import DOUBLE_PRECISION, BigInteger

from mlplat.db.tables import (
    SHORT_VALUE,
    dataset,
    experiment,
    experiment_tag,
    number_sql,
    run,
    run_input,
    run_param,
    run_tag,
)
from mlplat.metrics.queries import SEPARATOR
from mlplat.tracking.fields import Entity, Field
from mlplat.tracking.model import ViewType, from_ms
from mlplat.tracking.paging import Kind, SortValue
from mlplat.tracking.search import AllOf, AnyOf, Comparison, Not, OrderBy, Predicate

#: Runs that a metric comparison holds for: run ids, joined by ``SEPARATOR``.
MetricRuns = Mapping[Comparison, str]


@dataclass(frozen=True)
class Term:
    """One key of an order: missing values come last in both directions."""

    value: ColumnElement[Any]
    ascending: bool
    kind: Kind
    nullable: bool = False

    @property
    def clause(self) -> ColumnElement[Any]:
        """The ORDER BY term."""
        directed = self.value.asc() if self.ascending else self.value.desc()
        return directed.nulls_last() if self.nullable else directed


@dataclass(frozen=True)
class Tables:
    """Where the fields of one searchable kind live.

    Args:
        identity: the columns that name a row, which ``pairs`` have too.
        attributes: what a filter compares, by attribute.
        pairs: the tables ``(…identity, key, value)`` of params and tags.
        ties: what decides between equals, down to one row.
        ordered: what an order uses, where that is another column than a filter's.
        nullable: attributes that may be missing.
    """

    identity: tuple[Column[Any], ...]
    attributes: Mapping[str, ColumnElement[Any]]
    pairs: Mapping[Entity, Table]
    ties: tuple[Term, ...]
    ordered: Mapping[str, ColumnElement[Any]] = field(default_factory=dict)
    nullable: frozenset[str] = frozenset()


RUNS = Tables(
    identity=(run.c.run_id,),
    attributes={
        "run_id": run.c.run_id,
        "run_name": run.c.name,
        "status": run.c.status,
        "user_id": run.c.user_id,
        "artifact_uri": run.c.artifact_uri,
        "start_time": run.c.started_at,
        "end_time": run.c.ended_at,
        "duration": cast(func.extract("epoch", run.c.ended_at - run.c.started_at), DOUBLE_PRECISION),
    },
    pairs={Entity.PARAM: run_param, Entity.TAG: run_tag},
    ties=(Term(run.c.started_at, False, Kind.TIME), Term(run.c.run_id, True, Kind.TEXT)),
    nullable=frozenset({"end_time", "duration"}),
)

EXPERIMENTS = Tables(
    identity=(experiment.c.experiment_id,),
    attributes={
        "name": experiment.c.name,
        "experiment_id": cast(experiment.c.experiment_id, Text),
        # Callers see milliseconds.
        "creation_time": func.date_trunc("milliseconds", experiment.c.created_at),
        "last_update_time": func.date_trunc("milliseconds", experiment.c.updated_at),
    },
    pairs={Entity.TAG: experiment_tag},
    ties=(
        Term(experiment.c.created_at, False, Kind.TIME),
        Term(experiment.c.experiment_id, False, Kind.NUMBER),
    ),
    ordered={
        "experiment_id": experiment.c.experiment_id,
        "creation_time": experiment.c.created_at,
        "last_update_time": experiment.c.updated_at,
    },
)

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


def among(run_ids: str) -> ColumnElement[bool]:
    """Runs whose ids are in a joined text. Postgres takes that apart far sooner than it reads an array."""
    return run.c.run_id == func.any(func.string_to_array(literal(run_ids, Text), SEPARATOR))


def is_short(value: ColumnElement[Any]) -> ColumnElement[bool]:
    """Exactly the predicate of the index on short values."""
    return func.length(value) <= literal_column(str(SHORT_VALUE))


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
                return self._compare(predicate)

    def _compare(self, comparison: Comparison) -> ColumnElement[bool]:
        named = comparison.field
        if named.entity is Entity.METRIC:
            return among(self._metric_runs[comparison])
        if named.entity is Entity.ATTRIBUTE:
            return TESTS[comparison.comparator](self._tables.attributes[named.key], _bound(comparison))
        if comparison.comparator == "IS NULL":
            return not_(self._has(Comparison(named, "IS NOT NULL", None)))
        return self._has(comparison)

    def _has(self, comparison: Comparison) -> ColumnElement[bool]:
        """Whether an entry (a param, a tag, a dataset) passes."""
        if comparison.field.entity is Entity.DATASET:
            queries, names = [_datasets(comparison)], [run_input.c.run_id]
        else:
            pairs = self._tables.pairs[comparison.field.entity]
            names = [pairs.c[column.name] for column in self._tables.identity]
            queries = [select(*names).where(condition) for condition in entry_conditions(pairs, comparison)]
        if self._probe:
            mine = and_(*(ours == theirs for ours, theirs in zip(names, self._tables.identity, strict=True)))
            return or_(*(_once(exists(query.where(mine).correlate(*_froms(self._tables)))) for query in queries))
        identity = self._tables.identity
        one = identity[0] if len(identity) == 1 else tuple_(*identity)
        return _once(one.in_(union_all(*queries) if len(queries) > 1 else queries[0]))


def _froms(tables: Tables) -> list[FromClause]:
    return [column.table for column in tables.identity]


def _once(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    # Written plainly, the planner turns it into a join and trusts its guess about how many match.
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
    value: ColumnElement[Any] = pairs.c.value
    test = true() if comparison.value is None else TESTS[comparison.comparator](value, comparison.value)
    conditions = [and_(key, is_short(value), test)]
    wanted = comparison.value if isinstance(comparison.value, tuple) else (comparison.value,)
    only_short = all(isinstance(text, str) and len(text) <= SHORT_VALUE for text in wanted)
    if comparison.comparator not in {"=", "IN"} or not only_short:
        conditions.append(and_(key, not_(is_short(value)), test))
    return conditions


def _bound(comparison: Comparison) -> float | str | tuple[float | datetime, ...] | tuple[str, ...] | datetime | None:
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


@dataclass(frozen=True)
class MetricValues:
    """An aggregate of one metric in some runs; each part joined by ``SEPARATOR``."""

    run_ids: str
    in_experiments: str
    numbers: str


@dataclass(frozen=True)
class Order:
    """The terms of an order, ties included, and what has to be joined for them."""

    terms: list[Term]
    joins: list[tuple[FromClause, ColumnElement[bool]]]

    @property
    def clauses(self) -> list[ColumnElement[Any]]:
        """The ORDER BY terms."""
        return [term.clause for term in self.terms]

    @property
    def kinds(self) -> list[Kind]:
        """What the values of the terms are."""
        return [term.kind for term in self.terms]

    def labelled(self) -> list[ColumnElement[Any]]:
        """The terms' values, to be selected: the last row's are where the next page starts."""
        return [term.value.label(f"sort_{number}") for number, term in enumerate(self.terms)]

    def after(self, values: Sequence[SortValue]) -> ColumnElement[bool]:
        """Rows that come after the one with these values."""
        first = self.terms[0]
        rows = _after(list(zip(self.terms, values, strict=True)))
        if first.nullable or values[0] is None:
            return rows
        # Implied by the rest, but said so that an index can start there.
        start = first.value >= values[0] if first.ascending else first.value <= values[0]
        return and_(start, rows)


def _after(pairs: list[tuple[Term, SortValue]]) -> ColumnElement[bool]:
    if not pairs:
        return false()
    (term, value), *rest = pairs
    if value is None:
        return and_(term.value.is_(None), _after(rest))
    further = term.value > value if term.ascending else term.value < value
    if term.nullable:
        further = or_(further, term.value.is_(None))
    return or_(further, and_(term.value == value, _after(rest)))


def compile_order(
    orders: Sequence[OrderBy], tables: Tables, metric_values: Mapping[Field, MetricValues] | None = None
) -> Order:
    """The order of a search, ties included; ``metric_values`` has the values of each metric in it.

    Metrics: numbers first, then NaN, then missing, whichever the direction. Others: missing last.
    """
    compiled = Order([], [])
    for number, order in enumerate(orders):
        named = order.field
        if named.entity is Entity.METRIC:
            joined = _values_table((metric_values or {})[named], f"metric_{number}")
            here = and_(joined.c.run_id == run.c.run_id, joined.c.in_experiment == run.c.experiment_id)
            compiled.joins.append((joined, here))
            value: ColumnElement[Any] = joined.c.value
            rank = case((value.is_(None), 2), (value == literal(float("nan"), DOUBLE_PRECISION), 1), else_=0)
            compiled.terms.append(Term(rank, True, Kind.NUMBER))
            compiled.terms.append(Term(value, order.ascending, Kind.NUMBER, nullable=True))
        elif named.entity is Entity.ATTRIBUTE:
            value = tables.ordered.get(named.key, tables.attributes[named.key])
            compiled.terms.append(Term(value, order.ascending, _kind(named), named.key in tables.nullable))
        else:
            pairs = tables.pairs[named.entity].alias(f"pair_{number}")
            mine = [pairs.c[column.name] == column for column in tables.identity]
            compiled.joins.append((pairs, and_(*mine, pairs.c.key == named.key)))
            compiled.terms.append(Term(pairs.c.value, order.ascending, Kind.TEXT, nullable=True))
    compiled.terms.extend(tables.ties)
    return compiled


def _kind(named: Field) -> Kind:
    if named.key.endswith(("_time", "_timestamp")):
        return Kind.TIME
    return Kind.NUMBER if named.is_numeric or named.key == "experiment_id" else Kind.TEXT


def _values_table(values: MetricValues, name: str) -> FromClause:
    def parts(joined: str, of: Any) -> ColumnElement[Any]:
        return cast(func.string_to_array(literal(joined, Text), SEPARATOR), ARRAY(of))

    arrays = (
        parts(values.run_ids, Text),
        parts(values.in_experiments, BigInteger),
        parts(values.numbers, DOUBLE_PRECISION),
    )
    columns = column("run_id", Text), column("in_experiment", BigInteger), column("value", DOUBLE_PRECISION)
    return func.unnest(*arrays).table_valued(*columns, name=name).render_derived()
