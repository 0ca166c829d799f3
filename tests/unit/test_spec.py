"""Definitions as values: parameters and their rules, names, digests."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.parameters import Parameter
from mlplat.pipelines.spec import PipelineSpec


def spec(**parameters: dict[str, Any]) -> PipelineSpec:
    return PipelineSpec.model_validate({"name": "p", "parameters": parameters, "steps": {"a": {"uses": "m:f"}}})


def refusal(pipeline: PipelineSpec, **given: Any) -> str:
    with pytest.raises(InvalidPipeline) as caught:
        pipeline.resolve_params(given)
    return caught.value.message


def test_defaults_fill_what_is_not_given() -> None:
    pipeline = spec(n={"type": "int", "default": 3}, name={"type": "str"})
    assert pipeline.resolve_params({"name": "x"}) == {"n": 3, "name": "x"}
    assert pipeline.resolve_params({"name": "x", "n": 4}) == {"n": 4, "name": "x"}


@pytest.mark.parametrize(("kind", "value"), [("int", 0), ("float", 0.0), ("str", ""), ("bool", False)])
def test_falsy_values_are_values(kind: str, value: Any) -> None:
    assert spec(x={"type": kind}).resolve_params({"x": value}) == {"x": value}
    assert spec(x={"type": kind, "default": value}).resolve_params({}) == {"x": value}


def test_an_int_for_a_float_becomes_a_float() -> None:
    value = spec(x={"type": "float"}).resolve_params({"x": 2})["x"]
    assert value == 2.0
    assert type(value) is float
    assert type(spec(x={"type": "float", "default": 1}).resolve_params({})["x"]) is float


def test_an_unknown_parameter_is_refused() -> None:
    assert refusal(spec(n={"type": "int", "default": 1}), m=1) == "parameters.m: unknown; 'p' has n"
    assert refusal(spec(), m=1) == "parameters.m: unknown; 'p' has no parameters"


def test_a_missing_parameter_is_refused() -> None:
    assert refusal(spec(n={"type": "int"})) == "parameters.n: required, and no value was given"


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("int", True, "expected int, got bool True"),
        ("int", 1.0, "expected int, got float 1.0"),
        ("int", "1", "expected int, got str '1'"),
        ("float", False, "expected float, got bool False"),
        ("float", "0.5", "expected float, got str '0.5'"),
        ("str", 1, "expected str, got int 1"),
        ("bool", 1, "expected bool, got int 1"),
        ("bool", "true", "expected bool, got str 'true'"),
        ("int", [1], "expected int, got list [1]"),
        ("float", math.nan, "expected a finite number"),
        ("float", math.inf, "expected a finite number"),
        ("float", -math.inf, "expected a finite number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(kind: str, value: Any, reason: str) -> None:
    assert refusal(spec(x={"type": kind}), x=value) == f"parameters.x: {reason}"


def test_bounds_are_inclusive() -> None:
    pipeline = spec(x={"type": "float", "min": 0, "max": 1})
    assert pipeline.resolve_params({"x": 0}) == {"x": 0.0}
    assert pipeline.resolve_params({"x": 1}) == {"x": 1.0}
    assert refusal(pipeline, x=-0.5) == "parameters.x: must be at least 0, got -0.5"
    assert refusal(pipeline, x=1.5) == "parameters.x: must be at most 1, got 1.5"


def test_a_value_outside_of_the_choices_is_refused() -> None:
    pipeline = spec(x={"type": "str", "choices": ["a", "b"]})
    assert pipeline.resolve_params({"x": "b"}) == {"x": "b"}
    assert refusal(pipeline, x="c") == "parameters.x: must be one of ['a', 'b'], got 'c'"


def test_every_problem_is_reported_on_its_own_line() -> None:
    pipeline = spec(a={"type": "int"}, b={"type": "int", "max": 1})
    assert refusal(pipeline, b=2, c=1).splitlines() == [
        "parameters.c: unknown; 'p' has a, b",
        "parameters.a: required, and no value was given",
        "parameters.b: must be at most 1, got 2",
    ]


@pytest.mark.parametrize(
    "parameter",
    [
        {"type": "int", "default": "x"},
        {"type": "int", "default": True},
        {"type": "int", "default": 5, "max": 4},
        {"type": "str", "default": "c", "choices": ["a"]},
        {"type": "float", "default": math.nan},
    ],
)
def test_a_default_that_does_not_fit_is_refused(parameter: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="does not fit"):
        Parameter.model_validate(parameter)


values = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats() | st.text(max_size=5)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["int", "float", "str", "bool"]), values)
def test_what_is_accepted_has_the_declared_type_and_is_json(kind: str, value: object) -> None:
    try:
        accepted = spec(x={"type": kind}).resolve_params({"x": value})
    except InvalidPipeline:
        return
    assert type(accepted["x"]).__name__ == kind
    assert json.loads(json.dumps(accepted, allow_nan=False)) == accepted


@pytest.mark.parametrize("name", ["", "1a", "a b", "a.b", "a/b", "-a", "a" * 64, "ä", "a\n"])
def test_a_bad_pipeline_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate({"name": name, "steps": {"a": {"uses": "m:f"}}})


@pytest.mark.parametrize("name", ["", "1a", "a-b", "a.b", "a b", "a" * 64, "a\n"])
def test_a_step_name_must_be_an_identifier(name: str) -> None:
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate({"name": "p", "steps": {name: {"uses": "m:f"}}})


@pytest.mark.parametrize("uses", ["m:f", "pkg.mod:Class.method", "_m:_f", f"pickle:{'0' * 64}:__main__.f", "m1.m2:f_1"])
def test_good_uses(uses: str) -> None:
    assert PipelineSpec.model_validate({"name": "p", "steps": {"a": {"uses": uses}}}).steps["a"].uses == uses


@pytest.mark.parametrize(
    "uses", ["", "m", ":f", "m:", "m:f:g", "m f", "m:f()", "../m:f", "pickle:abc:f", f"pickle:{'0' * 64}:", "m:f\n"]
)
def test_bad_uses_are_refused(uses: str) -> None:
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate({"name": "p", "steps": {"a": {"uses": uses}}})


@pytest.mark.parametrize(
    "retry", [{"max_attempts": 0}, {"max_attempts": 101}, {"initial_s": -1}, {"factor": 0.5}, {"jitter": 1.1}]
)
def test_a_retry_policy_out_of_bounds_is_refused(retry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate({"name": "p", "steps": {"a": {"uses": "m:f", "retry": retry}}})


def test_a_pipeline_needs_a_step() -> None:
    with pytest.raises(ValidationError):
        PipelineSpec.model_validate({"name": "p", "steps": {}})


def test_the_json_form_gives_the_same_definition_again() -> None:
    pipeline = PipelineSpec.model_validate(
        {
            "name": "p",
            "parameters": {"n": {"type": "int", "default": 1, "choices": [1, 2]}},
            "steps": {
                "a": {"uses": "m:f", "with": {"x": {"deep": [1, None, "${{ params.n }}"]}}},
                "b": {"uses": "m:g", "foreach": "${{ steps.a.output }}", "retry": {"max_attempts": 3}},
            },
        }
    )
    stored = json.loads(json.dumps(pipeline.to_json()))
    assert stored["steps"]["a"]["with"] == {"x": {"deep": [1, None, "${{ params.n }}"]}}
    again = PipelineSpec.model_validate(stored)
    assert again == pipeline
    assert again.digest == pipeline.digest


def test_the_digest_ignores_the_order_of_keys_and_sees_every_change() -> None:
    def digest(**extra: Any) -> str:
        return PipelineSpec.model_validate({"name": "p", "steps": {"a": {"uses": "m:f"} | extra}}).digest

    assert digest() == digest(needs=[])
    swapped = PipelineSpec.model_validate({"steps": {"a": {"uses": "m:f"}}, "name": "p"})
    assert swapped.digest == digest()
    changes: list[dict[str, Any]] = [
        {},
        {"description": "x"},
        {"with": {"x": 1}},
        {"with": {"x": 2}},
        {"resources": {"cpus": 2}},
    ]
    assert len({digest(**change) for change in changes}) == len(changes)
