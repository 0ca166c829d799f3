"""Parameters on the command line."""

from __future__ import annotations

from typing import Any

import pytest

from mlplat.cli.params import parse_params
from mlplat.errors import InvalidInput
from mlplat.pipelines.spec import PipelineSpec

SPEC = PipelineSpec.model_validate(
    {
        "name": "p",
        "parameters": {
            "n": {"type": "int", "default": 1, "max": 100},
            "rate": {"type": "float", "default": 0.1},
            "title": {"type": "str", "default": "t"},
            "on": {"type": "bool", "default": False},
        },
        "steps": {"a": {"uses": "m:f"}},
    }
)


def refusal(*texts: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_params(SPEC, list(texts))
    return caught.value.message


def test_without_texts_there_are_no_values() -> None:
    assert parse_params(SPEC, []) == {}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("n=7", "n", 7),
        ("n=-7", "n", -7),
        ("rate=0.5", "rate", 0.5),
        ("rate=1e-3", "rate", 0.001),
        ("rate=2", "rate", 2.0),
        ("title=", "title", ""),
        ("title=a=b=c", "title", "a=b=c"),
        ("title=7", "title", "7"),
        ("title= x ", "title", " x "),
        *[(f"on={text}", "on", True) for text in ("true", "True", "YES", "1", "on")],
        *[(f"on={text}", "on", False) for text in ("false", "False", "NO", "0", "off")],
    ],
)
def test_texts_become_values_of_the_parameters_type(text: str, name: str, value: Any) -> None:
    values = parse_params(SPEC, [text])
    assert values == {name: value}
    assert type(values[name]) is type(value)


def test_several_parameters_and_the_last_of_one() -> None:
    assert parse_params(SPEC, ["n=1", "title=x", "n=2"]) == {"n": 2, "title": "x"}


@pytest.mark.parametrize("text", ["n", "", "n:7", "title"])
def test_a_text_without_an_equals_sign_is_refused(text: str) -> None:
    assert refusal(text) == f"-p {text}: expected key=value"


@pytest.mark.parametrize("text", ["m=1", "=1", "N=1", " n=1"])
def test_an_unknown_parameter_is_refused(text: str) -> None:
    name = text.partition("=")[0]
    assert refusal(text) == f"parameters.{name}: unknown; 'p' has n, on, rate, title"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("n=x", "int"),
        ("n=", "int"),
        ("n=1.5", "int"),
        ("n=" + "9" * 5_000, "int"),
        ("rate=x", "float"),
        ("rate=0,5", "float"),
        ("on=maybe", "bool"),
        ("on=", "bool"),
        ("on=2", "bool"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(text: str, kind: str) -> None:
    name, _equals, value = text.partition("=")
    assert refusal(text) == f"parameters.{name}: expected {kind}, got {value!r}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("n=101", "must be at most 100, got 101"), ("rate=nan", "expected a finite number"), ("rate=-inf", "finite")],
)
def test_a_value_that_does_not_fit_is_refused(text: str, reason: str) -> None:
    assert reason in refusal(text)


def test_a_required_parameter_that_is_missing_is_refused() -> None:
    spec = PipelineSpec.model_validate(
        {"name": "p", "parameters": {"n": {"type": "int"}}, "steps": {"a": {"uses": "m:f"}}}
    )
    with pytest.raises(InvalidInput, match=r"parameters\.n: required"):
        parse_params(spec, [])
