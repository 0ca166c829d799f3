"""Order trees → SQL, and where a page starts in an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, FromClause, Text, and_, case, cast, column, false, func, literal, or_
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import DOUBLE_PRECISION, BigInteger

from mlplat.db.tables import run
from mlplat.metrics.ranking import SEPARATOR
from mlplat.tracking.fields import Entity, Field
from mlplat.tracking.paging import Kind, SortValue
from mlplat.tracking.search import OrderBy
from mlplat.tracking.search_tables import Tables, Term


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
            nullable = named.key in tables.nullable
            for part in tables.ordered.get(named.key) or [tables.attributes[named.key]]:
                compiled.terms.append(Term(part, order.ascending, _kind(named), nullable))
        else:
            pairs = tables.pairs[named.entity].alias(f"pair_{number}")
            mine = [pairs.c[column.name] == column for column in tables.owner(named.entity)]
            compiled.joins.append((pairs, and_(*mine, pairs.c.key == named.key)))
            compiled.terms.append(Term(pairs.c.value, order.ascending, Kind.TEXT, nullable=True))
    compiled.terms.extend(tables.ties)
    return compiled


def _kind(named: Field) -> Kind:
    if named.key.endswith(("_time", "_timestamp")):
        return Kind.TIME
    return Kind.NUMBER if named.is_numeric or named.key in {"experiment_id", "semantic_version"} else Kind.TEXT


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
