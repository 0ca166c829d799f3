"""One attempt of one step, inside a worker process. The only place where user code is unpickled."""

from __future__ import annotations

import inspect
import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import PlatformError
from mlplat.execution.attendant import Attended, Tell, attendant
from mlplat.execution.capture import captured_output, log_folder
from mlplat.execution.commands import run_command
from mlplat.execution.functions import check_arguments, load_function
from mlplat.execution.notebooks import run_notebook
from mlplat.execution.working_dir import inside_working_dir
from mlplat.pipelines.model import WHOLE_STEP, AttemptOutcome, AttemptRequest, AttemptState
from mlplat.pipelines.outputs import load_arguments, store_output
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.context import StepContext, enter_step
from mlplat.settings import PlatformConfig

MAX_ERROR_CHARACTERS = 16_000
#: Folders whose frames say nothing to the user: this package's own.
_OWN = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - compared with code's file names


def run_attempt(request: AttemptRequest, config: PlatformConfig, tell: Tell) -> AttemptOutcome:
    """Runs the attempt to its end. A failure of the user's code is an outcome, not an exception."""
    artifacts = _artifacts(config.artifacts_url)
    folder = log_folder(request.run_id, request.step, request.item, request.attempt)
    with captured_output(artifacts, folder) as log:
        attended = Attended(request.label, tell, log, _node(), request.timeout_s is not None)
        context = _context(request, config, artifacts, attended)
        attendant().begin(attended)
        enter_step(context)
        output: dict[str, Any] | None = None
        error: str | None = None
        types: tuple[str, ...] = ()
        try:
            with inside_working_dir(request.working_dir, artifacts):
                output = store_output(_call(request, artifacts, context), artifacts)
            state = AttemptState.SUCCEEDED
        except PlatformError as problem:
            print(f"{type(problem).__name__}: {problem}", file=sys.stderr)  # noqa: T201 - the attempt's log
            state, error, types = AttemptState.FAILED, str(problem), _types(problem)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)  # noqa: T201 - the attempt's log
            state, error = AttemptState.CANCELLED, "stopped"
        except (Exception, SystemExit) as problem:
            text = user_traceback(problem)
            print(text, file=sys.stderr)  # noqa: T201 - the attempt's log
            error = f"{_summary(problem)}\n\n{text[-MAX_ERROR_CHARACTERS:]}"
            state, types = AttemptState.FAILED, _types(problem)
        finally:
            enter_step(None)
            attendant().end()
        return AttemptOutcome(state, output, error, types, attended.started_at, attended.node)


def user_traceback(error: BaseException) -> str:
    """The traceback from the user's first line on, without this package's frames."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename.startswith(_OWN):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame)).rstrip()


def _call(request: AttemptRequest, artifacts: ArtifactStore, context: StepContext) -> Any:
    arguments = load_arguments(dict(request.arguments), artifacts)
    if request.kind == "command":
        return run_command(request.target, arguments, request.label)
    target = str(request.target)
    if request.kind == "notebook":
        return run_notebook(target, arguments, artifacts, f"pipelines/{request.run_id}/notebooks/{request.step}")
    function = load_function(target, artifacts)
    if "ctx" not in arguments and takes_context(function):
        arguments["ctx"] = context
    check_arguments(function, arguments, target)
    return function(**arguments)


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether the function has a parameter ``ctx``, which gets the ``StepContext``."""
    try:
        return "ctx" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _context(
    request: AttemptRequest, config: PlatformConfig, artifacts: ArtifactStore, attended: Attended
) -> StepContext:
    def on_progress(progress: dict[str, Any]) -> None:
        attended.progress = progress

    return StepContext(
        request.pipeline,
        request.run_id,
        request.step,
        None if request.item == WHOLE_STEP else request.item,
        request.attempt,
        request.max_attempts,
        config.http_url,
        Checkpoints(artifacts, request.checkpoints, request.attempt, request.keep_checkpoints),
        on_progress,
    )


@cache
def _artifacts(url: str) -> ArtifactStore:
    return ArtifactStore(url)


@cache
def _node() -> str:
    return socket.gethostname()


def _types(error: BaseException) -> tuple[str, ...]:
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__ if base is not object)


def _summary(error: BaseException) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:500]
