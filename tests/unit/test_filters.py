"""Filters as SQL: only compiled, never run."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import ColumnElement, select
from sqlalchemy.engine.url import make_url

from mlplat.db.tables import run
from mlplat.errors import InvalidInput
from mlplat.tracking.filters import compile_filter, compile_order, visible
from mlplat.tracking.model import ViewType
from mlplat.tracking.search import Comparison, comparisons, parse_filter, parse_order

DIALECT = make_url("postgresql+psycopg://").get_dialect()()
HOSTILE = "x') OR 1=1; DROP TABLE run --"


def compiled(condition: ColumnElement[Any]) -> tuple[str, dict[str, Any]]:
    """The SQL text and its bound values."""
    result = condition.compile(dialect=DIALECT)
    return " ".join(str(result).split()), dict(result.params)


def sql(text: str, runs: dict[Comparison, list[str]] | None = None) -> tuple[str, dict[str, Any]]:
    return compiled(compile_filter(parse_filter(text), runs or {}))


def bound(params: dict[str, Any]) -> list[Any]:
    return sorted(params.values(), key=repr)


def test_an_empty_filter_is_true() -> None:
    assert sql("") == ("true", {})


@pytest.mark.parametrize(("comparator", "operator"), [("=", "="), ("!=", "!="), ("LIKE", "LIKE"), ("ILIKE", "ILIKE")])
@pytest.mark.parametrize(("entity", "table"), [("tags", "run_tag"), ("params", "run_param")])
def test_tags_and_params_are_looked_up_by_key(entity: str, table: str, comparator: str, operator: str) -> None:
    text, params = sql(f"{entity}.`the key` {comparator} '{HOSTILE.replace(chr(39), '')}'")
    assert text.startswith("EXISTS (SELECT")
    assert f"{table}.run_id = run.run_id" in text
    assert f"{table}.value {operator} %(" in text
    assert bound(params) == ["the key", HOSTILE.replace("'", "")]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("run_id", "run.run_id"),
        ("run_name", "run.name"),
        ("status", "run.status"),
        ("user_id", "run.user_id"),
        ("artifact_uri", "run.artifact_uri"),
    ],
)
def test_text_attributes_are_columns(name: str, column: str) -> None:
    text, params = sql(f"{name} = 'value of it'")
    assert text.startswith(f"{column} = %(")
    assert bound(params) == ["value of it"]


@pytest.mark.parametrize("comparator", ["=", "!=", ">", ">=", "<", "<="])
def test_times_are_compared_as_times(comparator: str) -> None:
    text, params = sql(f"start_time {comparator} 1700000000123")
    assert text.startswith(f"run.started_at {comparator} %(")
    assert bound(params) == [datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=UTC)]
    assert sql("end_time > 0")[0].startswith("run.ended_at > ")


def test_a_time_beyond_the_calendar_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Invalid time"):
        sql("start_time > 1e20")


@pytest.mark.parametrize("name", ["tags.k", "params.k", "status"])
@pytest.mark.parametrize(("comparator", "operator"), [("IN", " IN ("), ("NOT IN", " NOT IN (")])
def test_lists_bind_every_element(name: str, comparator: str, operator: str) -> None:
    text, params = sql(f"{name} {comparator} ('first one', 'second one')")
    assert operator in text
    assert "one" not in text
    found = [value for value in params.values() if value != "k"]
    assert found in (["first one", "second one"], [["first one", "second one"]], [("first one", "second one")])


def test_null_tests_of_keys_ask_for_their_presence() -> None:
    assert sql("tags.k IS NOT NULL")[0].startswith("EXISTS (")
    assert sql("tags.k IS NULL")[0].startswith("NOT (EXISTS (")
    assert sql("status IS NULL")[0] == "run.status IS NULL"
    assert sql("status IS NOT NULL")[0] == "run.status IS NOT NULL"


def test_metrics_become_the_runs_that_were_found() -> None:
    predicate = parse_filter("metrics.loss < 0.5 AND metrics.loss > 0.1")
    low, high = comparisons(predicate)
    text, params = compiled(compile_filter(predicate, {low: ["r1", "r2"], high: []}))
    assert text.count("run.run_id = any(") == 2
    assert bound(params) == [["r1", "r2"], []]


def test_and_or_not_keep_their_meaning() -> None:
    text, params = sql("NOT (status = 'a' OR status = 'b') AND status = 'c'")
    assert bound(params) == ["a", "b", "c"]
    names = {value: f"%({name})s" for name, value in params.items()}
    plain = text.replace("::VARCHAR", "").replace("::TEXT", "")
    assert plain == (f"NOT (run.status = {names['a']} OR run.status = {names['b']}) AND run.status = {names['c']}")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["tags", "params"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="`"), min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="'"), max_size=12),
    st.sampled_from(["=", "!=", "LIKE", "ILIKE"]),
)
def test_the_sql_text_does_not_depend_on_keys_and_values(entity: str, key: str, value: str, comparator: str) -> None:
    text, params = sql(f"{entity}.`{key}` {comparator} '{value}'")
    assert text == sql(f"{entity}.`k` {comparator} 'v'")[0]
    assert bound(params) == bound({"key": key, "value": value})


def test_views_show_active_and_deleted_runs() -> None:
    assert "deleted" not in compiled(visible([1, 2], ViewType.ALL))[0]
    for view, deleted in ((ViewType.ACTIVE_ONLY, "false"), (ViewType.DELETED_ONLY, "true")):
        assert f"run.deleted = {deleted}" in compiled(visible([1], view))[0]


def test_an_order_puts_what_is_missing_last_in_both_directions() -> None:
    order = compile_order([parse_order("start_time DESC"), parse_order("params.`a key`")], {})
    texts = [compiled(term) for term in order.terms]
    assert order.joins == []
    assert texts[0] == ("run.started_at DESC NULLS LAST", {})
    assert texts[1][0].endswith("ASC NULLS LAST")
    assert bound(texts[1][1]) == ["a key"]


def ordered(texts: list[str], metric_values: dict[str, dict[str, float]]) -> tuple[str, dict[str, Any]]:
    """The whole query of an order."""
    order = compile_order([parse_order(text) for text in texts], metric_values)
    query = select(run.c.run_id)
    for table, condition in order.joins:
        query = query.outerjoin(table, condition)
    result = query.order_by(*order.terms).compile(dialect=DIALECT)
    return " ".join(str(result).split()), dict(result.params)


def test_an_order_by_metric_joins_its_values_and_puts_nan_before_missing() -> None:
    text, params = ordered(["metrics.loss DESC"], {"loss": {"r1": 0.5, "r2": 2.0}})
    joined, order = text.split(" ORDER BY ")
    assert "LEFT OUTER JOIN unnest(" in joined
    assert ["r1", "r2"] in params.values()
    assert [0.5, 2.0] in params.values()
    assert any(isinstance(value, float) and math.isnan(value) for value in params.values())
    assert order.startswith("CASE WHEN (anon_1.value IS NULL) THEN ")
    assert order.endswith("END, anon_1.value DESC NULLS LAST")


def test_two_metrics_in_an_order_are_joined_apart() -> None:
    text, params = ordered(["metrics.a", "metrics.b DESC"], {"a": {"r": 1.0}, "b": {"r": 2.0}})
    assert text.count("LEFT OUTER JOIN unnest(") == 2
    assert "anon_1.value ASC NULLS LAST" in text
    assert "anon_2.value DESC NULLS LAST" in text
    assert [1.0] in params.values()
    assert [2.0] in params.values()


@pytest.mark.parametrize("name", ["tags.k", "params.k", "status"])
@pytest.mark.parametrize(
    "test", ["= 'x'", "!= 'x'", "LIKE 'x'", "ILIKE 'x'", "IN ('x')", "NOT IN ('x')", "IS NULL", "IS NOT NULL"]
)
def test_not_negates_every_comparison_of_texts(name: str, test: str) -> None:
    plain, plain_params = sql(f"{name} {test}")
    negated, negated_params = sql(f"NOT {name} {test}")
    assert negated != plain
    assert bound(negated_params) == bound(plain_params)
