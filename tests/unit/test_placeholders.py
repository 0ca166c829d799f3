"""Expressions built from placeholders mean what the Python says."""

from __future__ import annotations

from typing import Any

import jmespath
import pytest

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.expressions import references
from mlplat.sdk.placeholders import ITEM, Placeholder, as_condition, as_template, expression, fill_item, this_run

SCORE = Placeholder("steps.fit.output")
KIND = Placeholder("params.kind")


def value_of(condition: Placeholder, score: Any = None, kind: Any = None) -> Any:
    return jmespath.search(condition.expression, {"steps": {"fit": {"output": score}}, "params": {"kind": kind}})


@pytest.mark.parametrize(
    ("condition", "score", "kind", "expected"),
    [
        (SCORE > 0.5, 0.6, None, True),
        (SCORE > 0.5, 0.5, None, False),
        (SCORE >= 0.5, 0.5, None, True),
        (SCORE < 0.5, 0.4, None, True),
        (SCORE <= 0.5, 0.6, None, False),
        (SCORE == 1, 1, None, True),
        (SCORE != 1, 1, None, False),
        (KIND == "svm", None, "svm", True),
        (KIND == 'a`b"c', None, 'a`b"c', True),
        (KIND == [1, {"a": None}], None, [1, {"a": None}], True),
        ((SCORE > 0.5) & (KIND == "svm"), 1, "svm", True),
        ((SCORE > 0.5) & (KIND == "svm"), 0, "svm", False),
        ((SCORE > 0.5) | (KIND == "svm"), 0, "svm", True),
        (~(SCORE > 0.5), 0, None, True),
        (~SCORE["bad"], {"bad": True}, None, False),
        (~((SCORE > 0.5) & (KIND == "svm")), 1, "tree", True),
        ((SCORE > KIND) == True, 2, 1, True),  # noqa: E712 - an expression
        ((SCORE > 1) | ((SCORE < 0) & (KIND == "svm")), 2, "tree", True),
    ],
)
def test_conditions(condition: Placeholder, score: Any, kind: Any, expected: bool) -> None:
    assert value_of(condition, score, kind) is expected


@pytest.mark.parametrize(
    ("part", "score", "expected"),
    [
        (SCORE["a b"], {"a b": 1}, 1),
        (SCORE['quote"d'], {'quote"d': 2}, 2),
        (SCORE["rows"][-1]["x"], {"rows": [{"x": 1}, {"x": 2}]}, 2),
        (SCORE[1:3], [0, 1, 2, 3], [1, 2]),
        (SCORE[::2], [0, 1, 2], [0, 2]),
        (SCORE[:2][0], [7, 8, 9], 7),
    ],
)
def test_parts(part: Placeholder, score: Any, expected: Any) -> None:
    assert value_of(part, score) == expected
    (read,) = references(part.expression)
    assert read[:3] == ("steps", "fit", "output")


def test_order_is_for_numbers_only() -> None:
    for wrong in ("a", None, True, [1]):
        with pytest.raises(InvalidPipeline, match="only numbers have an order"):
            wrong < SCORE  # noqa: B015


def test_what_an_expression_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidPipeline, match="cannot hold"):
        object() == SCORE  # noqa: B015
    with pytest.raises(InvalidPipeline, match="cannot hold"):
        [float("nan")] == SCORE  # noqa: B015


def test_python_words_of_logic_are_refused_with_what_to_write() -> None:
    with pytest.raises(InvalidPipeline, match=r"& \| ~ instead of and, or, not"):
        _ = SCORE > 1 and KIND == "svm"
    with pytest.raises(InvalidPipeline, match="cannot be tested"):
        _ = SCORE in [1, 2]


def test_conditions_come_as_text_and_constants_too() -> None:
    assert as_condition("length(steps.a.output) > `0`").expression == "length(steps.a.output) > `0`"
    assert as_condition(" ${{ params.go }} ").expression == "params.go"
    assert as_condition(True).expression == "`true`"
    assert as_condition([]).expression == "`false`"
    assert expression("${{ max(item) }}").template == "${{ max(item) }}"
    assert str(this_run.state) == "${{ run.state }}"


def test_templates_and_items_at_any_depth() -> None:
    value = {"rate": ITEM["rate"], "both": [ITEM, (1, SCORE)]}
    assert as_template(value) == {
        "rate": '${{ item."rate" }}', "both": ["${{ item }}", [1, "${{ steps.fit.output }}"]],
    }  # fmt: skip
    assert fill_item({"rate": ITEM["rate"], "t": (ITEM, 1)}, {"rate": 3}) == {"rate": 3, "t": ({"rate": 3}, 1)}
