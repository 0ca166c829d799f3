"""Runs of pipelines in the user's own process, by the same rules as on the platform."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import PipelineFailed
from mlplat.pipelines.machine import RunMachine
from mlplat.pipelines.model import (
    WHOLE_STEP,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    ChildRequest,
    Node,
    PipelineRun,
    RunSnapshot,
    Signal,
    SignalKind,
    State,
    StepRun,
)
from mlplat.pipelines.outputs import load_arguments, store_output
from mlplat.pipelines.resume import reusable
from mlplat.pipelines.scope import stored_output
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.stored import open_for_expressions
from mlplat.sdk.capture.entry import user
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.context import StepContext, current_step, enter_step
from mlplat.sdk.shipping import Shipper
from mlplat.settings import Settings
from mlplat.steps.calls import call_step
from mlplat.steps.failures import error_types, from_users_frame, is_refusal, summary
from mlplat.steps.functions import load_function
from mlplat.steps.working_dir import inside_folder

Request = AttemptRequest | ChildRequest


def _print(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201 - the user's own terminal


@dataclass(frozen=True)
class LocalOptions:
    """How a pipeline runs locally.

    Args:
        approve: decides approval steps, given the step's name and message; by default all are approved.
        raise_errors: whether a failed run raises the error of its step.
        folder: keeps checkpoints, outputs and executed notebooks; by default they go with the run.
        sleep: waits the seconds before a retry.
        echo: takes progress and failures as lines of text.
    """

    approve: Callable[[str, str], bool] = lambda step, message: True
    raise_errors: bool = True
    folder: str | Path | None = None
    sleep: Callable[[float], None] = time.sleep
    echo: Callable[[str], None] = _print


@dataclass(frozen=True)
class LocalStep:
    """How a step, or one item of a fan-out, ended.

    ``output`` is what it returned. ``exception`` is what its last attempt raised, with the user's own frames.
    """

    state: State
    attempts: int
    output: Any
    error: str | None
    exception: BaseException | None
    items: list[LocalStep] | None = None


@dataclass(frozen=True)
class LocalRun:
    """A local run that is over. ``output`` has the pipeline's outputs by name."""

    pipeline: str
    run_id: str
    state: State
    error: str | None
    params: dict[str, Any]
    steps: dict[str, LocalStep]
    output: dict[str, Any]

    def raise_error(self) -> None:
        """Does nothing after success.

        Raises:
            PipelineFailed: the run failed, and not by an exception.
            BaseException: the one that failed the step that failed the run.
        """
        if self.state is State.SUCCEEDED:
            return
        for name, step in self.steps.items():
            if step.state is State.FAILED and step.exception is not None:
                step.exception.add_note(f"step {name!r} of {self.pipeline!r}, attempt {step.attempts}")
                raise step.exception
        raise PipelineFailed(f"{self.pipeline}: {self.error or self.state}")


#: Where in a folder of their own local runs keep checkpoints and outputs.
STORE = ".mlplat"


class LocalShipper(Shipper):
    """Leaves functions and folders where they are: they run in this process. Enter it for the time of the run."""

    def __init__(self, options: LocalOptions | None) -> None:
        root = None if options is None or options.folder is None else Path(options.folder).resolve()
        self._folder = root
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if root is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="mlplat-run-")
        self.artifacts = ArtifactStore(f"file://{self._temporary.name if self._temporary else f'{root}/{STORE}'}")
        self._here: dict[str, Callable[..., Any]] = {}
        super().__init__(self.artifacts.put_blob)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
        if self._folder is not None:
            self._put_notebooks(self._folder)

    def _put_notebooks(self, folder: Path) -> None:
        """Executed notebooks as files that people can open, where the step's output says."""
        for file in self.artifacts.files("pipelines"):
            if file.path.endswith(".ipynb"):
                target = folder / "pipelines" / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(b"".join(self.artifacts.read(f"pipelines/{file.path}")))

    def _uses(self, function: Callable[..., Any]) -> str:
        # As a shipped function has it; the number stands for a digest.
        uses = f"pickle:{len(self._here):064x}:{function.__module__}.{function.__qualname__}".replace(" ", "")
        self._here[uses] = function
        return uses

    def working_dir(self, folder: Path) -> str:
        """The folder itself."""
        return str(folder.resolve())

    def find(self, uses: str, artifacts: ArtifactStore) -> Callable[..., Any]:
        """The function that ``uses`` stands for."""
        return self._here.get(uses) or load_function(uses, artifacts)


def run_locally(
    spec: PipelineSpec, params: Mapping[str, object], shipper: LocalShipper, options: LocalOptions
) -> LocalRun:
    """Runs a definition that ``shipper`` has shipped, to its end.

    Raises:
        InvalidPipeline: a parameter does not fit.
        PipelineFailed: the run failed, and not by an exception.
        BaseException: the one that failed the step that failed the run.
    """
    world = _Here(shipper, options)
    before = current_step()
    try:
        run = world.run(spec, spec.resolve_params(params), f"local-{secrets.token_hex(4)}", None)
    finally:
        enter_step(before)
    if world.interrupt is not None:
        raise world.interrupt
    if options.raise_errors:
        run.raise_error()
    return run


@dataclass
class _Here:
    """This process: the runs of a pipeline and of those inside it."""

    shipper: LocalShipper
    options: LocalOptions
    interrupt: KeyboardInterrupt | None = None
    finished: dict[str, RunSnapshot] = field(default_factory=dict)
    signals: int = 0
    #: The clock never goes back, and is ahead of the real one when ``sleep`` did not really wait.
    _floor: datetime = field(default_factory=lambda: datetime.now(UTC))

    def run(self, spec: PipelineSpec, params: dict[str, Any], run_id: str, resumed_from: str | None) -> LocalRun:
        """Runs a pipeline to its end."""
        spec = spec.model_copy(update={"timeout_s": None})
        own = PipelineRun(
            run_id, spec.name, spec.digest, params, State.QUEUED, submitted_by=user(), resumed_from=resumed_from
        )
        machine = RunMachine(spec, RunSnapshot(own, {}))
        if resumed_from is not None:
            machine.reuse(reusable(self.finished[resumed_from], spec, params, None), resumed_from)
        exceptions: dict[Node, BaseException] = {}
        machine.begin(self._now())
        self._drive(machine, exceptions)
        rows, attempts = list(machine.nodes.values()), list(machine.attempts.values())
        self.finished[run_id] = RunSnapshot(own, spec.to_json(), rows, attempts)
        return self._result(machine, exceptions)

    def _drive(self, machine: RunMachine, exceptions: dict[Node, BaseException]) -> None:
        due: dict[Node, Request] = {}
        while True:
            actions = machine.advance(self._now())
            machine.take_changes()
            due |= {request.node: request for request in actions.start}
            for node in actions.stop:  # nothing runs beside this loop: it has not begun, or is over
                request = due.pop(node, None)
                if request is not None:
                    machine.attempt_ended(node, request.attempt, AttemptOutcome(AttemptState.CANCELLED), self._now())
            if machine.run.state.is_final:
                return
            if due:
                self._attempt(machine, due.pop(next(iter(due))), exceptions)
            elif not actions.stop and not self._decide(machine):
                assert actions.wake_at is not None, "a run that is not over waits for something"
                self._wait_until(actions.wake_at)

    def _attempt(self, machine: RunMachine, request: Request, exceptions: dict[Node, BaseException]) -> None:
        exceptions.pop(request.node, None)
        machine.attempt_started(request.node, request.attempt, self._now(), None)
        try:
            outcome = self._run_child(request) if isinstance(request, ChildRequest) else self._run_step(request)
        except KeyboardInterrupt as error:
            self.interrupt = error
            outcome = AttemptOutcome(AttemptState.CANCELLED, error="interrupted")
        except (Exception, SystemExit) as error:
            exceptions[request.node] = error.with_traceback(from_users_frame(error))
            # A sub-pipeline's failure has no types on the platform, either.
            types = () if isinstance(request, ChildRequest) else error_types(error)
            text = str(error) if is_refusal(error) else summary(error)
            outcome = AttemptOutcome(AttemptState.FAILED, error=text, error_types=types)
            self.options.echo(f"{_name(request)}: attempt {request.attempt} failed: {text}")
        if self.interrupt is not None:
            self._tell(machine, SignalKind.CANCEL, "")
        machine.attempt_ended(request.node, request.attempt, outcome, self._now())

    def _run_step(self, request: AttemptRequest) -> AttemptOutcome:
        enter_step(self._context(request))
        folder = nullcontext() if request.working_dir is None else inside_folder(request.working_dir)
        with folder, _variables(dict(request.reservation.env_vars)):
            returned = call_step(request, self.shipper.artifacts, current_step(), self.shipper.find)
            return AttemptOutcome(AttemptState.SUCCEEDED, store_output(returned, self.shipper.artifacts))

    def _run_child(self, request: ChildRequest) -> AttemptOutcome:
        run = self.run(request.spec, request.params, request.child_id, request.resumed_from)
        own = self.finished[request.child_id].run
        if run.state is State.CANCELLED:
            return AttemptOutcome(AttemptState.CANCELLED, error=run.error)
        run.raise_error()
        return AttemptOutcome(AttemptState.SUCCEEDED, own.output or {"kind": "json", "value": None})

    def _decide(self, machine: RunMachine) -> bool:
        """Asks for one decision; False when none is waited for."""
        for name, step in machine.steps.items():
            if step.approval is not None and machine.nodes[name, WHOLE_STEP].state is State.QUEUED:
                approved = self.options.approve(name, step.approval.message)
                self._tell(machine, SignalKind.APPROVE if approved else SignalKind.REJECT, name)
                return True
        return False

    def _tell(self, machine: RunMachine, kind: SignalKind, step: str) -> None:
        self.signals += 1
        machine.signal(Signal(self.signals, machine.run.run_id, kind, step, user(), "", self._now()), self._now())

    def _context(self, request: AttemptRequest) -> StepContext:
        def show(progress: dict[str, Any]) -> None:
            done = "" if progress["done"] is None else f"{progress['done']:.0%} "
            self.options.echo(f"{_name(request)}: {done}{progress['text']}".rstrip())

        checkpoints = Checkpoints(
            self.shipper.artifacts,
            request.checkpoints,
            request.attempt,
            request.keep_checkpoints,
            request.best_checkpoints,
        )
        item = None if request.item == WHOLE_STEP else request.item
        return StepContext(
            request.pipeline, request.run_id, request.step, item, request.attempt, request.max_attempts,
            Settings().http_url, checkpoints, show, is_local=True,
        )  # fmt: skip

    def _result(self, machine: RunMachine, exceptions: Mapping[Node, BaseException]) -> LocalRun:
        def of(row: StepRun) -> LocalStep:
            items = None
            if row.items is not None and row.item == WHOLE_STEP:
                items = [of(machine.nodes[row.step, index]) for index in range(row.items)]
            exception = exceptions.get(row.node)
            if exception is None and items is not None:
                exception = next((item.exception for item in items if item.state is State.FAILED), None)
            output = self._load(stored_output(machine.nodes, row))
            attempts = row.attempt if items is None else sum(item.attempts for item in items)
            return LocalStep(row.state, attempts, output, row.error, exception, items)

        run = machine.run
        steps = {name: of(machine.nodes[name, WHOLE_STEP]) for name in machine.steps}
        return LocalRun(run.name, run.run_id, run.state, run.error, run.params, steps, self._load(run.output) or {})

    def _load(self, stored: dict[str, Any] | None) -> Any:
        return load_arguments(open_for_expressions(stored), self.shipper.artifacts)

    def _now(self) -> datetime:
        self._floor = max(self._floor, datetime.now(UTC))
        return self._floor

    def _wait_until(self, at: datetime) -> None:
        self.options.sleep(max(0.0, (at - self._now()).total_seconds()))
        self._floor = max(self._floor, at)


@contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the duration."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _name(request: Request) -> str:
    return request.step if request.item == WHOLE_STEP else f"{request.step}[{request.item}]"
