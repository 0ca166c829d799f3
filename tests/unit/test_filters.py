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
from mlplat.tracking.filters import FilterCompiler, visible
from mlplat.tracking.model import ViewType
from mlplat.tracking.orders import MetricValues, compile_order
from mlplat.tracking.search import comparisons, parse_filter, parse_order
from mlplat.tracking.search_tables import RUNS

DIALECT = make_url("postgresql+psycopg://").get_dialect()()
HOSTILE = "x') OR 1=1; DROP TABLE run --"


def compiled(condition: ColumnElement[Any]) -> tuple[str, dict[str, Any]]:
    """The SQL text and its bound values."""
    result = condition.compile(dialect=DIALECT)
    return " ".join(str(result).split()), dict(result.params)


def sql(text: str, *, probe: bool = False) -> tuple[str, dict[str, Any]]:
    return compiled(FilterCompiler(RUNS, probe=probe).compile(parse_filter(text)))


def bound(params: dict[str, Any]) -> list[Any]:
    return sorted(params.values(), key=repr)


def test_an_empty_filter_is_true() -> None:
    assert sql("") == ("true", {})


@pytest.mark.parametrize(("comparator", "operator"), [("=", "="), ("!=", "!="), ("LIKE", "LIKE"), ("ILIKE", "ILIKE")])
@pytest.mark.parametrize(("entity", "table"), [("tags", "run_tag"), ("params", "run_param")])
def test_tags_and_params_are_sets_of_runs(entity: str, table: str, comparator: str, operator: str) -> None:
    hostile = HOSTILE.replace("'", "")
    text, params = sql(f"{entity}.`the key` {comparator} '{hostile}'")
    assert text.startswith("run.run_id IN (SELECT")
    assert text.endswith("IS true")
    assert f"{table}.value {operator} %(" in text
    # A long value cannot be equal to a short one, but may be like it.
    assert ("UNION ALL" in text) == (comparator != "=")
    assert set(params.values()) == {"the key", hostile}


def test_few_candidates_are_looked_up_one_by_one() -> None:
    text, params = sql("tags.k = 'v'", probe=True)
    assert text.startswith("(EXISTS (SELECT") or text.startswith("EXISTS (SELECT")
    assert "run_tag.run_id = run.run_id" in text
    assert bound(params) == ["k", "v"]


@pytest.mark.parametrize("comparator", ["=", "!=", ">", ">=", "<", "<="])
def test_a_param_and_a_bare_number_are_compared_as_numbers(comparator: str) -> None:
    text, params = sql(f"params.lr {comparator} 0.25")
    assert f"run_param.number {comparator} %(" in text
    assert "run_param.number IS NOT NULL" in text
    assert bound(params) == [0.25, "lr"] or bound(params) == ["lr", 0.25]


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
    bound_lists = [list(value) for value in params.values() if value != "k"]
    assert bound_lists
    assert all(found == ["first one", "second one"] for found in bound_lists)


def test_null_tests_of_keys_ask_for_their_presence() -> None:
    assert sql("tags.k IS NOT NULL")[0].startswith("run.run_id IN (")
    assert sql("tags.k IS NULL")[0].startswith("NOT (")
    assert sql("status IS NULL")[0] == "run.status IS NULL"
    assert sql("status IS NOT NULL")[0] == "run.status IS NOT NULL"


def test_metrics_become_the_runs_that_were_found() -> None:
    predicate = parse_filter("metrics.loss < 0.5 AND metrics.loss > 0.1")
    low, high = comparisons(predicate)
    text, params = compiled(FilterCompiler(RUNS, {low: "r1,r2", high: ""}).compile(predicate))
    assert text.count("run.run_id = any(string_to_array(") == 2
    assert {"r1,r2", ""} <= set(params.values())


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
    assert set(params.values()) == {key, value}


def test_views_show_active_and_deleted_runs() -> None:
    assert "deleted" not in compiled(visible([1, 2], ViewType.ALL))[0]
    assert compiled(visible([1], ViewType.ACTIVE_ONLY))[0].endswith("AND NOT run.deleted")
    assert compiled(visible([1], ViewType.DELETED_ONLY))[0].endswith("AND run.deleted")
    assert "any(" not in compiled(visible([1], ViewType.ALL))[0]


def ordered(texts: list[str], after: list[Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The whole query of an order, in which every metric has the same values."""
    orders = [parse_order(text) for text in texts]
    order = compile_order(orders, RUNS, {order.field: VALUES for order in orders})
    found = select(run.c.run_id)
    for table, condition in order.joins:
        found = found.outerjoin(table, condition)
    if after is not None:
        found = found.where(order.after(after))
    result = found.order_by(*order.clauses).compile(dialect=DIALECT)
    return " ".join(str(result).split()), dict(result.params)


VALUES = MetricValues("r1,r2", "1,1", "0.5,2.0")
TIES = "run.started_at DESC, run.run_id ASC"


def test_ties_are_broken_by_start_and_id() -> None:
    assert ordered([])[0].endswith(f" ORDER BY {TIES}")
    assert ordered(["status"])[0].endswith(f" ORDER BY run.status ASC, {TIES}")


def test_an_order_puts_what_is_missing_last_in_both_directions() -> None:
    assert f"ORDER BY run.ended_at DESC NULLS LAST, {TIES}" in ordered(["end_time DESC"])[0]
    text, params = ordered(["params.`a key`"])
    assert "LEFT OUTER JOIN run_param AS pair_0" in text
    assert f"ORDER BY pair_0.value ASC NULLS LAST, {TIES}" in text
    assert bound(params) == ["a key"]


def test_an_order_by_metric_joins_its_values_and_puts_nan_before_missing() -> None:
    text, params = ordered(["metrics.loss DESC"])
    joined, order = text.split(" ORDER BY ")
    assert "LEFT OUTER JOIN unnest(" in joined
    assert {"r1,r2", "1,1", "0.5,2.0"} <= set(params.values())
    assert any(isinstance(value, float) and math.isnan(value) for value in params.values())
    assert order.startswith("CASE WHEN (anon_1.value IS NULL) THEN ")
    assert order.endswith(f"END ASC, anon_1.value DESC NULLS LAST, {TIES}")


def test_two_metrics_in_an_order_are_joined_apart() -> None:
    text, _params = ordered(["metrics.a", "metrics.b DESC"])
    assert text.count("LEFT OUTER JOIN unnest(") == 2
    assert "anon_1.value ASC NULLS LAST" in text
    assert "anon_2.value DESC NULLS LAST" in text


def test_a_page_starts_where_an_index_can() -> None:
    text, params = ordered([], [datetime(2025, 1, 1, tzinfo=UTC), "r1"])
    assert "WHERE run.started_at <= %(" in text
    assert {"r1", datetime(2025, 1, 1, tzinfo=UTC)} == set(params.values())


@pytest.mark.parametrize("name", ["tags.k", "params.k", "status"])
@pytest.mark.parametrize(
    "test", ["= 'x'", "!= 'x'", "LIKE 'x'", "ILIKE 'x'", "IN ('x')", "NOT IN ('x')", "IS NULL", "IS NOT NULL"]
)
def test_not_negates_every_comparison_of_texts(name: str, test: str) -> None:
    plain, plain_params = sql(f"{name} {test}")
    negated, negated_params = sql(f"NOT {name} {test}")
    assert negated != plain
    assert bound(negated_params) == bound(plain_params)
