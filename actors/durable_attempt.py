"""DurableAttempt: one attempt in a detached actor of its own, which outlives whoever supervises it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from typing import Any

import ray

from mlplat.errors import Unavailable
from mlplat.execution.attempt import run_attempt
from mlplat.execution.attendant import Notice
from mlplat.pipelines.model import AttemptOutcome, AttemptRequest
from mlplat.runtime import NAMESPACE
from mlplat.settings import PlatformConfig

NAME_PREFIX = "attempt:"


class DurableAttempt:
    """Runs the attempt in a thread from the start, and keeps its outcome until it is killed.

    The user's code shares the process, but not the thread that answers calls.
    """

    def __init__(self, request: AttemptRequest, config: PlatformConfig, executor: str) -> None:
        self._executor = executor
        self._begun: Notice | None = None
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[AttemptOutcome] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(request, config), name="mlplat-attempt", daemon=True)
        self._thread.start()

    async def outcome(self, executor: str) -> AttemptOutcome:
        """How the attempt ended, once it has. ``executor`` is told about it from now on."""
        self._executor = executor
        if self._begun is not None:  # whoever takes it over has to know, above all for its timeout
            tell_executor(executor, self._begun)
        return await asyncio.shield(self._outcome)

    async def pid(self) -> int:
        """Answers while the process lives."""
        return os.getpid()

    async def stop(self) -> None:
        """Raises KeyboardInterrupt in the user's code. Code that does not come back to Python does not see it."""
        identity = self._thread.ident
        if identity is not None and self._thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(identity), ctypes.py_object(KeyboardInterrupt))

    def _run(self, request: AttemptRequest, config: PlatformConfig) -> None:
        outcome = run_attempt(request, config, self._tell)
        self._loop.call_soon_threadsafe(self._outcome.set_result, outcome)

    def _tell(self, notice: Notice) -> None:
        if notice.progress is None:
            self._begun = notice
        tell_executor(self._executor, notice)


def tell_executor(executor: str, notice: Notice) -> None:
    """Sends the notice without waiting for anything; it is lost when the executor is away."""
    try:
        ray.get_actor(executor, namespace=NAMESPACE).notice.remote(notice)
    except ValueError:
        return


class DurableActors:
    """The actors of durable attempts, for ``LeftoverReaper``."""

    async def labels(self) -> list[str]:
        """The attempts that have one."""
        named = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        found = [entry["name"] for entry in named if entry["namespace"] == NAMESPACE]
        return [name.removeprefix(NAME_PREFIX) for name in found if name.startswith(NAME_PREFIX)]

    def kill(self, label: str) -> None:
        """Ends one."""
        kill_durable(label)


def kill_durable(label: str) -> None:
    """Ends the attempt's actor, if there is one."""
    try:
        ray.kill(get_durable(label))
    except Unavailable:
        return


def get_durable(label: str) -> Any:
    """The attempt's actor.

    Raises:
        Unavailable: there is none.
    """
    try:
        return ray.get_actor(NAME_PREFIX + label, namespace=NAMESPACE)
    except ValueError as error:
        raise Unavailable(f"no process runs attempt {label}") from error
