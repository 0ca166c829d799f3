"""Search of logged models: filters and orders → SQL over their tables. Values are always bound, never spliced.

A metric predicate holds when any point of the model satisfies it, an order goes by the newest point; both
may be confined to datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, FromClause, and_, case, exists, false, func, literal, not_, or_, select, true
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.types import DOUBLE_PRECISION

from mlplat.db.tables import logged_model, logged_model_metric, logged_model_param, logged_model_tag
from mlplat.errors import InvalidInput
from mlplat.tracking.fields import LOGGED_MODEL_FIELDS, Aggregate, Entity
from mlplat.tracking.filters import TESTS, bound, entry_conditions
from mlplat.tracking.logged_model import LoggedModel
from mlplat.tracking.logged_models import LoggedModelStore
from mlplat.tracking.search import AllOf, AnyOf, Comparison, Not, Predicate, comparisons, parse_filter

_COLUMNS: dict[str, ColumnElement[Any]] = {
    "model_id": logged_model.c.model_id,
    "name": logged_model.c.name,
    "model_type": logged_model.c.model_type,
    "status": logged_model.c.status,
    "source_run_id": logged_model.c.source_run_id,
    "artifact_location": logged_model.c.artifact_location,
    "creation_timestamp": logged_model.c.created_at,
    "last_updated_timestamp": logged_model.c.updated_at,
}
_NAN = literal(float("nan"), DOUBLE_PRECISION)


@dataclass(frozen=True)
class DatasetRef:
    """A dataset by name, of any digest when that is None."""

    name: str
    digest: str | None = None


@dataclass(frozen=True)
class ModelOrder:
    """One key of an order: an attribute, or ``metrics.<key>``, maybe only as measured on one dataset."""

    field_name: str
    ascending: bool = True
    dataset: DatasetRef | None = None


@dataclass(frozen=True)
class ModelQuery:
    """What to search for."""

    experiment_ids: Sequence[int]
    filter: str = ""
    datasets: Sequence[DatasetRef] = field(default_factory=list)
    order_by: Sequence[ModelOrder] = field(default_factory=list)


async def search_models(store: LoggedModelStore, query: ModelQuery, limit: int, offset: int) -> list[LoggedModel]:
    """The active models of the experiments that satisfy the filter, in order, then newest first.

    Datasets confine the metric predicates; without any of those, models that were measured on one of them match.

    Raises:
        InvalidInput: the filter or an order is malformed.
    """
    predicate = parse_filter(query.filter, LOGGED_MODEL_FIELDS)
    source, terms = _compile_order(query.order_by)
    on_dataset = _on_any(query.datasets)
    conditions = [
        logged_model.c.experiment_id.in_(query.experiment_ids),
        ~logged_model.c.deleted,
        _compile(predicate, on_dataset),
    ]
    if query.datasets and not any(found.field.entity is Entity.METRIC for found in comparisons(predicate)):
        conditions.append(_has_point(on_dataset))
    if not query.experiment_ids:
        return []
    terms += [logged_model.c.created_at.desc(), logged_model.c.model_id]
    return await store.search(source, and_(*conditions), terms, limit, offset)


def _on(dataset: DatasetRef) -> ColumnElement[bool]:
    same_name = logged_model_metric.c.dataset_name == dataset.name
    if dataset.digest is None:
        return same_name
    return and_(same_name, logged_model_metric.c.dataset_digest == dataset.digest)


def _on_any(datasets: Sequence[DatasetRef]) -> ColumnElement[bool]:
    return or_(false(), *map(_on, datasets)) if datasets else true()


def _has_point(*conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(logged_model_metric.c.model_id == logged_model.c.model_id, *conditions)


def _compile(predicate: Predicate, on_dataset: ColumnElement[bool]) -> ColumnElement[bool]:
    match predicate:
        case AllOf(operands):
            return and_(true(), *(_compile(operand, on_dataset) for operand in operands))
        case AnyOf(operands):
            return or_(false(), *(_compile(operand, on_dataset) for operand in operands))
        case Not(operand):
            return not_(_compile(operand, on_dataset))
        case Comparison():
            return _compare(predicate, on_dataset)


def _compare(comparison: Comparison, on_dataset: ColumnElement[bool]) -> ColumnElement[bool]:
    key, comparator, value = comparison.field.key, comparison.comparator, comparison.value
    match comparison.field.entity:
        case Entity.ATTRIBUTE:
            column = _COLUMNS[key]
            if comparison.is_numeric:  # the wire has milliseconds, the column microseconds
                column = func.date_trunc("milliseconds", column)
            return TESTS[comparator](column, bound(comparison))
        case Entity.METRIC:
            if comparison.field.aggregate is not Aggregate.LAST:
                raise InvalidInput(f"{comparison.field}: metrics of logged models have no aggregates")
            point = logged_model_metric.c
            holds = TESTS[comparator](point.value, value)
            # Postgres takes NaN for the greatest number; here it differs from every number and that is all.
            is_number = true() if comparator in {"!=", "NOT IN"} else point.value != _NAN
            return _has_point(point.key == key, holds, is_number, on_dataset)
        case entity:
            table = logged_model_param if entity is Entity.PARAM else logged_model_tag
            present = exists().where(table.c.model_id == logged_model.c.model_id, table.c.key == key)
            if comparator in {"IS NULL", "IS NOT NULL"}:
                return ~present if comparator == "IS NULL" else present
            return present.where(or_(*entry_conditions(table, comparison)))


def _compile_order(orders: Sequence[ModelOrder]) -> tuple[FromClause, list[ColumnElement[Any]]]:
    """Metrics: numbers first, then NaN, then missing, whichever the direction. Others: missing last."""
    source: FromClause = logged_model
    terms: list[ColumnElement[Any]] = []
    for number, order in enumerate(orders):
        entity, dot, key = order.field_name.partition(".")
        if dot and entity == "metrics":
            newest = _newest_points(key.strip('`"'), order.dataset, f"metric_{number}")
            source = source.outerjoin(newest, newest.c.model_id == logged_model.c.model_id)
            value: ColumnElement[Any] = newest.c.value
            terms.append(case((value.is_(None), 2), (value == _NAN, 1), else_=0))
        else:
            value = _attribute(order)
        terms.append((value.asc() if order.ascending else value.desc()).nulls_last())
    return source, terms


def _attribute(order: ModelOrder) -> ColumnElement[Any]:
    name = order.field_name.removeprefix("attributes.")
    column = _COLUMNS.get(LOGGED_MODEL_FIELDS.aliases.get(name, name))
    if column is None:
        raise InvalidInput(
            f"Invalid order by field name: {order.field_name[:200]}. Valid ones are metrics.<key> and "
            f"{', '.join(sorted(_COLUMNS))}."
        )
    if order.dataset is not None:
        raise InvalidInput(f"Invalid order by field name: {order.field_name[:200]}. Only metrics have datasets.")
    return column


def _newest_points(key: str, dataset: DatasetRef | None, name: str) -> FromClause:
    point = logged_model_metric.c
    query = select(point.model_id, point.value).where(point.key == key)
    if dataset is not None:
        query = query.where(_on(dataset))
    newest = point.model_id, point.timestamp.desc(), point.step.desc(), point.digest
    return query.ext(distinct_on(point.model_id)).order_by(*newest).subquery(name)
