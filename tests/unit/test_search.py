"""The filter language of run search."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.tracking.fields import (
    EXPERIMENT_FIELDS,
    LOGGED_MODEL_FIELDS,
    MODEL_VERSION_FIELDS,
    REGISTERED_MODEL_FIELDS,
    Aggregate,
    Entity,
    Field,
    Fields,
)
from mlplat.tracking.search import (
    MAX_FILTER_LENGTH,
    AllOf,
    AnyOf,
    Comparison,
    Not,
    OrderBy,
    Predicate,
    comparisons,
    conjuncts,
    parse_filter,
    parse_order,
    parse_orders,
)


def tag(key: str, value: str = "x") -> Comparison:
    return Comparison(Field(Entity.TAG, key), "=", value)


def field(text: str) -> Field:
    parsed = parse_filter(f"{text} = 'x'")
    assert isinstance(parsed, Comparison)
    return parsed.field


A, B, C = tag("a"), tag("b"), tag("c")
TEXT_A, TEXT_B, TEXT_C = "tags.a = 'x'", "tags.b = 'x'", "tags.c = 'x'"


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_filter_is_true(text: str) -> None:
    assert parse_filter(text) == AllOf(())


@pytest.mark.parametrize(
    ("prefix", "entity"),
    [
        ("param", Entity.PARAM),
        ("params", Entity.PARAM),
        ("parameter", Entity.PARAM),
        ("parameters", Entity.PARAM),
        ("tag", Entity.TAG),
        ("tags", Entity.TAG),
    ],
)
def test_every_name_of_a_text_entity(prefix: str, entity: Entity) -> None:
    assert field(f"{prefix}.key") == Field(entity, "key")


@pytest.mark.parametrize("prefix", ["metric", "metrics"])
def test_every_name_of_metrics(prefix: str) -> None:
    assert parse_filter(f"{prefix}.loss > 1") == Comparison(Field(Entity.METRIC, "loss"), ">", 1.0)


@pytest.mark.parametrize("prefix", ["attribute.", "attributes.", "attr.", "run.", ""])
def test_every_name_of_attributes(prefix: str) -> None:
    assert field(f"{prefix}status") == Field(Entity.ATTRIBUTE, "status")


@pytest.mark.parametrize("key", ["run_id", "run_name", "status", "user_id", "artifact_uri"])
def test_every_text_attribute(key: str) -> None:
    assert field(key) == Field(Entity.ATTRIBUTE, key)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("start_time", "start_time"),
        ("end_time", "end_time"),
        ("created", "start_time"),
        ("Created", "start_time"),
    ],
)
def test_every_time_attribute(text: str, key: str) -> None:
    assert parse_filter(f"{text} >= 5") == Comparison(Field(Entity.ATTRIBUTE, key), ">=", 5.0)


@pytest.mark.parametrize("text", ['"Run name"', "`run name`", 'attributes."run name"', "attributes.`Run name`"])
def test_names_of_the_user_interface_are_known(text: str) -> None:
    assert field(text) == Field(Entity.ATTRIBUTE, "run_name")


@pytest.mark.parametrize("comparator", ["=", "!=", ">", ">=", "<", "<="])
@pytest.mark.parametrize("name", ["metrics.loss", "attributes.start_time"])
def test_numbers_know_every_comparator(comparator: str, name: str) -> None:
    for text in (f"{name} {comparator} 0.5", f"{name}{comparator}0.5"):
        parsed = parse_filter(text)
        assert isinstance(parsed, Comparison)
        assert (parsed.comparator, parsed.value) == (comparator, 0.5)


@pytest.mark.parametrize("name", ["params.lr", "tags.kind", "attributes.status"])
@pytest.mark.parametrize(
    ("text", "comparator", "value"),
    [
        ("= 'x'", "=", "x"),
        ("!= 'x'", "!=", "x"),
        ("LIKE '%x_'", "LIKE", "%x_"),
        ("like '%x_'", "LIKE", "%x_"),
        ("ILIKE 'X%'", "ILIKE", "X%"),
        ("IN ('x')", "IN", ("x",)),
        ("in ('x', \"y\" ,'z')", "IN", ("x", "y", "z")),
        ("NOT IN ('x', 'y')", "NOT IN", ("x", "y")),
        ("not  in('x')", "NOT IN", ("x",)),
        ("IS NULL", "IS NULL", None),
        ("is not null", "IS NOT NULL", None),
    ],
)
def test_texts_know_every_comparator(
    name: str, text: str, comparator: str, value: str | tuple[str, ...] | None
) -> None:
    parsed = parse_filter(f"{name} {text}")
    assert isinstance(parsed, Comparison)
    assert (parsed.comparator, parsed.value) == (comparator, value)


@pytest.mark.parametrize(
    "text",
    [
        "metrics.loss LIKE 'x'",
        "metrics.loss IS NOT NULL",
        "metrics.loss IS NULL",
        "start_time ILIKE '1'",
        "params.lr > '1'",
        "params.lr <= '1'",
        "tags.a >= 'x'",
        "attributes.status < 'x'",
    ],
)
def test_a_comparator_of_the_other_kind_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid comparator"):
        parse_filter(text)


@pytest.mark.parametrize(
    "text", ["metrics.loss > '1'", "start_time = '1'", 'metrics.loss != "nan"', "metrics.loss IN ('x')"]
)
def test_a_text_for_a_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Expected numeric value type"):
        parse_filter(text)


@pytest.mark.parametrize("text", ["tags.a = 1", "tags.a != 0.5", "status = 1", "tags.a IN (1, 2)", "dataset.name = 1"])
def test_a_number_for_a_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Expected a quoted string value"):
        parse_filter(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1.0), ("-1.5", -1.5), ("+2", 2.0), (".5", 0.5), ("5.", 5.0), ("1e-3", 0.001), ("2E6", 2e6)],
)
def test_numbers_in_every_notation(text: str, value: float) -> None:
    parsed = parse_filter(f"metrics.a = {text}")
    assert isinstance(parsed, Comparison)
    assert parsed.value == value


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("tags.`a b`", "a b"),
        ('tags."a b"', "a b"),
        ("tags.`a.b/c-d`", "a.b/c-d"),
        ("tags.`it's`", "it's"),
        ('tags.`say "x"`', 'say "x"'),
        ('tags."back`tick"', "back`tick"),
        ("tags.`and`", "and"),
        ("tags.`a = 'x' OR 1=1`", "a = 'x' OR 1=1"),
        ("tags.mlflow.parentRunId", "mlflow.parentRunId"),
        ("tags.a/b-c_d", "a/b-c_d"),
        ("tags.or", "or"),
        ("tags.in", "in"),
        ("tags.größe", "größe"),
        ('"tags.a b"', "a b"),
    ],
)
def test_keys_with_and_without_quotes(text: str, key: str) -> None:
    assert field(text) == Field(Entity.TAG, key)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'x y'", "x y"),
        ('"x y"', "x y"),
        ("''", ""),
        ("'say \"x\"'", 'say "x"'),
        ('"it\'s"', "it's"),
        ("'a;--'", "a;--"),
    ],
)
def test_values_in_both_quotes(text: str, value: str) -> None:
    assert parse_filter(f"tags.a = {text}") == tag("a", value)


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        (f"{TEXT_A} AND {TEXT_B}", AllOf((A, B))),
        (f"{TEXT_A} and {TEXT_B} And {TEXT_C}", AllOf((A, B, C))),
        (f"{TEXT_A} OR {TEXT_B}", AnyOf((A, B))),
        (f"{TEXT_A} OR {TEXT_B} AND {TEXT_C}", AnyOf((A, AllOf((B, C))))),
        (f"{TEXT_A} AND {TEXT_B} OR {TEXT_C}", AnyOf((AllOf((A, B)), C))),
        (f"({TEXT_A} OR {TEXT_B}) AND {TEXT_C}", AllOf((AnyOf((A, B)), C))),
        (f"NOT {TEXT_A}", Not(A)),
        (f"NOT {TEXT_A} AND {TEXT_B}", AllOf((Not(A), B))),
        (f"NOT ({TEXT_A} AND {TEXT_B})", Not(AllOf((A, B)))),
        (f"not not {TEXT_A} or {TEXT_B}", AnyOf((Not(Not(A)), B))),
        (f"(({TEXT_A}))", A),
        (f"{TEXT_A}\n\tAND\n{TEXT_B}", AllOf((A, B))),
        (f"NOT({TEXT_A})AND({TEXT_B})", AllOf((Not(A), B))),
    ],
)
def test_not_binds_tighter_than_and_which_binds_tighter_than_or(text: str, tree: Predicate) -> None:
    assert parse_filter(text) == tree


@pytest.mark.parametrize(
    "text",
    [
        "tags.a",
        "tags.a =",
        "= 'x'",
        "tags.a = 'x",
        "tags.a = x",
        "tags.a == 'x'",
        "tags.a = 'x' AND",
        "AND tags.a = 'x'",
        "tags.a = 'x' tags.b = 'x'",
        "tags.a = 'x' XOR tags.b = 'x'",
        "(tags.a = 'x'",
        "tags.a = 'x')",
        "()",
        "tags.a IN ()",
        "tags.a IN 'x'",
        "tags.a IN ('x',)",
        "tags.a NOT LIKE 'x'",
        "tags.`a = 'x'",
        "tags.`` = 'x'",
        "tags. = 'x'",
        ".a = 'x'",
        "metrics.a = nan",
        "metrics.a = 1.2.3",
        "metrics.a = 0x10",
        "tags.a = 'x'; DROP TABLE run",
        "tags.a = 'x' -- comment",
        "tags.a = 'x' /* comment */",
        "1 = 1",
        "'a' = 'a'",
        "\x00",
        "NOT",
        "tags.a = ?",
        "tags.a = :name",
    ],
)
def test_what_is_no_filter_is_refused_and_shown(text: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid filter string"):
        parse_filter(text)


def test_the_message_points_at_the_place() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_filter("tags.a = 'x' XOR tags.b = 'x'")
    _head, line, caret = caught.value.message.splitlines()
    assert line[caret.index("^") :].startswith("XOR")


@pytest.mark.parametrize("text", ["color = 'x'", "attributes.color = 'x'", "run.deleted = 'x'", "experiment_id = 'x'"])
def test_an_unknown_attribute_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid attribute key"):
        parse_filter(text)


@pytest.mark.parametrize("text", ["foo.bar = 'x'", "Metrics.a = 'x'", "run.x.y = 'x'", "datset.name = 'x'"])
def test_an_unknown_entity_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"Invalid (entity type|attribute key)"):
        parse_filter(text)


def test_a_filter_has_a_greatest_length() -> None:
    with pytest.raises(InvalidInput, match="longer than"):
        parse_filter("tags.a = '" + "x" * MAX_FILTER_LENGTH + "'")


def test_parentheses_may_be_deep() -> None:
    depth = (MAX_FILTER_LENGTH - len(TEXT_A)) // 2
    assert parse_filter("(" * depth + TEXT_A + ")" * depth) == A


@pytest.mark.parametrize("opening", ["(", "NOT ", "NOT (", f"({TEXT_A} AND ", f"{TEXT_A} OR ("])
def test_nesting_that_is_never_closed_is_refused(opening: str) -> None:
    with pytest.raises(InvalidInput):
        parse_filter(opening * (MAX_FILTER_LENGTH // len(opening)))


def test_long_chains_are_flat() -> None:
    parsed = parse_filter(" AND ".join([TEXT_A] * 1_000))
    assert isinstance(parsed, AllOf)
    assert parsed.operands == (A,) * 1_000


def test_comparisons_are_found_throughout_the_tree() -> None:
    parsed = parse_filter(f"NOT ({TEXT_A} OR {TEXT_B} AND NOT {TEXT_C}) AND metrics.m > 1")
    assert [found.field.key for found in comparisons(parsed)] == ["a", "b", "c", "m"]
    assert list(comparisons(parse_filter(""))) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("start_time", OrderBy(Field(Entity.ATTRIBUTE, "start_time"), True)),
        ("attributes.start_time DESC", OrderBy(Field(Entity.ATTRIBUTE, "start_time"), False)),
        ("metrics.loss asc", OrderBy(Field(Entity.METRIC, "loss"), True)),
        ("  metrics.loss   desc  ", OrderBy(Field(Entity.METRIC, "loss"), False)),
        ("metrics.`val loss` DESC", OrderBy(Field(Entity.METRIC, "val loss"), False)),
        ('params."my lr"', OrderBy(Field(Entity.PARAM, "my lr"), True)),
        ("tags.mlflow.user", OrderBy(Field(Entity.TAG, "mlflow.user"), True)),
        ("`start_time` DESC", OrderBy(Field(Entity.ATTRIBUTE, "start_time"), False)),
        ("Created DESC", OrderBy(Field(Entity.ATTRIBUTE, "start_time"), False)),
        ("run_id", OrderBy(Field(Entity.ATTRIBUTE, "run_id"), True)),
    ],
)
def test_orders(text: str, expected: OrderBy) -> None:
    assert parse_order(text) == expected


@pytest.mark.parametrize("text", ["", "  ", "DESC", "color", "foo.bar DESC", "attributes.color", "start_time DOWN"])
def test_an_unknown_order_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_order(text)


pieces = st.sampled_from(
    [
        "(",
        ")",
        "NOT ",
        " AND ",
        " OR ",
        "tags.a",
        "metrics.`b c`",
        " = ",
        " > ",
        " IN ",
        "'x'",
        "1",
        ",",
        "min",
        "params.p",
        " DESC",
        " LIKE ",
        " IS ",
        "NULL",
        "`",
        '"',
        "'",
        ".",
        "status",
    ]
)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40) | st.lists(pieces, max_size=14).map("".join))
def test_any_text_is_a_filter_and_an_order_or_refused(text: str) -> None:
    with suppress(InvalidInput):
        parse_filter(text)
    with suppress(InvalidInput):
        parse_order(text)


keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="`"), min_size=1, max_size=20)
values = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="'"), max_size=20)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["tags", "params"]), keys, values)
def test_any_quoted_key_and_value_arrive_unchanged(entity: str, key: str, value: str) -> None:
    expected = Entity.TAG if entity == "tags" else Entity.PARAM
    assert parse_filter(f"{entity}.`{key}` = '{value}'") == Comparison(Field(expected, key), "=", value)


leaves: st.SearchStrategy[Predicate] = st.sampled_from([A, B, C])
trees = st.recursive(
    leaves,
    lambda inner: (
        inner.map(Not)
        | st.lists(inner, min_size=2, max_size=3).map(lambda operands: AllOf(tuple(operands)))
        | st.lists(inner, min_size=2, max_size=3).map(lambda operands: AnyOf(tuple(operands)))
    ),
    max_leaves=8,
)


def written(predicate: Predicate) -> str:
    match predicate:
        case Not(operand):
            return f"NOT ({written(operand)})"
        case AllOf(operands):
            return " AND ".join(f"({written(operand)})" for operand in operands)
        case AnyOf(operands):
            return " OR ".join(f"({written(operand)})" for operand in operands)
        case Comparison(named, comparator, value):
            return f"tags.{named.key} {comparator} '{value}'"


@settings(deadline=None, max_examples=100)
@given(trees)
def test_a_tree_that_is_written_out_is_read_back(tree: Predicate) -> None:
    assert parse_filter(written(tree)) == tree


@pytest.mark.parametrize(
    ("text", "aggregate", "key"),
    [
        ("min(metrics.loss)", Aggregate.MIN, "loss"),
        ("MAX( metrics.`val loss` )", Aggregate.MAX, "val loss"),
        ("last(metric.loss.min)", Aggregate.LAST, "loss.min"),
        ("metrics.loss.min", Aggregate.LAST, "loss.min"),
        ('max("metrics.a b")', Aggregate.MAX, "a b"),
    ],
)
def test_aggregates_are_calls_and_do_not_collide_with_keys(text: str, aggregate: Aggregate, key: str) -> None:
    expected = Field(Entity.METRIC, key, aggregate)
    assert parse_filter(f"{text} < 0.1") == Comparison(expected, "<", 0.1)
    assert parse_order(f"{text} DESC") == OrderBy(expected, False)


@pytest.mark.parametrize(
    "text",
    ["avg(metrics.a) > 1", "min(params.a) > 1", "min(a) > 1", "min(min(metrics.a)) > 1", "min() > 1", "min(*) > 1"],
)
def test_what_is_no_aggregate_of_a_metric_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_filter(text)


@pytest.mark.parametrize("comparator", ["=", "!=", ">", ">=", "<", "<="])
def test_a_bare_number_makes_a_param_a_number_and_a_quoted_one_a_text(comparator: str) -> None:
    number = parse_filter(f"params.lr {comparator} 1e-3")
    assert isinstance(number, Comparison)
    assert (number.value, number.is_numeric) == (0.001, True)
    if comparator in {"=", "!="}:
        text = parse_filter(f"params.lr {comparator} '1e-3'")
        assert isinstance(text, Comparison)
        assert (text.value, text.is_numeric) == ("1e-3", False)


@pytest.mark.parametrize("name", ["metrics.a", "params.a", "start_time", "duration", "max(metrics.a)"])
def test_numbers_may_be_listed(name: str) -> None:
    for comparator in ("IN", "NOT IN"):
        parsed = parse_filter(f"{name} {comparator} (1, -2.5)")
        assert isinstance(parsed, Comparison)
        assert (parsed.comparator, parsed.value) == (comparator, (1.0, -2.5))


@pytest.mark.parametrize("text", ["params.a IN (1, 'x')", "metrics.a IN (1, 'x')", "metrics.a IN (1e999)"])
def test_a_list_holds_one_kind_of_values(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_filter(text)


@pytest.mark.parametrize("key", ["name", "digest", "context"])
def test_datasets_have_a_name_a_digest_and_a_context(key: str) -> None:
    for prefix in ("dataset", "datasets"):
        assert field(f"{prefix}.{key}") == Field(Entity.DATASET, key)
    with pytest.raises(InvalidInput, match="many datasets"):
        parse_order(f"dataset.{key}")


@pytest.mark.parametrize(
    ("fields", "known", "unknown"),
    [
        (EXPERIMENT_FIELDS, ["name = 'x'", "tags.a = 'x'", "creation_time > 1"], ["metrics.a > 1", "params.a = 'x'"]),
        (LOGGED_MODEL_FIELDS, ["metrics.a > 1", "model_type = 'x'", "creation_timestamp > 1"], ["dataset.name = 'x'"]),
        (REGISTERED_MODEL_FIELDS, ["name LIKE 'x'", "tags.a = 'x'"], ["run_id = 'x'", "metrics.a > 1"]),
        (MODEL_VERSION_FIELDS, ["version_number > 1", "run_id IN ('x')", "source_path = 'x'"], ["status = 'x'"]),
    ],
)
def test_every_kind_has_fields_of_its_own(fields: Fields, known: list[str], unknown: list[str]) -> None:
    for text in known:
        assert isinstance(parse_filter(text, fields), Comparison)
    for text in unknown:
        with pytest.raises(InvalidInput):
            parse_filter(text, fields)


def test_a_field_occurs_once_in_an_order() -> None:
    assert len(parse_orders(["metrics.a", "min(metrics.a)", "tags.a"])) == 3
    for texts in (["start_time", "created DESC"], ["metrics.a", "last(metrics.a) DESC"]):
        with pytest.raises(InvalidInput, match="duplicate fields"):
            parse_orders(texts)


def test_conjuncts_are_what_must_hold_together() -> None:
    assert conjuncts(parse_filter(f"({TEXT_A} AND {TEXT_B}) AND ({TEXT_A} OR {TEXT_C})")) == (A, B, AnyOf((A, C)))
    assert conjuncts(parse_filter("")) == ()
    assert conjuncts(parse_filter(TEXT_A)) == (A,)


@pytest.mark.parametrize(
    ("text", "key", "comparator", "value"),
    [
        ("version_number = '3'", "version_number", "=", 3.0),
        ("version.version IN ('3', '4')", "version_number", "IN", (3.0, 4.0)),
        ("semantic_version >= '1.2.0'", "semantic_version", ">=", "1.2.0"),
        ("semantic_version NOT IN ('^1', '2.0.0')", "semantic_version", "NOT IN", ("^1", "2.0.0")),
        ("author ILIKE 'ann'", "user_id", "ILIKE", "ann"),
        ("current_stage = 'staging'", "stage", "=", "staging"),
        ("alias IS NOT NULL", "alias", "IS NOT NULL", None),
    ],
)
def test_versions_have_attributes_of_their_own(text: str, key: str, comparator: str, value: object) -> None:
    parsed = parse_filter(text, MODEL_VERSION_FIELDS)
    assert isinstance(parsed, Comparison)
    assert (parsed.field, parsed.comparator, parsed.value) == (Field(Entity.ATTRIBUTE, key), comparator, value)


@pytest.mark.parametrize(
    "text",
    ["version_number = 'x'", "version_number IN ('1', 'x')", "version_number = '1e3'", "version_number = ''",
     "semantic_version LIKE '1%'", "semantic_version IS NULL", "semantic_version > 1", "alias > 'a'", "alias = 1"],
)  # fmt: skip
def test_attributes_of_versions_are_compared_as_what_they_are(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_filter(text, MODEL_VERSION_FIELDS)


def test_quoted_numbers_are_texts_in_searches_of_runs() -> None:
    with pytest.raises(InvalidInput, match="Expected numeric value type"):
        parse_filter("start_time > '5'")


@pytest.mark.parametrize("fields", [REGISTERED_MODEL_FIELDS, MODEL_VERSION_FIELDS])
def test_nothing_is_ordered_by_what_there_may_be_many_of(fields: Fields) -> None:
    with pytest.raises(InvalidInput, match="many of 'alias'"):
        parse_order("alias DESC", fields)
