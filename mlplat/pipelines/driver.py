"""Drives one pipeline run: what happened → plan → commit the transitions → act on them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.pipelines.dag import dependencies
from mlplat.pipelines.expressions import render
from mlplat.pipelines.model import (
    WHOLE_STEP,
    Attempt,
    AttemptOutcome,
    AttemptRequest,
    AttemptState,
    Node,
    RunSnapshot,
    State,
    StepRun,
)
from mlplat.pipelines.outputs import open_for_expressions
from mlplat.pipelines.planner import Decision, Expand, Finish, Settle, Start, StepRules, Wait, plan, settle_attempt
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.transitions import RunChange, Transition

MAX_ITEMS = 10_000

#: Runs one attempt to its end. Never raises for what the attempt does.
Launch = Callable[[AttemptRequest], Coroutine[Any, Any, AttemptOutcome]]
#: Makes a transition durable; raises Fenced when the run has another owner.
Commit = Callable[[Transition], Awaitable[None]]
#: Told about attempts that died without an outcome, by label.
OnLost = Callable[[str], Awaitable[None]]


class RunDriver:
    """Owns one run under one epoch. ``drive`` ends when the run does, or raises Fenced."""

    def __init__(self, snapshot: RunSnapshot, epoch: int, launch: Launch, commit: Commit, on_lost: OnLost) -> None:
        self._spec = PipelineSpec.model_validate(snapshot.spec)
        self._run = snapshot.run
        self._epoch = epoch
        self._launch = launch
        self._commit = commit
        self._on_lost = on_lost
        needs = dependencies(self._spec.steps)
        self._rules = {
            name: StepRules(frozenset(needs[name]), step.foreach is not None, step.retry)
            for name, step in self._spec.steps.items()
        }
        self._nodes: dict[Node, StepRun] = {row.node: row for row in snapshot.step_runs}
        self._attempts = {(row.step, row.item, row.attempt): row for row in snapshot.attempts}
        self._running: dict[asyncio.Task[AttemptOutcome], Node] = {}
        self._foreach: dict[str, list[Any]] = {}
        self._scopes: dict[str, dict[str, Any]] = {}
        self._changes = self._new_transition()

    @property
    def active_attempts(self) -> int:
        """Attempts that run now."""
        return len(self._running)

    async def drive(self) -> State:
        """Runs until the run is over and returns its final state.

        Raises:
            Fenced: the run has another owner; this one's attempts were abandoned.
            Unavailable: Postgres stayed away.
        """
        try:
            await self._adopt()
            while True:
                decisions = plan(_now(), self._rules, self._nodes)
                requests = [request for decision in decisions if (request := self._apply(decision)) is not None]
                changed = await self._flush()
                for request in requests:
                    task = asyncio.create_task(self._launch(request))
                    self._running[task] = (request.step, request.item)
                if self._run.state.is_final:
                    return self._run.state
                if not changed or requests:
                    await self._wait(decisions)
        finally:
            for task in self._running:
                task.cancel()

    async def _adopt(self) -> None:
        """Takes over what an earlier owner left: its running attempts died with it."""
        lost = [row for row in self._nodes.values() if row.state is State.RUNNING and not self._is_fan_out(row)]
        for row in lost:
            # Before the commit: a crash in between repeats this, and never leaves it out.
            await self._on_lost(f"{self._run.run_id}/{row.step}/{row.item}/{row.attempt}")
            self._settle(row, AttemptOutcome(AttemptState.LOST, error="its executor was lost"))
        if self._run.state is not State.RUNNING:
            self._run.state = State.RUNNING
            self._changes.run = RunChange(State.RUNNING, started_at=_now())
        await self._flush()

    def _is_fan_out(self, row: StepRun) -> bool:
        return row.item == WHOLE_STEP and self._rules[row.step].is_fan_out

    def _apply(self, decision: Decision) -> AttemptRequest | None:
        match decision:
            case Start(node):
                return self._start(self._nodes[node])
            case Expand(step):
                self._expand(self._nodes[step, WHOLE_STEP])
            case Settle(node, state, error):
                row = self._nodes[node]
                row.state, row.error, row.finished_at = state, error, _now()
                self._changes.step_runs.append(row)
            case Finish(state, error):
                self._run.state, self._run.error = state, error
                self._changes.run = RunChange(state, error, finished_at=_now())
            case Wait():
                pass
        return None

    def _start(self, row: StepRun) -> AttemptRequest | None:
        step = self._spec.steps[row.step]
        row.started_at = row.started_at or _now()
        row.retry_at = None
        self._changes.step_runs.append(row)
        try:
            arguments = render(dict(step.with_), self._scope(row))
        except InvalidInput as error:
            row.state, row.error, row.finished_at = State.FAILED, error.message, _now()
            return None
        row.state, row.attempt = State.RUNNING, row.attempt + 1
        attempt = Attempt(row.step, row.item, row.attempt, AttemptState.RUNNING, _now())
        self._attempts[row.step, row.item, row.attempt] = attempt
        self._changes.attempts.append(attempt)
        return AttemptRequest(
            self._spec.name, self._run.run_id, row.step, row.item, row.attempt, step.uses, arguments,
            step.retry.max_attempts, step.resources.cpus, step.resources.gpus, step.resources.memory_mb,
            step.fresh_process,
        )  # fmt: skip

    def _expand(self, row: StepRun) -> None:
        self._changes.step_runs.append(row)
        try:
            items = self._items_of(row.step)
        except InvalidInput as error:
            row.state, row.error, row.finished_at = State.FAILED, error.message, _now()
            return
        row.state, row.items, row.started_at = State.RUNNING, len(items), _now()
        for index in range(len(items)):
            item = StepRun(row.step, index, State.PENDING)
            self._nodes[item.node] = item
            self._changes.step_runs.append(item)

    def _items_of(self, step: str) -> list[Any]:
        if step not in self._foreach:
            items = render(self._spec.steps[step].foreach, self._outer_scope(step))
            if not isinstance(items, list):
                raise InvalidInput(f"foreach must give a list, not {type(items).__name__}")
            if len(items) > MAX_ITEMS:
                raise InvalidInput(f"foreach gave {len(items)} items, at most {MAX_ITEMS} are allowed")
            self._foreach[step] = items
        return self._foreach[step]

    def _scope(self, row: StepRun) -> dict[str, Any]:
        scope = self._outer_scope(row.step)
        return scope if row.item == WHOLE_STEP else scope | {"item": self._items_of(row.step)[row.item]}

    def _outer_scope(self, step: str) -> dict[str, Any]:
        """What the step's expressions see; it never changes once the step's needs have succeeded."""
        if step not in self._scopes:
            needed = self._rules[step].needs
            outputs = {name: {"output": open_for_expressions(self._output_of(name))} for name in needed}
            self._scopes[step] = {"params": self._run.params, "steps": outputs}
        return self._scopes[step]

    def _output_of(self, step: str) -> dict[str, Any] | None:
        row = self._nodes[step, WHOLE_STEP]
        if row.items is None:
            return row.output
        return {"kind": "list", "outputs": [self._nodes[step, index].output for index in range(row.items)]}

    def _settle(self, row: StepRun, outcome: AttemptOutcome) -> None:
        outcome = replace(outcome, error=_storable(outcome.error))
        attempt = self._attempts[row.step, row.item, row.attempt]
        attempt.state, attempt.error, attempt.finished_at = outcome.state, outcome.error, _now()
        settle_attempt(_now(), self._run.run_id, row, outcome, self._spec.steps[row.step].retry)
        self._changes.step_runs.append(row)
        self._changes.attempts.append(attempt)

    async def _flush(self) -> bool:
        if self._changes.is_empty:
            return False
        changes, self._changes = self._changes, self._new_transition()
        # The writer may hold rows across an await; these objects go on changing.
        changes.step_runs = [copy.copy(row) for row in changes.step_runs]
        changes.attempts = [copy.copy(row) for row in changes.attempts]
        await self._commit(changes)
        return True

    def _new_transition(self) -> Transition:
        return Transition(self._run.run_id, self._epoch)

    async def _wait(self, decisions: list[Decision]) -> None:
        until = next((decision.until for decision in decisions if isinstance(decision, Wait)), None)
        timeout = max(0.0, (until - _now()).total_seconds()) if until is not None else None
        if not self._running:
            assert timeout is not None, f"run {self._run.run_id} is stuck: {self._nodes}"
            await asyncio.sleep(timeout)
            return
        done, _pending = await asyncio.wait(self._running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            row = self._nodes[self._running.pop(task)]
            outcome = task.result()
            self._settle(row, outcome)
            if outcome.state is AttemptState.LOST:
                await self._on_lost(f"{self._run.run_id}/{row.step}/{row.item}/{row.attempt}")


def _storable(text: str | None) -> str | None:
    """The text without what Postgres refuses."""
    return None if text is None else text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def _now() -> datetime:
    return datetime.now(UTC)
