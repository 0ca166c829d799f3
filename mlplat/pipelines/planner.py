"""The planner: from a run's state to what happens next. Pure; all rules of execution live here.

``plan`` only looks. Whoever calls it commits the transitions that follow from its decisions, acts on
them, and calls it again. Planning the same state twice gives the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from mlplat.pipelines.model import WHOLE_STEP, AttemptOutcome, AttemptState, Node, State, StepRun
from mlplat.pipelines.retry import RetryLike, backoff_s

#: An attempt lost with its process is free, but not for ever.
MAX_LOST = 50


@dataclass(frozen=True)
class StepRules:
    """What the planner needs to know of a step's definition."""

    needs: frozenset[str]
    is_fan_out: bool
    retry: RetryLike


@dataclass(frozen=True)
class Start:
    """Start the next attempt of a node."""

    node: Node


@dataclass(frozen=True)
class Expand:
    """Evaluate the step's ``foreach`` and add its items."""

    step: str


@dataclass(frozen=True)
class Settle:
    """A node reaches a final state without an attempt of its own."""

    node: Node
    state: State
    error: str | None = None


@dataclass(frozen=True)
class Finish:
    """The run is over."""

    state: State
    error: str | None = None


@dataclass(frozen=True)
class Wait:
    """Nothing to do before ``until``, unless something happens."""

    until: datetime


Decision = Start | Expand | Settle | Finish | Wait


def plan(now: datetime, rules: Mapping[str, StepRules], nodes: Mapping[Node, StepRun]) -> list[Decision]:
    """What to do next; empty while attempts run and nothing else is due. At most one ``Wait``, at the end.

    Args:
        now: the planner's only clock.
        rules: by step name.
        nodes: every step's own row (item -1), and the items of fan-outs that were expanded.
    """
    items = _items_by_step(nodes)
    decisions: list[Decision] = []
    waits: list[datetime] = []
    for step, rule in rules.items():
        row = nodes[step, WHOLE_STEP]
        if row.state.is_final:
            continue
        blocker = _blocked_by(rule, nodes)
        if row.state is State.PENDING and blocker is not None:
            decisions.append(Settle(row.node, State.SKIPPED, f"{blocker} did not succeed"))
        elif row.state is State.PENDING and not _ready(rule, nodes):
            continue
        elif rule.is_fan_out:
            decisions += _plan_fan_out(now, row, items.get(step, []), waits)
        else:
            decisions += _plan_attempt(now, row, waits)
    if not decisions and all(nodes[step, WHOLE_STEP].state.is_final for step in rules):
        return [_finish(rules, nodes)]
    if waits:
        decisions.append(Wait(min(waits)))
    return decisions


def settle_attempt(now: datetime, run_id: str, row: StepRun, outcome: AttemptOutcome, retry: RetryLike) -> None:
    """Moves a RUNNING node to where the outcome of its attempt leads."""
    assert row.state is State.RUNNING, f"{row.node} is {row.state}"
    if outcome.state is AttemptState.SUCCEEDED:
        row.state, row.output, row.error, row.finished_at = State.SUCCEEDED, outcome.output, None, now
        return
    row.error = outcome.error
    if outcome.state is AttemptState.LOST and row.attempt - row.failures <= MAX_LOST:
        row.state, row.retry_at = State.PENDING, now
        return
    row.failures += 1
    wait = backoff_s(retry, row.failures, f"{run_id}/{row.step}/{row.item}")
    if wait is None:
        row.state, row.finished_at = State.FAILED, now
    else:
        row.state, row.retry_at = State.PENDING, now + timedelta(seconds=wait)


def _items_by_step(nodes: Mapping[Node, StepRun]) -> dict[str, list[StepRun]]:
    items: dict[str, list[StepRun]] = {}
    for (step, item), row in nodes.items():
        if item != WHOLE_STEP:
            items.setdefault(step, []).append(row)
    return items


def _blocked_by(rule: StepRules, nodes: Mapping[Node, StepRun]) -> str | None:
    for need in sorted(rule.needs):
        state = nodes[need, WHOLE_STEP].state
        if state.is_final and state is not State.SUCCEEDED:
            return need
    return None


def _ready(rule: StepRules, nodes: Mapping[Node, StepRun]) -> bool:
    return all(nodes[need, WHOLE_STEP].state is State.SUCCEEDED for need in rule.needs)


def _plan_attempt(now: datetime, row: StepRun, waits: list[datetime]) -> Iterable[Decision]:
    if row.state is not State.PENDING:
        return []
    if row.retry_at is not None and row.retry_at > now:
        waits.append(row.retry_at)
        return []
    return [Start(row.node)]


def _plan_fan_out(now: datetime, row: StepRun, items: list[StepRun], waits: list[datetime]) -> list[Decision]:
    if row.items is None:
        return [Expand(row.step)]
    failed = [item for item in items if item.state is State.FAILED]
    decisions: list[Decision] = []
    for item in items:
        # After one item has failed for good the others need not start: the step cannot succeed any more.
        if failed and item.state is State.PENDING:
            decisions.append(Settle(item.node, State.SKIPPED, f"{row.step}[{failed[0].item}] failed"))
        elif not failed:
            decisions += _plan_attempt(now, item, waits)
    if not decisions and all(item.state.is_final for item in items):
        if failed:
            return [Settle(row.node, State.FAILED, f"item {failed[0].item}: {failed[0].error}")]
        return [Settle(row.node, State.SUCCEEDED)]
    return decisions


def _finish(rules: Mapping[str, StepRules], nodes: Mapping[Node, StepRun]) -> Finish:
    for step in rules:
        row = nodes[step, WHOLE_STEP]
        if row.state is State.FAILED:
            summary = ((row.error or "").strip() or "failed").splitlines()[0]
            return Finish(State.FAILED, f"step {step!r} failed: {summary}")
    return Finish(State.SUCCEEDED)
