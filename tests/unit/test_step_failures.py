"""What a person reads of a failure in a step's code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

from mlplat.errors import InvalidInput
from mlplat.execution.attempt import describe
from mlplat.sdk.definition import step
from mlplat.sdk.shipping import load_module
from mlplat.steps.calls import call_function
from mlplat.steps.failures import error_types, summary, user_line, user_traceback
from mlplat.steps.functions import import_function

FILE = str(Path(__file__).resolve())


def failure_of(call: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - any
        call()
    error = caught.value
    # What pytest and this helper add in front of the call.
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_next is not None
    return error.with_traceback(error.__traceback__.tb_next)


def divide(by: int) -> float:
    return 1 / by  # the line that fails


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(Path(FILE).read_text().splitlines(), 1) if line.strip().startswith(text))


def test_frames_of_the_platform_around_the_users_are_left_out() -> None:
    error = failure_of(lambda: call_function(divide, {"by": 0}, None, "m:divide"))
    text = user_traceback(error)
    assert "mlplat/steps" not in text
    assert f'File "{FILE}", line {line_of("return 1 / by")}, in divide' in text
    assert text.endswith("ZeroDivisionError: division by zero")
    assert user_line(error) == (FILE, line_of("return 1 / by"))


def test_frames_of_the_platform_between_the_users_are_left_out() -> None:
    inner = step(divide)

    def outer() -> float:
        return inner(0)

    text = user_traceback(failure_of(outer))
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("  File")] == ["outer", "divide"]


def test_what_led_to_the_error_is_cleaned_too() -> None:
    def chained() -> None:
        try:
            call_function(divide, {"by": 0}, None, "m:divide")
        except ZeroDivisionError as error:
            raise ValueError("no ratio") from error

    text = user_traceback(failure_of(chained))
    assert "mlplat/steps" not in text
    assert "ZeroDivisionError: division by zero" in text
    assert "direct cause" in text
    assert text.endswith("ValueError: no ratio")


def test_errors_in_a_group_are_cleaned_too() -> None:
    def grouped() -> None:
        try:
            call_function(divide, {"by": 0}, None, "m:divide")
        except ZeroDivisionError as error:
            raise ExceptionGroup("several", [error]) from None

    text = user_traceback(failure_of(grouped))
    assert "mlplat/steps" not in text
    assert "in divide" in text


def test_an_error_that_leads_to_itself_ends() -> None:
    def circular() -> None:
        error = ValueError("round")
        error.__cause__ = RuntimeError("and round")
        error.__cause__.__cause__ = error
        raise error

    assert "ValueError: round" in user_traceback(failure_of(circular))


def test_a_shipped_function_keeps_its_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "training.py").write_text("def fit():\n    x = 1\n    raise KeyError('no such column')\n")
    monkeypatch.chdir(tmp_path)
    module = load_module(Path("training.py"))
    cloudpickle.register_pickle_by_value(module)
    body = cloudpickle.dumps(module.fit)
    del sys.modules[module.__name__]

    error = failure_of(lambda: call_function(cloudpickle.loads(body), {}, None, "pickle:0:fit"))
    assert user_line(error) == (str(tmp_path / "training.py"), 3)
    assert f'File "{tmp_path / "training.py"}", line 3, in fit' in user_traceback(error)


def test_what_the_platform_says_to_a_user_points_at_the_users_line() -> None:
    def misuse() -> None:
        raise InvalidInput("progress is a fraction")

    error = failure_of(lambda: call_function(misuse, {}, None, "m:misuse"))
    described = describe(error, user_traceback(error))
    assert described.startswith("InvalidInput: progress is a fraction\n\n")
    assert "in misuse" in described


def test_what_the_platform_says_by_itself_has_no_traceback() -> None:
    error = InvalidInput("there is no such function")
    assert describe(error, user_traceback(error)) == "there is no such function"


def test_a_module_that_fails_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_at_two.py").write_text("x = 1\nx / 0\n")
    (tmp_path / "breaks_in_syntax.py").write_text("x = 1\n\nx = = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(InvalidInput, match=r"ZeroDivisionError: division by zero \(.*breaks_at_two\.py:2\)"):
        import_function("breaks_at_two:f")
    with pytest.raises(InvalidInput, match=r"SyntaxError: .*\(.*breaks_in_syntax\.py:3\)"):
        import_function("breaks_in_syntax:f")


def test_a_summary_is_one_line_and_types_name_the_bases() -> None:
    assert summary(ValueError("one\ntwo")) == "ValueError: one"
    assert summary(ValueError()) == "ValueError: "
    assert error_types(ConnectionResetError())[:3] == (
        "builtins.ConnectionResetError", "builtins.ConnectionError", "builtins.OSError",
    )  # fmt: skip
