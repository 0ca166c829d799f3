"""Finding and joining the platform of a state folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from filelock import FileLock, Timeout
from sqlalchemy.exc import SQLAlchemyError

from actors.lifecycle import PLATFORM_ENV
from cluster.disk import plain_disk_errors
from cluster.ports import is_listening
from cluster.state import ClusterRecord, read_record
from mlplat.errors import BringUpError
from mlplat.runtime import NAMESPACE
from mlplat.settings import Settings

LOCK_TIMEOUT_S = 120
#: Tells people what is being done.
Say = Callable[[str], None]


@contextmanager
def exclusive(settings: Settings) -> Iterator[None]:
    """Keeps other bring-ups, stops and restores of this platform out.

    Raises:
        BringUpError: one has been at work for too long.
    """
    lock = FileLock(settings.state_dir / "bringup.lock")
    try:
        with lock.acquire(timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise BringUpError(
            f"another mlplat command has been at work in {settings.state_dir} for {LOCK_TIMEOUT_S} s"
        ) from error


@contextmanager
def plain_errors(settings: Settings) -> Iterator[None]:
    """What commonly goes wrong with a disk or a database, in one line each."""
    try:
        with plain_disk_errors(settings.state_dir):
            yield
    except SQLAlchemyError as error:
        first_line = str(getattr(error, "orig", error)).splitlines()[0]
        raise BringUpError(f"Postgres refused: {first_line}") from error


def living_record(settings: Settings) -> ClusterRecord | None:
    """The recorded cluster if it still answers; a record of dead processes counts as none."""
    record = read_record(settings.state_dir)
    if record is None:
        return None
    host, _colon, port = record.ray_address.rpartition(":")
    return record if is_listening(int(port), host) else None


def connect(record: ClusterRecord) -> None:
    """Joins the cluster as a driver.

    Raises:
        BringUpError: it refused.
    """
    try:
        # Everything that bring-up creates inherits nice 0, Serve's own actors included.
        ray.init(
            address=record.ray_address, namespace=NAMESPACE, runtime_env=PLATFORM_ENV, log_to_driver=False,
            logging_level=logging.ERROR, configure_logging=False,
        )  # fmt: skip
    except (ConnectionError, RuntimeError) as error:
        raise BringUpError(f"Ray at {record.ray_address} refused: {str(error).splitlines()[0]}") from error
