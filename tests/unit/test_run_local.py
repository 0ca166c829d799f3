"""Pipelines in the user's own process, by the rules of the platform."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlplat.errors import InvalidInput, InvalidPipeline, PipelineFailed
from mlplat.pipelines.model import State
from mlplat.pipelines.spec import Checkpoint, Env, Retry
from mlplat.sdk.context import StepContext, current_step
from mlplat.sdk.definition import approval, command, finally_, notebook, pipeline, step, this_run
from mlplat.sdk.local_run import LocalOptions, LocalRun

HERE = Path(__file__)


def quietly(**options: Any) -> LocalOptions:
    return LocalOptions(**{"sleep": lambda seconds: None, "echo": lambda line: None, **options})


def states(run: LocalRun) -> dict[str, str]:
    return {name: str(found.state) for name, found in run.steps.items()}


@step
def load(n: int) -> list[int]:
    return list(range(n))


@step
def square(x: int) -> int:
    return x * x


@step
def total(values: Any) -> int:
    return sum(values)


@step
def fail(why: str) -> None:
    raise RuntimeError(why)


@step
def note(what: Any) -> Any:
    return what


def test_outputs_of_steps_and_of_the_pipeline() -> None:
    @pipeline
    def squares(n: int = 3) -> Any:
        parts = square.map(load(n), max_parallel=1)
        return {"sum": total(parts), "n": n}

    run = squares.run_local(n=4)
    assert (run.state, run.error, run.params, run.pipeline) == (State.SUCCEEDED, None, {"n": 4}, "squares")
    assert run.steps["square"].output == [0, 1, 4, 9]
    assert run.steps["square"].items is not None
    assert [item.output for item in run.steps["square"].items] == [0, 1, 4, 9]
    assert run.output == {"sum": 14, "n": 4}
    assert squares.run_local().output == {"sum": 5, "n": 3}


def test_parameters_are_checked_before_anything_runs() -> None:
    @pipeline
    def one(n: int) -> None:
        fail("ran")

    with pytest.raises(InvalidPipeline, match=r"parameters\.n: expected int"):
        one.run_local(n="x")
    with pytest.raises(InvalidPipeline, match=r"parameters\.n: required"):
        one.run_local()


class Table:
    def __init__(self, rows: list[int]) -> None:
        self.rows = rows


def test_objects_that_are_not_json_pass_between_steps() -> None:
    @step
    def make() -> Table:
        return Table([1, 2])

    @step
    def use(table: Table) -> int:
        table.rows.append(3)  # its own copy, as on the platform
        return sum(table.rows)

    @pipeline
    def objects() -> None:
        made = make()
        use(made)
        use(made)

    run = objects.run_local()
    assert (run.steps["use"].output, run.steps["use_2"].output) == (6, 6)
    assert run.steps["make"].output.rows == [1, 2]


def test_what_cannot_be_stored_fails_as_on_the_platform() -> None:
    @step
    def bad() -> Iterator[int]:
        return (x for x in [1])

    @pipeline
    def one() -> None:
        bad()

    with pytest.raises(InvalidInput, match="cannot be pickled"):
        one.run_local(quietly())


def test_a_failure_is_the_users_own_exception_at_its_line() -> None:
    @pipeline
    def failing() -> None:
        fail("no data")

    with pytest.raises(RuntimeError, match="no data") as caught:
        failing.run_local(quietly())
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    line = next(n for n, text in enumerate(HERE.read_text().splitlines(), 1) if "raise RuntimeError(why)" in text)
    assert (Path(last.filename), last.lineno) == (HERE, line)
    assert caught.value.__notes__ == ["step 'fail' of 'failing', attempt 1"]


def test_a_failure_leaves_the_rest_as_the_rules_say() -> None:
    @pipeline
    def failing() -> None:
        broken = fail("x")
        note.after(broken)(1)
        note(2)
        with finally_():
            note({"state": this_run.state})

    run = failing.run_local(quietly(raise_errors=False))
    assert states(run) == {"fail": "FAILED", "note": "SKIPPED", "note_2": "SUCCEEDED", "note_3": "SUCCEEDED"}
    assert run.steps["note_3"].output == {"state": "FAILED"}
    assert run.error == "step 'fail' failed: RuntimeError: x"
    assert isinstance(run.steps["fail"].exception, RuntimeError)
    with pytest.raises(RuntimeError):
        run.raise_error()


def test_retries_wait_and_only_for_what_is_worth_it() -> None:
    waits: list[float] = []
    lines: list[str] = []

    @step(retry=Retry(max_attempts=3, initial_s=100, factor=2, cap_s=1000, jitter=0, on=[ConnectionError]))
    def flaky(ctx: StepContext) -> int:
        if ctx.attempt == 1:
            raise ConnectionResetError("gone")
        if ctx.attempt == 2:
            raise ConnectionError("again")
        return ctx.attempt

    @step(retry=Retry(max_attempts=3, on=[ConnectionError]))
    def hopeless() -> None:
        raise KeyError("x")

    @pipeline
    def retried() -> None:
        flaky()  # type: ignore[call-arg]
        hopeless()

    run = retried.run_local(LocalOptions(raise_errors=False, sleep=waits.append, echo=lines.append))
    assert (run.steps["flaky"].output, run.steps["flaky"].attempts, run.steps["flaky"].exception) == (3, 3, None)
    assert (run.steps["hopeless"].state, run.steps["hopeless"].attempts) == (State.FAILED, 1)
    assert [round(seconds, -2) for seconds in waits] == [100, 200]
    assert lines[0] == "flaky: attempt 1 failed: ConnectionResetError: gone"


def test_conditions() -> None:
    @pipeline
    def conditional(n: int) -> None:
        count = total(load(n))
        skipped = note.with_options(name="big").when(count > 10)(count)
        note.with_options(name="small").when(~(count > 10))(count)
        note.with_options(name="last")([skipped])

    assert states(conditional.run_local(n=2)) == {
        "load": "SUCCEEDED", "total": "SUCCEEDED", "big": "SKIPPED", "small": "SUCCEEDED", "last": "SUCCEEDED",
    }  # fmt: skip
    assert conditional.run_local(n=9).steps["big"].output == 36


def test_an_expression_that_fails_is_no_exception_of_the_user() -> None:
    @pipeline
    def wrong() -> None:
        note.map(total([1]))

    with pytest.raises(PipelineFailed, match="foreach must give a list, not int"):
        wrong.run_local()


def test_approvals_are_given_or_asked_for() -> None:
    asked: list[tuple[str, str]] = []

    @pipeline
    def gated() -> None:
        first = approval("Deploy?", name="gate")()
        second = approval("Sure?", name="again").after(first)()
        note(second)

    def decide(name: str, message: str) -> bool:
        asked.append((name, message))
        return name == "gate"

    assert gated.run_local().steps["note"].output["approved"] is True
    run = gated.run_local(quietly(approve=decide, raise_errors=False))
    assert asked == [("gate", "Deploy?"), ("again", "Sure?")]
    assert states(run) == {"gate": "SUCCEEDED", "again": "FAILED", "note": "SKIPPED"}
    with pytest.raises(PipelineFailed, match="step 'again' failed: rejected by"):
        gated.run_local(quietly(approve=decide))


def test_sub_pipelines_go_on_from_their_earlier_attempt() -> None:
    calls: list[str] = []

    @step
    def once() -> int:
        calls.append("once")
        return 1

    @step
    def twice(x: int) -> int:
        calls.append("twice")
        if calls.count("twice") == 1:
            raise OSError("disk")
        return x + 1

    @pipeline
    def inner() -> Any:
        return twice(once())

    @pipeline
    def outer() -> Any:
        return {"result": inner.with_options(retries=1)()}

    run = outer.run_local(quietly())
    assert run.output == {"result": 2}
    assert run.steps["inner"].attempts == 2
    assert calls == ["once", "twice", "twice"]


def test_an_error_in_a_sub_pipeline_is_the_error() -> None:
    @pipeline
    def inner(why: str) -> None:
        fail(why)

    @pipeline
    def outer() -> None:
        inner("deep")

    with pytest.raises(RuntimeError, match="deep") as caught:
        outer.run_local(quietly())
    assert [text.split(",")[0] for text in caught.value.__notes__] == [
        "step 'fail' of 'inner'", "step 'inner' of 'outer'",
    ]  # fmt: skip


def test_checkpoints_reach_the_next_attempt_and_can_be_kept(tmp_path: Path) -> None:
    @step(retries=1, checkpoint=Checkpoint(keep=1))
    def long(ctx: StepContext) -> list[int]:
        done: list[int] = ctx.checkpoint.load([])
        for number in range(len(done), 4):
            done.append(number)
            ctx.checkpoint.save(done)
            if number == 1 and ctx.attempt == 1:
                raise OSError("lost")
        return [*done, ctx.attempt]

    @pipeline
    def one() -> None:
        long()  # type: ignore[call-arg]

    assert one.run_local(quietly(folder=tmp_path)).steps["long"].output == [0, 1, 2, 3, 2]
    assert list(tmp_path.rglob("checkpoints/long/-1/*.json"))


def test_progress_is_shown_and_the_step_is_known() -> None:
    lines: list[str] = []

    @step
    def slow(ctx: StepContext) -> list[Any]:
        ctx.progress(0.25, "reading")
        ctx.progress(None, "waiting")
        here = current_step()
        assert here is not None
        return [here.step, here.pipeline, here.is_local]

    @pipeline
    def one() -> None:
        slow()  # type: ignore[call-arg]

    assert one.run_local(quietly(echo=lines.append)).steps["slow"].output == ["slow", "one", True]
    assert lines == ["slow: 25% reading", "slow: waiting"]
    assert current_step() is None


def test_commands_and_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "before")

    @step(env=Env(variables={"KEPT": "own", "NEW": "x"}))
    def variables() -> list[str | None]:
        return [os.environ.get(name) for name in ("KEPT", "NEW")]

    @pipeline(env=Env(variables={"SHARED": "all"}))
    def environments(word: str) -> None:
        variables()
        command('printf \'{"word": "%s", "shared": "%s"}\' "$WORD" "$SHARED" > $MLPLAT_OUTPUT', name="say")(WORD=word)

    run = environments.run_local(word="it's; exit 1")
    assert run.steps["variables"].output == ["own", "x"]
    assert run.steps["say"].output == {"word": "it's; exit 1", "shared": "all"}
    assert (os.environ["KEPT"], "NEW" in os.environ) == ("before", False)


def test_a_working_dir_is_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "beside_the_step.py").write_text("ANSWER = 42\n")

    @step(env=Env(working_dir=str(source)))
    def inside() -> list[Any]:
        import beside_the_step  # type: ignore[import-not-found]  # noqa: PLC0415

        return [beside_the_step.ANSWER, str(Path.cwd())]

    @pipeline
    def one() -> None:
        inside()

    before, path = Path.cwd(), list(sys.path)
    assert one.run_local().steps["inside"].output == [42, str(source)]
    assert (Path.cwd(), sys.path) == (before, path)


def test_notebooks_run_too(tmp_path: Path) -> None:
    cell: dict[str, Any] = {
        "cell_type": "code",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        "source": "n * 2",
    }
    file = tmp_path / "explore.ipynb"
    file.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))

    @pipeline
    def one() -> None:
        notebook(str(file))(n=21)

    output = one.run_local(quietly(folder=tmp_path / "kept")).steps["explore"].output
    executed = json.loads((tmp_path / "kept" / output["notebook"]).read_text())
    assert executed["cells"][-1]["outputs"][0]["data"]["text/plain"] in ("42", ["42"])


def test_ctrl_c_ends_the_run_after_its_finally_steps() -> None:
    seen: list[str] = []

    @step
    def interrupted() -> None:
        raise KeyboardInterrupt

    @step
    def last(state: str) -> None:
        seen.append(state)

    @pipeline
    def inner() -> None:
        interrupted()

    @pipeline
    def stopped() -> None:
        inner()
        note(1)
        with finally_():
            last(this_run.state)

    with pytest.raises(KeyboardInterrupt):
        stopped.run_local(quietly())
    assert seen == ["CANCELLED"]


def test_timeouts_leave_time_for_a_debugger() -> None:
    @pipeline(timeout_s=10)
    def one() -> None:
        fail.with_options(retry=Retry(max_attempts=3, initial_s=1_000, cap_s=1_000), timeout_s=1)("x")

    run = one.run_local(quietly(raise_errors=False))
    assert (run.steps["fail"].attempts, run.error) == (3, "step 'fail' failed: RuntimeError: x")
