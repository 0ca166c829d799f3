"""Filter trees → SQL over the run tables. Values are always bound, never spliced.

Metric predicates are resolved before (the metric store answers them with run ids) and arrive here as
a mapping from comparison to run ids.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Table,
    and_,
    case,
    column,
    exists,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import DOUBLE_PRECISION, BigInteger, Text

from mlplat.db.tables import run, run_param, run_tag
from mlplat.tracking.model import ViewType, from_ms
from mlplat.tracking.search import AllOf, AnyOf, Comparison, Entity, Field, Not, OrderBy, Predicate

_ATTRIBUTE_COLUMNS: dict[str, ColumnElement[Any]] = {
    "run_id": run.c.run_id,
    "run_name": run.c.name,
    "status": run.c.status,
    "user_id": run.c.user_id,
    "artifact_uri": run.c.artifact_uri,
    "start_time": run.c.started_at,
    "end_time": run.c.ended_at,
}


def visible(experiment_ids: Sequence[int], view: ViewType) -> ColumnElement[bool]:
    """Runs of the experiments that the view shows."""
    # One array parameter: a list would be one parameter per id, and Postgres takes 65,535.
    inside = run.c.experiment_id == func.any(literal(list(experiment_ids), ARRAY(BigInteger)))
    return inside if view is ViewType.ALL else and_(inside, run.c.deleted == (view is ViewType.DELETED_ONLY))


def compile_filter(predicate: Predicate, metric_runs: Mapping[Comparison, Sequence[str]]) -> ColumnElement[bool]:
    """A condition on ``run``; ``metric_runs`` has the run ids of every metric comparison in the tree."""
    match predicate:
        case AllOf(operands):
            return and_(true(), *(compile_filter(operand, metric_runs) for operand in operands))
        case AnyOf(operands):
            return or_(false(), *(compile_filter(operand, metric_runs) for operand in operands))
        case Not(operand):
            return not_(compile_filter(operand, metric_runs))
        case Comparison(field, _, _):
            if field.entity is Entity.METRIC:
                return run.c.run_id == func.any(literal(list(metric_runs[predicate]), ARRAY(Text)))
            return _compare(predicate)


@dataclass(frozen=True)
class Order:
    """ORDER BY terms, and the tables that have to be outer-joined to ``run`` for them."""

    terms: list[ColumnElement[Any]] = field(default_factory=list)
    joins: list[tuple[FromClause, ColumnElement[bool]]] = field(default_factory=list)


def compile_order(orders: Sequence[OrderBy], metric_values: Mapping[str, Mapping[str, float]]) -> Order:
    """The order of a search; ``metric_values`` maps a metric's key to the last value of each run.

    Metrics: numbers first, then NaN, then missing, whichever the direction. Others: missing last.
    """
    compiled = Order()
    for number, order in enumerate(orders):
        if order.field.entity is Entity.METRIC:
            values = _values_table(metric_values[order.field.key], f"metric_{number}")
            compiled.joins.append((values, values.c.run_id == run.c.run_id))
            value: ColumnElement[Any] = values.c.value
            nan = literal(float("nan"), DOUBLE_PRECISION)
            compiled.terms.append(case((value.is_(None), 2), (value == nan, 1), else_=0))
        else:
            value = _operand(order.field)
        compiled.terms.append((value.asc() if order.ascending else value.desc()).nulls_last())
    return compiled


def _values_table(values: Mapping[str, float], name: str) -> FromClause:
    run_ids = literal(list(values), ARRAY(Text))
    numbers = literal(list(values.values()), ARRAY(DOUBLE_PRECISION))
    columns = column("run_id", Text), column("value", DOUBLE_PRECISION)
    return func.unnest(run_ids, numbers).table_valued(*columns, name=name).render_derived()


def _operand(field: Field) -> ColumnElement[Any]:
    if field.entity is Entity.ATTRIBUTE:
        return _ATTRIBUTE_COLUMNS[field.key]
    table = _table_of(field)
    return select(table.c.value).where(table.c.run_id == run.c.run_id, table.c.key == field.key).scalar_subquery()


def _table_of(field: Field) -> Table:
    return run_param if field.entity is Entity.PARAM else run_tag


def _compare(comparison: Comparison) -> ColumnElement[bool]:
    field = comparison.field
    if field.entity is Entity.ATTRIBUTE:
        return TESTS[comparison.comparator](_ATTRIBUTE_COLUMNS[field.key], _bound(comparison))
    table = _table_of(field)
    present = [table.c.run_id == run.c.run_id, table.c.key == field.key]
    if comparison.comparator == "IS NULL":
        return ~exists().where(*present)
    if comparison.comparator == "IS NOT NULL":
        return exists().where(*present)
    return exists().where(*present, TESTS[comparison.comparator](table.c.value, comparison.value))


def _bound(comparison: Comparison) -> float | str | tuple[str, ...] | datetime | None:
    if comparison.field.key in {"start_time", "end_time"} and isinstance(comparison.value, float):
        return from_ms(int(comparison.value))
    return comparison.value


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
