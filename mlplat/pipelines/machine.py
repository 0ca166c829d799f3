"""The state machine of one run: every rule of execution lives here, and nothing else does.

Pure: no clock, no I/O. Whoever drives a run tells the machine what happened (``attempt_ended``, ``signal``, …) and
calls ``advance``, which applies the rules to the rows and says what is to be done in the world. The driver makes the
changed rows durable *before* it acts. ``advance`` only looks at steps that something happened to, so its cost does
not grow with the size of the run.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from mlplat.errors import InvalidInput
from mlplat.pipelines.dag import dependencies
from mlplat.pipelines.fan_out import FanOut
from mlplat.pipelines.model import (
    WHOLE_STEP,
    Attempt,
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
from mlplat.pipelines.requests import attempt_request, child_request
from mlplat.pipelines.retry import backoff_s, is_worth_retrying
from mlplat.pipelines.scope import Scopes
from mlplat.pipelines.spec import PipelineSpec, Step
from mlplat.pipelines.stored import stored_form

#: An attempt lost with its process is free, but not for ever.
MAX_LOST = 50
#: Attempts that one round starts: what there is beyond them comes in the next, so that no round takes long.
MAX_STARTS = 500


@dataclass
class Actions:
    """What is to be done once the changes are durable.

    Args:
        start: attempts that begin now.
        stop: nodes whose attempt must end.
        wake_at: when to call ``advance`` again, whatever happens.
    """

    start: list[AttemptRequest | ChildRequest] = field(default_factory=list)
    stop: list[Node] = field(default_factory=list)
    wake_at: datetime | None = None


@dataclass
class Changes:
    """Rows that changed since the last time somebody asked. ``run`` is set when the run itself did."""

    seq: int
    step_runs: list[StepRun]
    attempts: list[Attempt]
    run: PipelineRun | None


class RunMachine:
    """One run under one owner. Its rows are ``nodes`` and ``attempts``; only the machine changes them."""

    def __init__(self, spec: PipelineSpec, snapshot: RunSnapshot) -> None:
        self.spec = spec
        self.run = snapshot.run
        self.steps = spec.all_steps
        self.nodes: dict[Node, StepRun] = {row.node: row for row in snapshot.step_runs}
        for name in self.steps:
            self.nodes.setdefault((name, WHOLE_STEP), StepRun(name, WHOLE_STEP, State.PENDING))
        self.attempts: dict[tuple[str, int, int], Attempt] = {
            (row.step, row.item, row.attempt): row for row in snapshot.attempts
        }
        self.scopes = Scopes(spec, self.run, self.nodes)
        #: Signals that were applied, by id.
        self._heard: set[int] = set()
        self._changed: dict[Node, StepRun] = {}
        self._changed_attempts: dict[tuple[str, int, int], Attempt] = {}
        self._run_changed = False
        self._look: deque[str] = deque()
        self._retries: list[tuple[datetime, Node]] = []
        self._restore()

    # -- what happened ---------------------------------------------------------------------------

    def begin(self, now: datetime) -> None:
        """The run starts, or is taken over."""
        if self.run.state is not State.RUNNING:
            self.run.state = State.RUNNING
            self.run.started_at = self.run.started_at or now
            self._run_changed = True

    def reuse(self, rows: Mapping[Node, StepRun], run_id: str) -> None:
        """Takes results of an earlier run over, before the run begins. Fan-outs come with all their items' rows."""
        for node, earlier in rows.items():
            self.nodes[node] = self._changed[node] = StepRun(
                earlier.step, earlier.item, earlier.state, earlier.items, output=earlier.output,
                queued_at=earlier.queued_at, started_at=earlier.started_at, finished_at=earlier.finished_at,
                reused_from=earlier.reused_from or run_id,
            )  # fmt: skip
        self._restore()

    def attempt_started(self, node: Node, attempt: int, at: datetime, where: str | None) -> None:
        """A worker has begun with the attempt."""
        entry = self._open_attempt(node, attempt)
        if entry is None or entry.state is not AttemptState.QUEUED:
            return
        row = self.nodes[node]
        entry.state, entry.started_at, entry.node = AttemptState.RUNNING, at, where
        row.state, row.started_at = State.RUNNING, row.started_at or at
        self._touch(row, entry)

    def attempt_progressed(self, node: Node, attempt: int, progress: dict[str, object]) -> None:
        """The attempt says how far it is."""
        entry = self._open_attempt(node, attempt)
        if entry is not None:
            entry.progress = progress
            self._touch(None, entry)

    def attempt_ended(self, node: Node, attempt: int, outcome: AttemptOutcome, now: datetime) -> bool:
        """The attempt is over. False, and no change, when it is not the one that the node waits for."""
        entry = self._open_attempt(node, attempt)
        if entry is None:
            return False
        row = self.nodes[node]
        self._close_attempt(row, entry, outcome, now)
        if outcome.state is AttemptState.SUCCEEDED:
            row.output = outcome.output
            self._settle(row, State.SUCCEEDED, None, now)
        elif self._is_stopping(row.step):
            self._settle(row, State.CANCELLED, outcome.error, now)
        elif outcome.state is AttemptState.CANCELLED:  # by somebody else: a sub-pipeline's own run, for instance
            row.failures += 1
            self._settle(row, State.FAILED, outcome.error or "cancelled", now)
        else:
            self._retry_or_fail(row, outcome, now)
        return True

    def cache_hit(self, node: Node, output: dict[str, object], run_id: str, now: datetime) -> None:
        """The output of an equal attempt is known: the node needs none of its own."""
        row = self.nodes[node]
        entry = self._open_attempt(node, row.attempt)
        if entry is not None:
            row.output, row.reused_from = output, run_id
            self._close_attempt(row, entry, AttemptOutcome(AttemptState.SUCCEEDED), now)
            self._settle(row, State.SUCCEEDED, None, now)

    def signal(self, signal: Signal, now: datetime) -> None:
        """A person said something. What does not apply any more is ignored."""
        if signal.signal_id in self._heard:
            return
        self._heard.add(signal.signal_id)
        if signal.kind is SignalKind.CANCEL:
            self._stop(State.CANCELLED, _told("cancelled", signal), now)
            return
        row = self.nodes.get((signal.step, WHOLE_STEP))
        if row is None or row.state is not State.QUEUED or self.steps[signal.step].approval is None:
            return
        if signal.kind is SignalKind.APPROVE:
            row.output = stored_form({"approved": True, "by": signal.by, "comment": signal.comment})
            self._settle(row, State.SUCCEEDED, None, now)
        else:
            self._settle(row, State.FAILED, _told("rejected", signal), now)

    # -- what follows ----------------------------------------------------------------------------

    def advance(self, now: datetime) -> Actions:
        """Applies the rules to what happened. Afterwards the rows are consistent, and the actions are due."""
        actions = Actions()
        if self.run.state.is_final:
            return actions
        deadline = self._deadline()
        if deadline is not None and deadline <= now:
            self._stop(State.FAILED, f"timed out after {self.spec.timeout_s:g} s", now)
        while self._retries and self._retries[0][0] <= now:
            _due, node = heapq.heappop(self._retries)
            self._retry_due(node)
        while self._look and len(actions.start) < MAX_STARTS:
            self._examine(self._look.popleft(), now, actions)
        if self._look:
            actions.wake_at = now
        actions.stop += [node for node in self._to_stop if self.nodes[node].state in _ACTIVE]
        self._to_stop.clear()
        if self._open_main == 0 and self._open_finally == 0:
            self._finish(now)
        due = [at for at in (actions.wake_at, self._deadline(), self._next_retry()) if at is not None]
        actions.wake_at = min(due, default=None)
        return actions

    def take_changes(self) -> Changes | None:
        """The changed rows, each with the number of this change; None when nothing changed."""
        if not self._changed and not self._changed_attempts and not self._run_changed:
            return None
        self.run.seq += 1
        for row in self._changed.values():
            row.seq = self.run.seq
        for entry in self._changed_attempts.values():
            entry.seq = self.run.seq
        changes = Changes(
            self.run.seq, list(self._changed.values()), list(self._changed_attempts.values()),
            self.run if self._run_changed else None,
        )  # fmt: skip
        self._changed, self._changed_attempts, self._run_changed = {}, {}, False
        return changes

    def open_attempts(self) -> Iterator[tuple[StepRun, Attempt]]:
        """Attempts that are not over, with their nodes."""
        for row in list(self.nodes.values()):
            entry = self._open_attempt(row.node, row.attempt)
            if entry is not None:
                yield row, entry

    def request_of(self, row: StepRun) -> AttemptRequest | ChildRequest:
        """The node's current attempt, complete; the same whenever it is asked for.

        Raises:
            InvalidInput: an expression fails on the values at hand.
        """
        step = self.steps[row.step]
        arguments = self.scopes.render_for(dict(step.with_), row, step, self.ending)
        if step.pipeline is not None:
            earlier = self.attempts.get((row.step, row.item, row.attempt - 1))
            return child_request(self.run, row, step.pipeline, arguments, earlier)
        command = self.scopes.render_for(step.command, row, step, self.ending)
        return attempt_request(self.spec, self.run, row, step, arguments, command)

    @property
    def ending(self) -> State | None:
        """How the run's own steps ended; None while they are not over."""
        return None if self._open_main else self._outcome()[0]

    # -- inside ----------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Counts what is open from the rows alone."""
        needs = dependencies(self.spec)
        self._order = {name: index for index, name in enumerate(self.steps)}
        self._dependents: dict[str, list[str]] = {name: [] for name in self.steps}
        self._unmet: dict[str, int] = dict.fromkeys(self.steps, 0)
        self._blocker: dict[str, str] = {}
        self._failed: set[str] = set()
        self._to_stop: list[Node] = []
        self._open_main = self._open_finally = 0
        self._fans: dict[str, FanOut] = {}
        self._retries = []
        for name, step in self.steps.items():
            row = self.nodes[name, WHOLE_STEP]
            for need in needs[name]:
                self._dependents[need].append(name)
                earlier = self.nodes[need, WHOLE_STEP]
                if not earlier.is_satisfied:
                    self._unmet[name] += 1
                    if earlier.state.is_final:
                        self._blocker[name] = min(self._blocker.get(name, need), need)
            if row.state.is_final:
                if row.state is State.FAILED:
                    self._failed.add(name)
                continue
            self._count(name, 1)
            if row.items is not None:
                items = [self.nodes[name, index] for index in range(row.items)]
                self._fans[name] = FanOut.of(items, step.max_parallel)
                self._retries += [(item.retry_at, item.node) for item in items if _waits(item) and item.retry_at]
            elif _waits(row) and row.retry_at:
                self._retries.append((row.retry_at, row.node))
        heapq.heapify(self._retries)
        if self.run.stopping is not None:  # the earlier owner may not have got so far
            self._to_stop = [row.node for row, _entry in self.open_attempts() if row.step in self.spec.steps]
        self._look = deque(name for name in self.steps if self._may_move(name))

    def _may_move(self, name: str) -> bool:
        row = self.nodes[name, WHOLE_STEP]
        if row.state.is_final:
            return False
        return not self._unmet[name] or name in self._blocker or row.items is not None or self._is_stopping(name)

    def _count(self, name: str, by: int) -> None:
        if name in self.spec.steps:
            self._open_main += by
        else:
            self._open_finally += by

    def _open_attempt(self, node: Node, attempt: int) -> Attempt | None:
        row = self.nodes.get(node)
        if row is None or row.attempt != attempt or row.state not in _ACTIVE:
            return None
        entry = self.attempts.get((*node, attempt))
        return entry if entry is not None and not entry.state.is_final else None

    def _touch(self, row: StepRun | None, entry: Attempt | None = None) -> None:
        if row is not None:
            self._changed[row.node] = row
        if entry is not None:
            self._changed_attempts[entry.step, entry.item, entry.attempt] = entry

    def _close_attempt(self, row: StepRun, entry: Attempt, outcome: AttemptOutcome, now: datetime) -> None:
        stopped = self._is_stopping(row.step) and outcome.state is not AttemptState.SUCCEEDED
        entry.state = AttemptState.CANCELLED if stopped else outcome.state
        entry.error, entry.finished_at = outcome.error, now
        entry.started_at = entry.started_at or outcome.started_at
        entry.node = entry.node or outcome.node
        row.started_at = row.started_at or outcome.started_at
        self._touch(row, entry)

    def _retry_or_fail(self, row: StepRun, outcome: AttemptOutcome, now: datetime) -> None:
        row.error = outcome.error
        fan = self._fans.get(row.step)
        if fan is not None and fan.failed is not None:  # the step cannot succeed any more
            row.failures += outcome.state is not AttemptState.LOST
            self._settle(row, State.FAILED, outcome.error, now)
            return
        if outcome.state is AttemptState.LOST and row.attempt - row.failures <= MAX_LOST:
            self._wait_for_retry(row, now)
            return
        row.failures += 1
        retry = self.steps[row.step].retry
        wait = backoff_s(retry, row.failures, f"{self.run.run_id}/{row.step}/{row.item}")
        if wait is None or not is_worth_retrying(retry, outcome.error_types):
            self._settle(row, State.FAILED, outcome.error, now)
        else:
            self._wait_for_retry(row, now + timedelta(seconds=wait))

    def _wait_for_retry(self, row: StepRun, at: datetime) -> None:
        row.state, row.retry_at = State.PENDING, at
        self._touch(row)
        if row.item != WHOLE_STEP:
            self._fans[row.step].active -= 1
            self._look.append(row.step)
        heapq.heappush(self._retries, (at, row.node))

    def _retry_due(self, node: Node) -> None:
        row = self.nodes[node]
        if not _waits(row):
            return
        if row.item != WHOLE_STEP:
            self._fans[row.step].pending.appendleft(row.item)
        row.retry_at = None
        self._look.append(row.step)

    def _next_retry(self) -> datetime | None:
        while self._retries and not _waits(self.nodes[self._retries[0][1]]):
            heapq.heappop(self._retries)
        return self._retries[0][0] if self._retries else None

    def _settle(self, row: StepRun, state: State, error: str | None, now: datetime) -> None:
        """The node's last change."""
        was_active = row.state in _ACTIVE
        row.state, row.error, row.finished_at, row.retry_at = state, error, now, None
        self._touch(row)
        if row.item != WHOLE_STEP:
            self._fans[row.step].close(row, was_active=was_active)
            self._look.append(row.step)
            return
        self._count(row.step, -1)
        if state is State.FAILED:
            self._failed.add(row.step)
        for name in self._dependents[row.step]:
            if row.is_satisfied:
                self._unmet[name] -= 1
                if not self._unmet[name]:
                    self._look.append(name)
            else:
                self._blocker.setdefault(name, row.step)
                self._look.append(name)
        if self._open_main == 0 and row.step in self.spec.steps:
            self._look.extend(self.spec.finally_)

    def _examine(self, name: str, now: datetime, actions: Actions) -> None:
        row, step = self.nodes[name, WHOLE_STEP], self.steps[name]
        if row.state.is_final:
            return
        if row.items is not None:
            self._advance_fan_out(row, self._fans[name], now, actions)
        elif row.state is State.PENDING and row.retry_at is None:
            if self._is_stopping(name):
                self._settle(row, State.CANCELLED, None, now)
            elif name in self._blocker:
                self._settle(row, State.SKIPPED, f"{self._blocker[name]} did not succeed", now)
            elif not self._unmet[name] and (name in self.spec.steps or not self._open_main):
                self._open_step(row, step, now, actions)

    def _open_step(self, row: StepRun, step: Step, now: datetime, actions: Actions) -> None:
        """The step's turn has come."""
        try:
            if row.attempt == 0 and not self.scopes.condition(row.step, step, self.ending):
                self._settle(row, State.SKIPPED, None, now)
                return
            items = None if step.foreach is None else self.scopes.items(row.step, step, self.ending)
        except InvalidInput as error:
            self._settle(row, State.FAILED, error.message, now)
            return
        if step.approval is not None:
            row.state, row.queued_at = State.QUEUED, now
            self._touch(row)
        elif items is None:
            self._start(row, now, actions)
        else:
            row.state, row.items, row.queued_at, row.started_at = State.RUNNING, len(items), now, now
            self._touch(row)
            rows = [StepRun(row.step, index, State.PENDING) for index in range(len(items))]
            self.nodes.update((item.node, item) for item in rows)
            self._changed.update((item.node, item) for item in rows)
            self._fans[row.step] = FanOut.of(rows, step.max_parallel)
            self._advance_fan_out(row, self._fans[row.step], now, actions)

    def _advance_fan_out(self, row: StepRun, fan: FanOut, now: datetime, actions: Actions) -> None:
        stopping = self._is_stopping(row.step)
        if stopping or fan.failed is not None:
            # After one item has failed for good the others need not start.
            state = State.CANCELLED if stopping else State.SKIPPED
            reason = None if stopping else f"{row.step}[{fan.failed}] failed"
            for item in fan.take_waiting(self.nodes, row.step):
                self._settle(item, state, reason, now)
        else:
            for index in fan.take_startable(MAX_STARTS - len(actions.start)):
                self._start(self.nodes[row.step, index], now, actions)
            if fan.may_start:  # the rest, in the next round
                self._look.append(row.step)
        if fan.open == 0:
            if fan.failed is not None:
                first = self.nodes[row.step, fan.failed]
                self._settle(row, State.FAILED, f"item {fan.failed}: {first.error}", now)
            else:
                self._settle(row, State.CANCELLED if fan.cancelled else State.SUCCEEDED, None, now)

    def _start(self, row: StepRun, now: datetime, actions: Actions) -> None:
        row.attempt, row.retry_at = row.attempt + 1, None
        try:
            request = self.request_of(row)
        except InvalidInput as error:
            row.attempt -= 1
            if row.item != WHOLE_STEP:
                self._fans[row.step].active -= 1
            self._settle(row, State.FAILED, error.message, now)
            return
        row.state, row.queued_at = State.QUEUED, row.queued_at or now
        entry = Attempt(row.step, row.item, row.attempt, AttemptState.QUEUED, now)
        if isinstance(request, ChildRequest):
            entry.child_id = request.child_id
        self.attempts[row.step, row.item, row.attempt] = entry
        self._touch(row, entry)
        actions.start.append(request)

    def _is_stopping(self, name: str) -> bool:
        return self.run.stopping is not None and name in self.spec.steps

    def _deadline(self) -> datetime | None:
        if self.spec.timeout_s is None or self.run.started_at is None or self.run.stopping or not self._open_main:
            return None
        return self.run.started_at + timedelta(seconds=self.spec.timeout_s)

    def _stop(self, state: State, reason: str, now: datetime) -> None:
        """Ends the run's own steps; its finally steps still run."""
        if self.run.stopping is not None or not self._open_main:
            return
        self.run.stopping, self.run.error = state, reason
        self._run_changed = True
        for row in list(self.nodes.values()):
            if row.state.is_final or row.step not in self.spec.steps:
                continue
            if self._open_attempt(row.node, row.attempt) is not None:
                self._to_stop.append(row.node)
            elif row.items is None and row.item == WHOLE_STEP:
                self._settle(row, State.CANCELLED, None, now)
            self._look.append(row.step)

    def _outcome(self) -> tuple[State, str | None]:
        if self.run.stopping is not None:
            return self.run.stopping, self.run.error
        failed = [name for name in self._failed if name in self.spec.steps]
        if failed:
            return State.FAILED, self._failure(min(failed, key=self._order.__getitem__), "step")
        return State.SUCCEEDED, None

    def _finish(self, now: datetime) -> None:
        state, error = self._outcome()
        late = [name for name in self._failed if name in self.spec.finally_]
        if state is State.SUCCEEDED and late:
            state, error = State.FAILED, self._failure(min(late, key=self._order.__getitem__), "finally step")
        if state is State.SUCCEEDED and self.spec.outputs:
            try:
                self.run.output = stored_form(self.scopes.outputs())
            except InvalidInput as problem:
                state, error = State.FAILED, f"outputs: {problem.message}"
        self.run.state, self.run.error, self.run.finished_at = state, error, now
        self._run_changed = True

    def _failure(self, name: str, kind: str) -> str:
        error = (self.nodes[name, WHOLE_STEP].error or "").strip() or "failed"
        return f"{kind} {name!r} failed: {error.splitlines()[0]}"


_ACTIVE = {State.QUEUED, State.RUNNING}


def _waits(row: StepRun) -> bool:
    return row.state is State.PENDING and row.retry_at is not None


def _told(what: str, signal: Signal) -> str:
    return f"{what} by {signal.by}" + (f": {signal.comment}" if signal.comment else "")
