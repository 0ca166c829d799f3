"""Calls between the platform's processes: by name, with deadlines, retries and plain errors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray._private import state as ray_state
from ray.exceptions import RayActorError, RayTaskError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from mlplat.errors import PlatformError, Unavailable
from mlplat.metrics.queries import Statement
from mlplat.pipelines.model import Submission
from mlplat.registry.model import Command
from mlplat.runtime import (
    ACTOR_NAMES,
    GATEWAY_DEPLOYMENT,
    METRIC_SHARD,
    NAMESPACE,
    PIPELINE_SCHEDULER,
    REGISTRY_COORDINATOR,
)

#: A restart takes one to three seconds; callers outwait it.
RETRY_FOR_S = 20.0
CALL_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 2.0
#: Rewriting the parts of the metric store that a purged or moved run lies in.
RECONCILE_TIMEOUT_S = 600.0


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
        retries = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            wait=wait_random_exponential(multiplier=0.05, max=1),
            stop=stop_after_delay(RETRY_FOR_S),
            reraise=True,
        )
        return await retries(self.call, method, *arguments)


class MetricShardClient:
    """The metric shard, for the HTTP layer."""

    def __init__(self) -> None:
        self._actor = ActorClient(METRIC_SHARD)

    async def append(self, batch: bytes) -> int:
        """See ``MetricService.append``. Repeats are harmless: equal points collapse."""
        return int(await self._actor.call_idempotent("append", batch))

    async def query(self, statement: Statement) -> pa.Table:
        """See ``MetricService.query``."""
        body: bytes = await self._actor.call_idempotent("query", statement)
        with pa.ipc.open_stream(body) as reader:
            return reader.read_all()

    async def reconcile(self, run_ids: Sequence[str]) -> int:
        """See ``MetricService.reconcile``; a repeat finds nothing left to do."""
        return int(await self._actor.call("reconcile", list(run_ids), timeout_s=RECONCILE_TIMEOUT_S))


class RegistryClient:
    """The registry coordinator, for the HTTP layer."""

    def __init__(self) -> None:
        self._actor = ActorClient(REGISTRY_COORDINATOR)

    async def execute(self, request_id: str, command: Command) -> dict[str, Any]:
        """See ``RegistryService.execute``; the request id makes repeats harmless."""
        answer: dict[str, Any] = await self._actor.call_idempotent("execute", request_id, command)
        return answer


class SchedulerClient:
    """The pipeline scheduler, for the HTTP layer."""

    def __init__(self) -> None:
        self._actor = ActorClient(PIPELINE_SCHEDULER)

    async def submit(self, submission: Submission) -> str:
        """See ``SchedulerService.submit``; the idempotency key makes repeats harmless."""
        return str(await self._actor.call_idempotent("submit", submission))


class ExecutorClient:
    """A run executor, for the scheduler."""

    def __init__(self, name: str) -> None:
        self._actor = ActorClient(name)

    @property
    def name(self) -> str:
        """Its actor name."""
        return self._actor.name

    async def assign(self, run_id: str, epoch: int) -> None:
        """Hands a run over; a repeat with the same epoch changes nothing."""
        await self._actor.call("assign", run_id, epoch, timeout_s=10)

    async def owned(self) -> Mapping[str, int]:
        """The runs it drives, with their epochs."""
        runs: Mapping[str, int] = await self._actor.call("owned", timeout_s=5)
        return runs


class ClusterStatus:
    """The platform's actors as Ray's control store and they themselves see them."""

    def __init__(self) -> None:
        self._actors = {name: ActorClient(name) for name in ACTOR_NAMES}

    async def actors(self) -> list[dict[str, Any]]:
        """One row per actor: actor, node, pid, restarts, health, lag."""
        # ray.util.state would need the dashboard; this reads the control store directly, in a millisecond.
        known = list((await asyncio.to_thread(ray_state.actors)).values())
        rows = await asyncio.gather(*(self._row(name, known) for name in ACTOR_NAMES))
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
