"""All that a definition can say, said in Python."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.spec import Cache, Checkpoint, Concurrency, Env, PipelineSpec, Retry
from mlplat.sdk.context import StepContext
from mlplat.sdk.definition import (
    ITEM,
    Param,
    Pipeline,
    approval,
    command,
    expression,
    finally_,
    notebook,
    pipeline,
    step,
    this_run,
)

HERE = Path(__file__)


def build(defined: Pipeline) -> PipelineSpec:
    return defined.build(lambda body: hashlib.sha256(body).hexdigest())


@step
def load(n: int) -> list[int]:
    return list(range(n))


@step
def fit(x: int, rate: float = 0.1) -> float:
    return x * rate


@step
def clean() -> None:
    pass


def test_every_option_reaches_the_definition() -> None:
    options: Any = {
        "description": "Heavy.", "timeout_s": 5.0, "cpus": 2, "gpus": 1, "memory_mb": 10, "accelerator": "H100",
        "custom": {"disk": 1}, "env": Env(packages=["numpy"], variables={"A": "b"}), "cache": Cache(version="2"),
        "checkpoint": Checkpoint(keep=5), "durable": False, "fresh_process": True,
        "retry": Retry(max_attempts=4, on=[ConnectionError, "mine.Odd"], never_on=["KeyError"]),
    }  # fmt: skip

    @pipeline
    def one() -> None:
        load.with_options(name="heavy", **options)(1)

    heavy = build(one).steps["heavy"]
    assert (heavy.description, heavy.timeout_s, heavy.durable, heavy.fresh_process) == ("Heavy.", 5.0, False, True)
    assert heavy.resources.model_dump() == {
        "cpus": 2.0, "gpus": 1.0, "memory_mb": 10, "accelerator": "H100", "custom": {"disk": 1.0},
    }  # fmt: skip
    assert (heavy.env, heavy.caching, heavy.checkpoint) == (options["env"], Cache(version="2"), Checkpoint(keep=5))
    assert heavy.retry.on == ["ConnectionError", "mine.Odd"]
    assert heavy.retry.never_on == ["KeyError"]


def test_options_of_a_pipeline_and_its_parameters() -> None:
    @pipeline(
        name="other", description="Says more.", timeout_s=60, priority=5, concurrency=Concurrency(key="k", limit=2),
        env=Env(variables={"A": "b"}),
    )  # fmt: skip
    def some(
        trials: Annotated[int, Param(min=2, max=9, description="How many.")], kind: Literal["a", "b"] = "a"
    ) -> Any:
        return {"kind": kind, "all": [load(trials), 1]}

    spec = build(some)
    assert (spec.name, spec.description, spec.timeout_s, spec.priority) == ("other", "Says more.", 60, 5)
    assert (spec.concurrency, spec.env) == (Concurrency(key="k", limit=2), Env(variables={"A": "b"}))
    assert spec.parameters["trials"].model_dump(exclude_defaults=True) == {
        "type": "int", "min": 2, "max": 9, "description": "How many.",
    }  # fmt: skip
    assert spec.parameters["kind"].choices == ["a", "b"]
    assert spec.outputs == {"kind": "${{ params.kind }}", "all": ["${{ steps.load.output }}", 1]}


def test_kinds_of_steps() -> None:
    fetch = command("curl $URL", name="fetch")
    explore = notebook("explore it.ipynb")
    ask = approval("Go?", approvers=["ann"], not_submitter=True)

    @pipeline
    def kinds(rate: float) -> None:
        fetch(URL="x", rate=rate)
        command(["echo", f"{rate}"], name="show")()
        ask.after(fetch)()

    spec = build(kinds)
    assert spec.steps["fetch"].command == "curl $URL"
    assert spec.steps["fetch"].with_ == {"URL": "x", "rate": "${{ params.rate }}"}
    assert spec.steps["show"].command == ["echo", "${{ params.rate }}"]
    assert spec.steps["approval"].approval is not None
    assert spec.steps["approval"].approval.model_dump() == {
        "message": "Go?", "approvers": ["ann"], "not_submitter": True,
    }  # fmt: skip
    assert spec.steps["approval"].needs == ["fetch"]
    assert explore.name == "explore_it"


def test_order_without_data() -> None:
    @pipeline
    def ordered() -> None:
        first = load(1)
        second = load(2)
        clean.after(first, second)()
        fit.with_options(needs=["load"]).after(clean)(1)
        fit.after(expression("length(steps.load_2.output)"))(2)

    spec = build(ordered)
    assert spec.steps["clean"].needs == ["load", "load_2"]
    assert spec.steps["fit"].needs == ["load", "clean"]
    assert spec.steps["fit_2"].needs == ["load_2"]


def test_nothing_can_come_after_what_is_no_step_here() -> None:
    @pipeline
    def early(n: int) -> None:
        fit.after(clean)(1)

    @pipeline
    def late(n: int) -> None:
        fit.after(n)(1)

    with pytest.raises(InvalidPipeline, match="clean is no step of this pipeline"):
        build(early)
    with pytest.raises(InvalidPipeline, match=r"params\.n is no step's output"):
        build(late)


def test_conditions_and_their_join() -> None:
    @pipeline
    def conditional(go: bool) -> None:
        score = fit(1)
        load.when(score > 0.5).when(go)(1)
        load.when("steps.fit.output")(1)

    spec = build(conditional)
    assert spec.steps["load"].when == "${{ (steps.fit.output > `0.5`) && params.go }}"
    assert spec.steps["load_2"].when == "${{ steps.fit.output }}"


def test_fan_outs_with_items_that_have_parts() -> None:
    @pipeline
    def grid() -> None:
        fit.map([{"a": 1, "r": 0.5}], x=ITEM["a"], rate=ITEM["r"], max_parallel=3)
        command("echo $item", name="echo").map([1, 2])

    spec = build(grid)
    assert spec.steps["fit"].with_ == {"x": '${{ item."a" }}', "rate": '${{ item."r" }}'}
    assert (spec.steps["fit"].foreach, spec.steps["fit"].max_parallel) == ([{"a": 1, "r": 0.5}], 3)
    assert spec.steps["echo"].with_ == {"item": "${{ item }}"}
    assert fit.map([{"a": 1, "r": 0.5}], x=ITEM["a"], rate=ITEM["r"]) == [0.5]


@pipeline
def inner(x: int, rate: float = 1.0) -> Any:
    """Fits."""
    return fit(x, rate)


@pipeline
def named(x: int) -> Any:
    return {"score": fit(x), "twice": [fit(x)]}


def test_a_pipeline_in_a_pipeline_is_a_step() -> None:
    @pipeline
    def outer(n: int) -> Any:
        one = inner(n)
        two = named.with_options(name="second", retries=1).after(one)(x=2)
        many = inner.map([1, 2], rate=0.5)
        return {"one": one, "two": two["score"], "many": many}

    spec = build(outer)
    first, second, many = spec.steps["inner"], spec.steps["second"], spec.steps["inner_2"]
    assert first.pipeline is not None
    assert (first.pipeline.name, first.description) == ("inner", "Fits.")
    assert (first.with_, many.with_) == ({"x": "${{ params.n }}"}, {"x": "${{ item }}", "rate": 0.5})
    assert (second.needs, second.retry.max_attempts) == (["inner"], 2)
    assert spec.outputs == {
        "one": "${{ steps.inner.output.output }}",
        "two": '${{ steps.second.output."score" }}',
        "many": "${{ map(&output, steps.inner_2.output) }}",
    }


def test_a_pipeline_that_contains_itself_is_refused() -> None:
    @pipeline
    def endless(x: int) -> None:
        endless(x)

    with pytest.raises(InvalidPipeline, match="'endless' contains itself"):
        build(endless)


def test_finally_steps() -> None:
    @pipeline
    def cleaned() -> None:
        load(1)
        with finally_():
            fit(1)
            load.when(this_run.state == "FAILED").after(fit)(2)

    spec = build(cleaned)
    assert (list(spec.steps), list(spec.finally_)) == (["load"], ["fit", "load_2"])
    assert spec.finally_["load_2"].when == '${{ run.state == `"FAILED"` }}'
    assert spec.finally_["load_2"].needs == ["fit"]


def test_finally_inside_finally_is_refused() -> None:
    @pipeline
    def twice() -> None:
        with finally_(), finally_():
            load(1)

    with pytest.raises(InvalidPipeline, match="finally_ inside finally_"):
        build(twice)


def test_the_context_is_none_of_a_definitions_arguments() -> None:
    @step
    def informed(ctx: StepContext, x: int) -> int:
        return x + ctx.attempt

    @pipeline
    def one() -> None:
        informed(x=1)  # type: ignore[call-arg]
        informed.map([1])

    spec = build(one)
    assert spec.steps["informed"].with_ == {"x": 1}
    assert spec.steps["informed_2"].with_ == {"x": "${{ item }}"}
    assert informed(x=1) == 2  # type: ignore[call-arg]


def test_outside_of_a_pipeline_all_of_it_is_plain(tmp_path: Path) -> None:
    @pipeline
    def all_of_it(n: int) -> Any:
        data = load(n)
        skipped = fit.when(n > 5)(1)
        with finally_():
            clean.after(data)()
        return {"data": data, "skipped": skipped, "inner": inner(n), "many": named.map([1])}

    assert all_of_it(2) == {"data": [0, 1], "skipped": None, "inner": 2.0, "many": [{"score": 0.1, "twice": [0.1]}]}
    assert command('echo "[$X]" > $MLPLAT_OUTPUT', name="c")(X=3) == [3]
    with pytest.raises(InvalidPipeline, match="approval can only be called in a pipeline"):
        approval()()
    with pytest.raises(InvalidPipeline, match="can be tested only when a pipeline runs"):
        fit.when("params.n")(1)


def test_options_that_do_not_exist_are_refused_where_they_are_written() -> None:
    with pytest.raises(TypeError, match="has no option 'retrys'; did you mean 'retr"):
        step(retrys=1)(len)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="has no option 'timeout'; did you mean 'timeout_s'"):
        load.with_options(timeout=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="a pipeline has no option 'nam'"):
        pipeline(nam="x")(len)  # type: ignore[call-overload]
    with pytest.raises(InvalidPipeline, match="retries and retry say the same"):
        step(retries=1, retry=Retry())(len)


def test_the_later_of_retry_and_retries_counts() -> None:
    @step(retry=Retry(max_attempts=9, initial_s=3))
    def flaky() -> None:
        pass

    @pipeline
    def three() -> None:
        flaky.with_options(retries=1)()
        flaky.with_options(retries=1).with_options(retry=Retry(max_attempts=5))()
        flaky()

    assert [found.retry.max_attempts for found in build(three).steps.values()] == [2, 5, 9]


def test_problems_come_with_the_line_of_the_call() -> None:
    @pipeline
    def wrong() -> None:
        load.with_options(cpus=-1)(1)

    with pytest.raises(InvalidPipeline) as caught:
        build(wrong)
    line = next(n for n, text in enumerate(HERE.read_text().splitlines(), 1) if "cpus=-1" in text)
    assert caught.value.message == (
        f"{HERE}:{line}: steps.load.resources.cpus: Input should be greater than or equal to 0"
    )


def test_arguments_of_commands_and_notebooks_have_names() -> None:
    with pytest.raises(TypeError):
        command("ls", name="ls")("x")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        notebook("a.ipynb")("x")  # type: ignore[call-arg]


def test_a_type_that_is_not_known_is_told() -> None:
    def unknown(x: int) -> None:
        load(x)

    unknown.__annotations__["x"] = "NoSuchType"
    with pytest.raises(InvalidPipeline, match="the type of a parameter is not known here: name 'NoSuchType'"):
        build(pipeline(unknown))
