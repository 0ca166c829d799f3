"""Pipelines defined by Python functions."""

from __future__ import annotations

import hashlib
from typing import Any

import cloudpickle
import pytest

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.spec import PipelineSpec, Retry
from mlplat.sdk.definition import ITEM, Pipeline, Placeholder, pipeline, step


class Blobs(dict[str, bytes]):
    """What would be uploaded."""

    def store(self, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        self[digest] = body
        return digest


def build(defined: Pipeline) -> PipelineSpec:
    return defined.build(Blobs().store)


@step
def load(seed: int) -> list[int]:
    """Loads.

    More about it.
    """
    return [seed, seed + 1]


@step(name="fit", retries=2, cpus=2.0, gpus=0.5, memory_mb=100)
def train(part: int, rate: float = 0.1) -> int:
    return part * 10


@step
def report(scores: Any, title: str = "t") -> Any:
    return scores, title


@pipeline
def my_pipeline(seed: int = 3, title: str = "best") -> None:
    """Trains.

    Slowly.
    """
    data = load(seed)
    scores = train.map(data, rate=0.5)
    report(scores=scores, title=title)


def test_a_function_becomes_a_definition() -> None:
    spec = build(my_pipeline)
    assert (spec.name, spec.description) == ("my-pipeline", "Trains.")
    assert {name: (item.type, item.default) for name, item in spec.parameters.items()} == {
        "seed": ("int", 3),
        "title": ("str", "best"),
    }
    assert list(spec.steps) == ["load", "fit", "report"]
    assert spec.steps["load"].with_ == {"seed": "${{ params.seed }}"}
    assert spec.steps["load"].description == "Loads."
    assert spec.steps["fit"].foreach == "${{ steps.load.output }}"
    assert spec.steps["fit"].with_ == {"part": "${{ item }}", "rate": 0.5}
    assert spec.steps["report"].with_ == {"scores": "${{ steps.fit.output }}", "title": "${{ params.title }}"}


def test_options_of_a_step_reach_the_definition() -> None:
    fit = build(my_pipeline).steps["fit"]
    assert fit.retry.max_attempts == 3
    assert (fit.resources.cpus, fit.resources.gpus, fit.resources.memory_mb) == (2.0, 0.5, 100)


def test_a_retry_policy_is_taken_whole() -> None:
    policy = Retry(max_attempts=5, initial_s=0.5, factor=3, cap_s=9, jitter=0)

    @pipeline
    def one() -> None:
        step(retry=policy)(len)([1])

    assert build(one).steps["len"].retry == policy


def test_outside_of_a_pipeline_a_step_is_the_plain_function() -> None:
    assert load(4) == [4, 5]
    assert train.map([1, 2], rate=0.5) == [10, 20]
    assert report(1, title="x") == (1, "x")
    assert load.__doc__ == load.function.__doc__


def test_after_building_steps_are_plain_again_even_when_the_function_failed() -> None:
    @pipeline
    def broken() -> None:
        load(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(broken)
    assert load(1) == [1, 2]


def test_a_step_that_is_called_twice_gets_two_names() -> None:
    @pipeline
    def twice() -> None:
        first = load(1)
        second = load(first[0])
        load(second[-1])

    spec = build(twice)
    assert list(spec.steps) == ["load", "load_2", "load_3"]
    assert spec.steps["load_2"].with_ == {"seed": "${{ steps.load.output[0] }}"}
    assert spec.steps["load_3"].with_ == {"seed": "${{ steps.load_2.output[-1] }}"}


def test_code_of_this_file_travels_by_value_and_installed_code_by_name() -> None:
    @pipeline
    def both() -> None:
        load(1)
        step(cloudpickle.dumps)(1)

    blobs = Blobs()
    spec = both.build(blobs.store)
    kind, digest, name = (spec.steps["load"].uses or "").split(":")
    assert (kind, name) == ("pickle", f"{__name__}.load")
    assert cloudpickle.loads(blobs[digest])(5) == [5, 6]
    assert spec.steps["dumps"].uses == "cloudpickle.cloudpickle:dumps"


def test_arguments_may_hold_placeholders_at_any_depth() -> None:
    @pipeline
    def deep(seed: int) -> None:
        data: Any = load(seed)
        report({"rows": [data["a"][0], (seed, "fixed")], "none": None})

    assert build(deep).steps["report"].with_ == {
        "scores": {
            "rows": ['${{ steps.load.output."a"[0] }}', ["${{ params.seed }}", "fixed"]],
            "none": None,
        }
    }


def test_a_map_over_a_plain_list_keeps_the_list() -> None:
    @pipeline
    def over() -> None:
        train.map([1, 2])

    assert build(over).steps["fit"].foreach == [1, 2]


def test_a_map_over_an_empty_list_is_a_fan_out() -> None:
    @pipeline
    def over() -> None:
        train.map([])

    assert build(over).steps["fit"].foreach == []


def test_a_placeholder_has_no_value_yet() -> None:
    placeholder = Placeholder("steps.load.output")
    with pytest.raises(InvalidPipeline, match=r"cannot be looped over; use step\.map"):
        list(placeholder)
    with pytest.raises(InvalidPipeline, match="cannot be tested"):
        bool(placeholder)
    with pytest.raises(InvalidPipeline, match="cannot be looped over"):
        _ = 1 in placeholder
    assert ITEM.template == "${{ item }}"


def test_looping_over_a_placeholder_in_a_pipeline_is_refused() -> None:
    @pipeline
    def looping(seed: int) -> None:
        for part in load(seed):
            train(part)

    with pytest.raises(InvalidPipeline, match=r"steps\.load\.output has no value"):
        build(looping)


@pytest.mark.parametrize("kind", [list, dict, "Any", bytes])
def test_a_parameter_needs_one_of_four_types(kind: Any) -> None:
    def typed(x: Any) -> None:
        load(x)

    typed.__annotations__["x"] = kind
    with pytest.raises(InvalidPipeline, match="'x' needs a type: int, float, str or bool"):
        build(pipeline(typed))


def test_a_parameter_without_a_type_is_refused() -> None:
    def untyped(x) -> None:  # type: ignore[no-untyped-def]
        load(x)

    with pytest.raises(InvalidPipeline, match="untyped: the parameter 'x' needs a type"):
        build(pipeline(untyped))


def test_all_four_types_are_parameters_and_those_without_default_are_required() -> None:
    @pipeline
    def typed(a: int, b: float, c: str, d: bool = False) -> None:
        report([a, b, c, d])

    spec = build(typed)
    assert [item.type for item in spec.parameters.values()] == ["int", "float", "str", "bool"]
    with pytest.raises(InvalidPipeline, match=r"parameters\.a: required"):
        spec.resolve_params({"b": 1.0, "c": ""})


def test_a_default_of_the_wrong_type_is_refused() -> None:
    @pipeline
    def wrong(a: int = "x") -> None:  # type: ignore[assignment]
        load(a)

    with pytest.raises(InvalidPipeline, match=r"test_definition\.py:\d+: parameters\.a: the default 'x' does not fit"):
        build(wrong)


def test_an_argument_that_is_not_json_is_refused_with_its_path() -> None:
    @pipeline
    def bad() -> None:
        report(object())

    with pytest.raises(InvalidPipeline, match=r"test_definition\.py:\d+: steps\.report\.with\.scores: "):
        build(bad)


def test_a_wrong_call_of_a_step_fails_where_it_is_written() -> None:
    @pipeline
    def wrong() -> None:
        load()  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="seed"):
        build(wrong)


def test_a_pipeline_without_steps_is_refused() -> None:
    @pipeline
    def empty() -> None:
        pass

    with pytest.raises(InvalidPipeline, match=r"test_definition\.py:\d+: steps: "):
        build(empty)


def test_the_name_can_be_chosen() -> None:
    @pipeline(name="other")
    def some() -> None:
        load(1)

    assert build(some).name == "other"


def test_building_twice_gives_the_same_digest() -> None:
    assert build(my_pipeline).digest == build(my_pipeline).digest
