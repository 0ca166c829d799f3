"""Calls between the platform's processes: by name, with deadlines, retries and plain errors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray._private import state as ray_state
from ray.exceptions import RayActorError, RayTaskError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from mlplat.db.group_commit import GroupCommit
from mlplat.errors import PlatformError, Unavailable
from mlplat.metrics.model import Archived
from mlplat.metrics.queries import Statement
from mlplat.pipelines.model import Assignment, Submission
from mlplat.registry.model import NOBODY, Command, Origin
from mlplat.runtime import (
    GATEWAY_DEPLOYMENT,
    METRIC_SHARD,
    NAMESPACE,
    PIPELINE_SCHEDULER,
    REGISTRY_COORDINATOR,
    actor_names,
)
from mlplat.tracking.model import RunUpdate

#: A restart takes one to three seconds; callers outwait it.
RETRY_FOR_S = 20.0
CALL_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 2.0
#: Rewriting the parts of the metric store that a purged or moved run lies in.
RECONCILE_TIMEOUT_S = 600.0
ARCHIVE_TIMEOUT_S = 3_600.0
#: Calls with metric batches that one gateway has under way at once, and what they may hold.
LANES = 2
MAX_CALL_BYTES = 4 * 1024 * 1024
MAX_UNDERWAY_BYTES = 64 * 1024 * 1024
#: Submissions that one gateway has under way at once.
MAX_SUBMITTING = 2_000


class ActorClient:
    """Calls one actor by its name. The handle heals by itself when the actor restarts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._handle: Any = None

    async def call(self, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """One call.

        Raises:
            Unavailable: the actor is restarting or did not answer; the call may or may not have happened.
            PlatformError: what the method raised.
        """
        try:
            if self._handle is None:
                self._handle = ray.get_actor(self.name, namespace=NAMESPACE)
            async with asyncio.timeout(timeout_s):
                return await getattr(self._handle, method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, PlatformError):
                raise error.cause from None
            raise
        except RayActorError as error:
            self._handle = None
            raise Unavailable(f"{self.name} is restarting; retry") from error
        except ValueError as error:  # no actor of that name
            raise Unavailable(f"{self.name} is not running") from error
        except TimeoutError as error:
            raise Unavailable(f"{self.name} did not answer within {timeout_s:g} s") from error

    async def call_idempotent(self, method: str, *arguments: Any) -> Any:
        """A call that may safely happen twice: repeated while the actor is away, for ``RETRY_FOR_S``."""
        with suppress(Unavailable):
            return await self.call(method, *arguments)
        retries = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_random_exponential(multiplier=0.05, max=1),
            stop=stop_after_delay(RETRY_FOR_S),
            reraise=True,
        )
        return await retries(self.call, method, *arguments)


@dataclass
class _Outgoing:
    """A batch on its way to the shard, and what the shard said of it."""

    body: bytes
    answer: int | PlatformError = 0


@dataclass
class _OutgoingSubmission:
    """A submission on its way to the scheduler, and what that said of it: a run's id, a refusal, or nothing yet."""

    submission: Submission
    answer: str | PlatformError | None = None


class MetricShardClient:
    """The metric shard, for the HTTP layer. Batches that arrive while a call is under way share the next one."""

    def __init__(self) -> None:
        self._actor = ActorClient(METRIC_SHARD)
        self._lanes: list[GroupCommit[_Outgoing]] = []
        self._next_lane = 0

    async def append(self, batch: bytes, update: RunUpdate | None = None) -> int:
        """See ``MetricService.append``. Repeats are harmless: equal points collapse."""
        if update is not None:
            return int(await self._actor.call_idempotent("append", batch, update))
        outgoing = _Outgoing(batch)
        await self._lane().submit(outgoing)
        if isinstance(outgoing.answer, PlatformError):
            raise outgoing.answer
        return outgoing.answer

    async def query(self, statement: Statement) -> pa.Table:
        """See ``MetricService.query``."""
        body: bytes = await self._actor.call_idempotent("query", statement)
        with pa.ipc.open_stream(body) as reader:
            return reader.read_all()

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """See ``MetricService.reconcile``; a repeat finds nothing left to do."""
        return int(await self._actor.call("reconcile", list(run_ids), timeout_s=RECONCILE_TIMEOUT_S))

    async def archive(self, run_ids: Sequence[str]) -> Archived:
        """See ``MetricService.archive``."""
        found: Archived = await self._actor.call("archive", list(run_ids), timeout_s=ARCHIVE_TIMEOUT_S)
        return found

    def _lane(self) -> GroupCommit[_Outgoing]:
        if not self._lanes:  # not before there is an event loop
            self._lanes = [
                GroupCommit(self._send, weight=lambda item: len(item.body), max_group=MAX_CALL_BYTES,
                            max_pending=MAX_UNDERWAY_BYTES)
                for _ in range(LANES)
            ]  # fmt: skip
        self._next_lane = (self._next_lane + 1) % LANES
        return min(self._lanes[self._next_lane :] + self._lanes[: self._next_lane], key=lambda lane: lane.pending)

    async def _send(self, group: Sequence[_Outgoing]) -> None:
        if len(group) == 1:
            group[0].answer = int(await self._actor.call_idempotent("append", group[0].body))
            return
        answers = await self._actor.call_idempotent("append_all", [item.body for item in group])
        for item, answer in zip(group, answers, strict=True):
            item.answer = answer


class RegistryClient:
    """The registry coordinator, for the HTTP layer."""

    def __init__(self) -> None:
        self._actor = ActorClient(REGISTRY_COORDINATOR)

    async def execute(
        self, request_id: str, commands: Sequence[Command], origin: Origin = NOBODY
    ) -> list[dict[str, Any]]:
        """See ``RegistryService.execute``; the request id makes repeats harmless."""
        answers: list[dict[str, Any]] = await self._actor.call_idempotent("execute", request_id, commands, origin)
        return answers


class SchedulerClient:
    """The pipeline scheduler, for the HTTP layer and the executors."""

    def __init__(self) -> None:
        self._actor = ActorClient(PIPELINE_SCHEDULER)
        self._lane: GroupCommit[_OutgoingSubmission] | None = None

    async def submit(self, submission: Submission) -> str:
        """See ``SchedulerService.submit``; the idempotency key makes repeats harmless.

        Submissions that arrive while a call is under way share the next one. What the scheduler cannot answer at
        once, because it has to import something first, is asked for again alone, so that nobody waits for it.
        """
        if self._lane is None:  # not before there is an event loop
            self._lane = GroupCommit(self._send, max_group=100, max_pending=MAX_SUBMITTING)
        outgoing = _OutgoingSubmission(submission)
        await self._lane.submit(outgoing)
        if isinstance(outgoing.answer, PlatformError):
            raise outgoing.answer
        if outgoing.answer is None:
            return str(await self._actor.call_idempotent("submit", submission))
        return outgoing.answer

    async def cancel(self, run_id: str, by: str) -> None:
        """See ``SchedulerService.cancel``."""
        await self._actor.call_idempotent("cancel", run_id, by)

    async def poke(self, run_id: str) -> None:
        """People told the run something: its executor looks now."""
        await self._actor.call("poke", run_id, timeout_s=5)

    async def wake(self) -> None:
        """See ``SchedulerService.wake``."""
        await self._actor.call("wake", timeout_s=5)

    async def _send(self, group: Sequence[_OutgoingSubmission]) -> None:
        answers = await self._actor.call_idempotent("submit_known", [item.submission for item in group])
        for item, answer in zip(group, answers, strict=True):
            item.answer = answer

    async def ended(self, run_ids: Sequence[str]) -> None:
        """See ``SchedulerService.ended``."""
        await self._actor.call("ended", list(run_ids), timeout_s=5)


class ExecutorClient:
    """A run executor, for the scheduler."""

    def __init__(self, name: str) -> None:
        self._actor = ActorClient(name)

    @property
    def name(self) -> str:
        """Its actor name."""
        return self._actor.name

    async def assign(self, assignments: Sequence[Assignment]) -> None:
        """Hands runs over; a repeat with the same epochs changes nothing."""
        await self._actor.call("assign", list(assignments), timeout_s=10)

    async def owned(self) -> Mapping[str, int]:
        """The runs it drives, with their epochs."""
        runs: Mapping[str, int] = await self._actor.call("owned", timeout_s=5)
        return runs

    async def poke(self) -> None:
        """People told its runs something."""
        await self._actor.call("poke", timeout_s=5)


class ClusterStatus:
    """The platform's actors as Ray's control store and they themselves see them."""

    def __init__(self, executors: int) -> None:
        self._actors = {name: ActorClient(name) for name in actor_names(executors)}

    async def actors(self) -> list[dict[str, Any]]:
        """One row per actor: actor, node, pid, restarts, health, lag."""
        # ray.util.state would need the dashboard; this reads the control store directly, in a millisecond.
        known = list((await asyncio.to_thread(ray_state.actors)).values())
        rows = await asyncio.gather(*(self._row(name, known) for name in self._actors))
        return [*rows, *_gateway_rows(known)]

    async def _row(self, name: str, known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = [entry for entry in known if entry["Name"] == name and entry["State"] != "DEAD"]
        if not found:
            return _row(name, None, "missing", "-")
        try:
            health = await self._actors[name].call("health", timeout_s=HEALTH_TIMEOUT_S)
        except Unavailable:
            return _row(name, found[0], "not answering", "-")
        return _row(name, found[0], "ok", health["lag"])


def _gateway_rows(known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    replicas = [
        entry
        for entry in known
        if entry["ActorClassName"].startswith("ServeReplica:") and entry["ActorClassName"].endswith(GATEWAY_DEPLOYMENT)
        and entry["State"] != "DEAD"
    ]  # fmt: skip
    return [_row("gateway", entry, "ok" if entry["State"] == "ALIVE" else "starting", "-") for entry in replicas]


def _row(name: str, entry: Mapping[str, Any] | None, health: str, lag: str) -> dict[str, Any]:
    if entry is None:
        return {"actor": name, "node": "-", "pid": None, "restarts": 0, "health": health, "lag": lag}
    return {
        "actor": name,
        "node": entry["Address"]["IPAddress"] or "-",
        "pid": entry["Pid"] or None,
        "restarts": entry["NumRestarts"],
        "health": health if entry["State"] == "ALIVE" else str(entry["State"]).lower(),
        "lag": lag,
    }
