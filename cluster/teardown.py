"""``down``: may be repeated, and interrupted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.connection import Say, connect, exclusive, living_record, plain_errors
from cluster.postgres import EmbeddedPostgres
from cluster.postgres_keeper import POSTGRES_KEEPER
from cluster.ray_head import find_processes, stop_processes, temp_dir
from cluster.state import ClusterRecord, remove_record
from mlplat.errors import BringUpError
from mlplat.runtime import NAMESPACE, SERVE_APP, actor_names
from mlplat.settings import Settings

STOP_LOOKS = 3
STOP_TIMEOUT_S = 15


def down(settings: Settings, *, say: Say) -> bool:
    """Stops the platform and leaves its data. Returns False when nothing was running."""
    with exclusive(settings), plain_errors(settings):
        record = living_record(settings)
        if record is not None:
            say("stopping the actors")
            _stop_actors(record, settings.executors)
        leftovers = find_processes(temp_dir(settings.state_dir))
        if leftovers:
            say("stopping Ray")
        for _look in range(STOP_LOOKS):  # a process that is just being started shows up in the next look
            stop_processes(leftovers)
            if not (again := find_processes(temp_dir(settings.state_dir))):
                break
            leftovers = again
        embedded = settings.postgres_url is None and EmbeddedPostgres(settings.state_dir)
        was_running = record is not None or bool(leftovers) or bool(embedded and embedded.is_running())
        if embedded:
            embedded.stop()
        remove_record(settings.state_dir)
        return was_running


def _stop_actors(record: ClusterRecord, executors: int) -> None:
    """Lets every actor finish what it holds. Whatever cannot be asked loses nothing: truth is in the stores."""
    with suppress(BringUpError):
        connect(record)
        with suppress(ValueError):
            ray.kill(ray.get_actor(POSTGRES_KEEPER, namespace=NAMESPACE))
        for name in reversed(actor_names(executors)):
            with suppress(ValueError, RayError):
                actor: Any = ray.get_actor(name, namespace=NAMESPACE)
                ray.get(actor.stop.remote(), timeout=STOP_TIMEOUT_S)
                ray.kill(actor)
        if not record.head_pids:
            from ray import serve  # noqa: PLC0415  # a second to load, which ending our own Ray does not need

            serve.delete(SERVE_APP)
    ray.shutdown()
