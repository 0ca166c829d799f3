"""One attempt in this process: what it leaves as its outcome, its log, and the process it ran in."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import read_text
from mlplat.execution.attempt import run_attempt
from mlplat.execution.attendant import Notice
from mlplat.execution.capture import log_folder
from mlplat.pipelines.model import AttemptOutcome, AttemptRequest, AttemptState
from mlplat.sdk.context import StepContext, current_step
from mlplat.settings import PlatformConfig


class Worker:
    """A process that runs attempts, one after another."""

    def __init__(self, folder: Path) -> None:
        self._url = f"file://{folder}"
        self.artifacts = ArtifactStore(self._url)
        self.told: list[Notice] = []
        self.attempts = 0

    def run(self, function: Callable[..., Any], **arguments: Any) -> AttemptOutcome:
        """The next attempt: a function."""
        target = f"pickle:{self.artifacts.put_blob(cloudpickle.dumps(function))}:m.f"
        return self.attempt("uses", target, arguments)

    def attempt(
        self, kind: str, target: str, arguments: dict[str, Any], timeout_s: float | None = None
    ) -> AttemptOutcome:
        """The next attempt."""
        self.attempts += 1
        request = AttemptRequest(
            "demo", "run", "step", 3, self.attempts, kind, target, arguments, max_attempts=9, timeout_s=timeout_s
        )
        before = sys.stdout, sys.stderr
        outcome = run_attempt(request, PlatformConfig("", "", "", self._url, "http://platform"), self.told.append)
        assert (sys.stdout, sys.stderr, current_step()) == (*before, None)
        return outcome

    @property
    def log(self) -> str:
        """Of the last attempt."""
        folder = log_folder("run", "step", 3, self.attempts)
        return read_text(self.artifacts, folder, Place(), 100_000, is_over=True).text


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_a_success_has_an_output_and_everything_that_was_printed(worker: Worker) -> None:
    def double(x: int) -> int:
        print("printed")
        subprocess.run(["/bin/sh", "-c", "echo child; echo error >&2"], check=True)
        return 2 * x

    outcome = worker.run(double, x=21)
    assert (outcome.state, outcome.output, outcome.error) == (
        AttemptState.SUCCEEDED, {"kind": "json", "value": 42}, None,
    )  # fmt: skip
    assert outcome.started_at is not None
    assert outcome.node
    assert worker.log == "printed\nchild\nerror\n"


def test_attempts_of_one_process_have_logs_of_their_own(worker: Worker) -> None:
    logs = []
    for _turn in range(3):
        worker.run(lambda n: print("attempt", n, end=""), n=worker.attempts)
        logs.append(worker.log)
    assert logs == ["attempt 0", "attempt 1", "attempt 2"]


def test_a_failure_says_the_same_in_its_outcome_and_its_log(worker: Worker) -> None:
    def fail() -> None:
        print("before")
        1 / 0  # noqa: B018 - the line that fails

    outcome = worker.run(fail)
    assert (outcome.state, outcome.output) == (AttemptState.FAILED, None)
    assert outcome.error is not None
    first, _empty, traceback = outcome.error.partition("\n\n")
    assert first == "ZeroDivisionError: division by zero"
    assert "in fail" in traceback
    assert worker.log == f"before\n{traceback}\n"
    assert outcome.error_types[:2] == ("builtins.ZeroDivisionError", "builtins.ArithmeticError")


def _exit() -> None:
    sys.exit(3)


def _too_long() -> None:
    raise ValueError("x" * 100_000)


class Odd(BaseException):
    """No ``Exception``."""


class Untold(Exception):
    def __str__(self) -> str:
        raise Odd


def _odd() -> None:
    raise Odd("odd")


def _untold() -> None:
    raise Untold


@pytest.mark.parametrize(
    ("function", "error", "of_type"),
    [
        (_exit, "SystemExit: 3\n\n", "builtins.SystemExit"),
        (_odd, "Odd: odd\n\n", "builtins.BaseException"),
        (_untold, "Untold: (its text cannot be told)\n\n", "builtins.Exception"),
        (threading.Lock, "the output, a lock, cannot be pickled", "mlplat.errors.InvalidInput"),
        (lambda x: x, "pickle:", "mlplat.errors.InvalidInput"),
        (_too_long, "ValueError: xxx", "builtins.ValueError"),
    ],
)
def test_whatever_goes_wrong_is_an_outcome(
    function: Callable[..., Any], error: str, of_type: str, worker: Worker
) -> None:
    outcome = worker.run(function)
    assert outcome.state is AttemptState.FAILED
    assert outcome.error is not None
    assert outcome.error.startswith(error)
    assert len(outcome.error) < 20_000
    assert of_type in outcome.error_types


def test_a_function_that_is_not_there_is_no_failure_of_the_users_code(worker: Worker) -> None:
    outcome = worker.attempt("uses", "no_such_module_here:f", {})
    assert outcome.error == (
        "cannot import 'no_such_module_here': ModuleNotFoundError: No module named 'no_such_module_here'"
    )


def test_an_attempt_that_is_stopped_is_cancelled_and_not_failed(worker: Worker) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    outcome = worker.run(stopped)
    assert (outcome.state, outcome.error, outcome.error_types) == (AttemptState.CANCELLED, "stopped", ())
    assert worker.log == "stopped\n"


def test_the_code_knows_which_attempt_it_is(worker: Worker) -> None:
    def tell(ctx: StepContext) -> list[Any]:
        assert current_step() == ctx
        return [ctx.label, ctx.pipeline, ctx.item, ctx.attempt, ctx.max_attempts, ctx.http_url]

    for number in (1, 2):
        expected = [f"run/step/3/{number}", "demo", 3, number, 9, "http://platform"]
        assert worker.run(tell).output == {"kind": "json", "value": expected}


def test_with_a_timeout_its_start_is_told_at_once_and_as_it_is_in_the_outcome(worker: Worker) -> None:
    outcome = worker.attempt("command", "true", {}, timeout_s=60)
    assert outcome.started_at is not None
    assert worker.told == [Notice("run/step/3/1", outcome.started_at, outcome.node)]


def test_a_store_that_takes_no_log_fails_no_attempt(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    worker = Worker(tmp_path / "file" / "store")
    outcome = worker.attempt("command", "echo nobody will read this", {})
    assert (outcome.state, outcome.error) == (AttemptState.SUCCEEDED, None)
