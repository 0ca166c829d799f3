"""Plays a pipeline run as its executor would: the real machine, the real writer, invented attempts."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.machine import RunMachine
from mlplat.pipelines.model import Attempt, AttemptOutcome, AttemptState, StepRun, Submission
from mlplat.pipelines.spec import PipelineSpec
from mlplat.pipelines.transitions import Transition, TransitionWriter
from tests.contract.chdb import unique
from tests.http.conftest import Stack

SPEC: dict[str, Any] = {
    "name": "played",
    "steps": {
        "load": {"uses": "os:getcwd", "retry": {"max_attempts": 2}},
        "fan": {"uses": "os:getcwd", "needs": ["load"], "foreach": [1, 2, 3], "retry": {"max_attempts": 2}},
        "side": {"uses": "os:getcwd", "needs": ["load"]},
        "join": {"uses": "os:getcwd", "needs": ["fan", "side"]},
    },
    "finally": {"tell": {"uses": "os:getcwd"}},
}


class Player:
    """One run. Its clock goes on by a minute with every transition."""

    def __init__(self, stack: Stack, machine: RunMachine, epoch: int) -> None:
        self.run_id = machine.run.run_id
        self.machine = machine
        self._epoch = epoch
        self._writer = TransitionWriter(stack.engine, "executor")
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

    @classmethod
    async def submit(cls, stack: Stack, document: dict[str, Any] | None = None) -> Player:
        """A new run."""
        spec = build_spec(document or SPEC)
        submission = Submission(_bytes(spec), {}, unique("key"), "ann")
        run_id = await stack.services.scheduler.submit(submission)
        snapshot = await stack.services.pipelines.get_snapshot(run_id)
        return cls(stack, RunMachine(spec, snapshot), stack.executor.runs[run_id])

    @property
    def is_over(self) -> bool:
        """Whether the run is."""
        return self.machine.run.state.is_final

    async def close(self) -> None:
        """Lets the writer's connection go."""
        await self._writer.close()

    async def begin(self) -> None:
        """The run's first transition."""
        self.machine.begin(self.now)
        await self.commit()

    async def commit(self) -> None:
        """Applies the rules, and makes what changed durable."""
        self.now += timedelta(minutes=1)
        self.machine.advance(self.now)
        changes = self.machine.take_changes()
        if changes is not None:
            await self._writer.write(Transition.of(self.run_id, self._epoch, changes))

    async def start(self, step: str, item: int = -1) -> None:
        """A worker begins with the node's attempt."""
        row = self.machine.nodes[step, item]
        self.machine.attempt_started(row.node, row.attempt, self.now, "node-1")
        await self.commit()

    async def progress(self, step: str, done: float, item: int = -1) -> None:
        """The attempt says how far it is."""
        row = self.machine.nodes[step, item]
        self.machine.attempt_progressed(row.node, row.attempt, {"done": done, "text": f"at {done}"})
        await self.commit()

    async def end(self, step: str, item: int = -1, state: AttemptState = AttemptState.SUCCEEDED) -> None:
        """The attempt ends."""
        row = self.machine.nodes[step, item]
        error = None if state is AttemptState.SUCCEEDED else "ValueError: no\n\nTraceback …"
        output = {"kind": "json", "value": {"of": step, "number": 0.5}} if error is None else None
        self.machine.attempt_ended(row.node, row.attempt, AttemptOutcome(state, output, error), self.now)
        await self.commit()

    async def anything(self, choice: random.Random) -> None:
        """Something that may happen now."""
        found: list[tuple[StepRun, Attempt]] = list(self.machine.open_attempts())
        if not found:  # everything waits for its next try
            await self.commit()
            return
        row, entry = choice.choice(found)
        if entry.state is AttemptState.QUEUED and choice.random() < 0.7:
            await self.start(row.step, row.item)
        elif choice.random() < 0.4:
            await self.progress(row.step, choice.random(), row.item)
        else:
            ends = [AttemptState.SUCCEEDED] * 4 + [AttemptState.FAILED, AttemptState.LOST]
            await self.end(row.step, row.item, choice.choice(ends))


def _bytes(spec: PipelineSpec) -> bytes:
    return spec.model_dump_json(by_alias=True, exclude_defaults=True).encode()
