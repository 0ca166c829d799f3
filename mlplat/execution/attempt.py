"""One attempt of one step, inside a worker process. The only place where user code is unpickled."""

from __future__ import annotations

import socket
import sys
from functools import cache
from typing import Any

from mlplat.artifacts.store import ArtifactStore
from mlplat.execution.attendant import Attended, Tell, attendant
from mlplat.execution.capture import captured_output, log_folder
from mlplat.execution.offspring import Offspring
from mlplat.pipelines.model import WHOLE_STEP, AttemptOutcome, AttemptRequest, AttemptState
from mlplat.pipelines.outputs import store_output
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.context import StepContext, enter_step
from mlplat.settings import PlatformConfig
from mlplat.steps.calls import call_step
from mlplat.steps.failures import error_types, is_refusal, summary, user_traceback
from mlplat.steps.working_dir import inside_working_dir

MAX_ERROR_CHARACTERS = 16_000


def run_attempt(request: AttemptRequest, config: PlatformConfig, tell: Tell) -> AttemptOutcome:
    """Runs the attempt to its end. A failure of the user's code is an outcome, not an exception.

    Processes that it has started end with it, unless it succeeds: what a later attempt may find useful stays.
    """
    artifacts = _artifacts(config.artifacts_url)
    folder = log_folder(request.run_id, request.step, request.item, request.attempt)
    with captured_output(artifacts, folder) as log:
        attended = Attended(request.label, tell, log, _node(), request.timeout_s is not None)
        context = _context(request, config, artifacts, attended)
        offspring, state = Offspring(), AttemptState.FAILED
        attendant().begin(attended)
        enter_step(context)
        output: dict[str, Any] | None = None
        error: str | None = None
        types: tuple[str, ...] = ()
        try:
            with inside_working_dir(request.working_dir, artifacts):
                output = store_output(call_step(request, artifacts, context), artifacts)
            state = AttemptState.SUCCEEDED
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)  # noqa: T201 - the attempt's log
            state, error = AttemptState.CANCELLED, "stopped"
        except BaseException as problem:  # whatever leaves this process would be unpickled by the platform's own
            text = user_traceback(problem)
            print(text, file=sys.stderr)  # noqa: T201 - the attempt's log
            error = describe(problem, text)
            state, types = AttemptState.FAILED, error_types(problem)
        finally:
            if state is not AttemptState.SUCCEEDED:
                offspring.end()
            enter_step(None)
            attendant().end()
        return AttemptOutcome(state, output, error, types, attended.started_at, attended.node)


def describe(problem: BaseException, text: str) -> str:
    """What the attempt says of its failure. Its traceback ``text`` is left out when no line of the user's is in it."""
    if is_refusal(problem):
        return str(problem)
    return f"{summary(problem)}\n\n{text[-MAX_ERROR_CHARACTERS:]}"


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
        Checkpoints(
            artifacts, request.checkpoints, request.attempt, request.keep_checkpoints, request.best_checkpoints
        ),
        on_progress,
    )


@cache
def _artifacts(url: str) -> ArtifactStore:
    return ArtifactStore(url)


@cache
def _node() -> str:
    return socket.gethostname()
