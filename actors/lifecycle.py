"""How long-lived actors start, stay in charge, and end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, TypedDict

import ray

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import PlatformError, Unavailable
from mlplat.runtime import NAMESPACE

_log = logging.getLogger(__name__)
START_RETRY_S = 1.0
START_WAIT_S = 30.0
#: Ray runs workers at nice 15; the platform must not lose against the work it supervises.
#: With an arena for each of its threads glibc would keep several times the memory that large bodies need.
PLATFORM_ENV = {"env_vars": {"RAY_worker_niceness": "0", "MALLOC_ARENA_MAX": "2"}}
WORKLOAD_ENV = {"env_vars": {"RAY_worker_niceness": "15"}}


class Health(TypedDict):
    """What an actor says of itself."""

    pid: int
    lag: str


class Started:
    """Runs an actor's start-up in the background, so that a restarted actor works without being asked.

    While Postgres or the metric store is away, start-up is tried again; callers of ``wait`` get
    ``Unavailable`` meanwhile.
    """

    def __init__(self, start: Callable[[], Awaitable[None]], lease: LeaseKeeper) -> None:
        self._start = start
        self._lease = lease
        self._error: Exception | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def wait(self) -> None:
        """Returns when the actor is in charge.

        Raises:
            Unavailable: it is not yet, and why.
        """
        if self._task.done():
            self._task.result()
            return
        try:
            await asyncio.wait_for(asyncio.shield(self._task), START_WAIT_S)
        except TimeoutError as error:
            reason = f": {self._error}" if self._error else " (another one still holds its lease)"
            raise Unavailable(f"still starting{reason}") from error

    async def _run(self) -> None:
        while True:
            try:
                await self._start()
                break
            except (PlatformError, OSError, *CONNECTION_ERRORS) as error:
                self._error = error
                _log.warning("start-up failed, trying again: %s", error)
                await asyncio.sleep(START_RETRY_S)
        self._watch = asyncio.get_running_loop().create_task(self._exit_when_lost())

    async def _exit_when_lost(self) -> None:
        """A process that is no longer in charge must not go on; Ray starts a fresh one."""
        await self._lease.lost.wait()
        _log.error("lost its lease; exiting")
        logging.shutdown()
        os._exit(1)

    def release(self) -> None:
        """Stops watching the lease, before it is given back on purpose."""
        if self._task.done():
            self._watch.cancel()


def spare_garbage_collection() -> None:
    """Leaves what start-up made out of every collection, and collects less often.

    Each request makes a thousand short-lived objects, which would set off the collector every time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def actor_id() -> str:
    """This actor's identity, which survives restarts of its process."""
    return str(ray.get_runtime_context().get_actor_id())


def get_or_create(actor_class: type, name: str, *arguments: Any) -> Any:
    """The detached actor of that name, created if there is none. Racing callers get the same one.

    Its handle has the coroutines of ``actor_class`` that are public.
    """
    remote: Any = ray.remote(_proxy_of(actor_class))
    return remote.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=10_000,
        num_cpus=0,
        runtime_env=PLATFORM_ENV,
    ).remote(partial(actor_class, *arguments))


def _proxy_of(actor_class: type) -> type:
    """A class of the same methods that loads nothing until an actor is made of it.

    Ray loads an actor's class in every process that takes its handle, which all steps and training workers do: with
    the class itself would come all that it imports, half a second and 35 MB.
    """

    def start(self: Any, make: Callable[[], Any]) -> None:
        self.actor = make()

    def forwarding(method: str) -> Callable[..., Awaitable[Any]]:
        async def forward(self: Any, *arguments: Any) -> Any:
            return await getattr(self.actor, method)(*arguments)

        return forward

    methods = [name for name, value in vars(actor_class).items() if iscoroutinefunction(value) and name[0] != "_"]
    members = {name: forwarding(name) for name in methods} | {"__init__": start, "__module__": actor_class.__module__}
    return type(actor_class.__name__, (), members)
