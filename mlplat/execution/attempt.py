"""One attempt of one step, inside a worker process. The only place where user code is unpickled."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import cloudpickle

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput, PlatformError
from mlplat.execution.capture import captured_output, log_folder
from mlplat.pipelines.model import WHOLE_STEP, AttemptOutcome, AttemptRequest, AttemptState
from mlplat.pipelines.outputs import load_arguments, store_output
from mlplat.sdk.context import StepContext, enter_step
from mlplat.settings import PlatformConfig

MAX_ERROR_CHARACTERS = 16_000


def run_attempt(request: AttemptRequest, config: PlatformConfig) -> AttemptOutcome:
    """Runs the attempt to its end. A failure of the user's code is an outcome, not an exception."""
    artifacts = ArtifactStore(config.artifacts_url)
    folder = log_folder(request.run_id, request.step, request.item, request.attempt)
    enter_step(
        StepContext(
            request.pipeline,
            request.run_id,
            request.step,
            None if request.item == WHOLE_STEP else request.item,
            request.attempt,
            request.max_attempts,
            config.http_url,
        )
    )
    with captured_output(artifacts, folder):
        try:
            function = load_function(request.uses, artifacts)
            arguments = load_arguments(request.arguments, artifacts)
            _check_arguments(function, arguments, request.uses)
            return AttemptOutcome(AttemptState.SUCCEEDED, store_output(function(**arguments), artifacts))
        except PlatformError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - the attempt's log
            return AttemptOutcome(AttemptState.FAILED, error=str(error))
        except (Exception, SystemExit) as error:
            text = user_traceback(error)
            print(text, file=sys.stderr)  # noqa: T201 - the attempt's log
            return AttemptOutcome(AttemptState.FAILED, error=f"{_summary(error)}\n\n{text[-MAX_ERROR_CHARACTERS:]}")


def load_function(uses: str, artifacts: ArtifactStore) -> Callable[..., Any]:
    """The function that a step uses.

    Raises:
        InvalidInput: there is no such module or function.
    """
    if uses.startswith("pickle:"):
        function: Callable[..., Any] = cloudpickle.loads(artifacts.get_blob(uses.split(":")[1]))
        return function
    module_name, _colon, qualified = uses.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's own code
        raise InvalidInput(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    for part in qualified.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise InvalidInput(f"module {module_name!r} has no function {qualified!r}") from error
    target = getattr(target, "function", target)  # a function marked with @step
    if not callable(target):
        raise InvalidInput(f"{uses!r} is a {type(target).__name__}, not a function")
    callable_target: Callable[..., Any] = target
    return callable_target


def find_import_problems(names: Sequence[str]) -> dict[str, str]:
    """Tries ``module:function`` names and maps those that cannot be loaded to the reason."""
    problems: dict[str, str] = {}
    for name in names:
        try:
            load_function(name, artifacts=None)  # type: ignore[arg-type]  # names never touch the store
        except InvalidInput as error:
            problems[name] = error.message
    return problems


def user_traceback(error: BaseException) -> str:
    """The traceback from the user's first line on, without this module's frames."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename == __file__:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame)).rstrip()


def _summary(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:500]


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], uses: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin without a signature: calling it will tell
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InvalidInput(f"{uses} cannot be called with ({', '.join(arguments)}): {error}") from error
