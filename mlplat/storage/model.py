"""Rules of retention, legal holds and quotas, without I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from mlplat.artifacts.layout import ARCHIVED_METRICS
from mlplat.errors import InvalidInput, PermissionDenied

MAX_REASON = 2_000
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z", re.ASCII)


class HoldKind(StrEnum):
    """What a legal hold is about."""

    EXPERIMENT = "experiment"
    RUN = "run"


@dataclass(frozen=True)
class Subject:
    """An experiment or a run."""

    kind: HoldKind
    id: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"


@dataclass(frozen=True)
class Hold:
    """Nothing of the subject may be changed or removed until the hold is lifted."""

    subject: Subject
    reason: str
    by: str
    at: datetime


@dataclass(frozen=True)
class Owner:
    """Whose files lie at a path of the artifact store; None: nobody's, or that cannot be told from the path."""

    experiment_id: str | None = None
    run_id: str | None = None

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What a hold on these files could be about."""
        named = ((HoldKind.EXPERIMENT, self.experiment_id), (HoldKind.RUN, self.run_id))
        return tuple(Subject(kind, value) for kind, value in named if value is not None)


@dataclass(frozen=True)
class Retention:
    """How long things are kept that nobody deletes. Everything else is kept for good.

    Args:
        checkpoints: of a pipeline run, after its end.
        logs: of steps and of runs' consoles, after the end.
        hot_metrics: points of runs, after the end, in the metric store; then they are kept in the archive, for good.
        grace: of blobs that nothing refers to any more.
        every: between two collections; None: only when somebody asks.
    """

    checkpoints: timedelta = timedelta(days=7)
    logs: timedelta = timedelta(days=365)
    hot_metrics: timedelta = timedelta(days=365)
    grace: timedelta = timedelta(hours=24)
    every: timedelta | None = timedelta(hours=24)


@dataclass(frozen=True)
class Quota:
    """How many bytes the artifacts of an experiment may have, and about how many they have."""

    experiment_id: int
    limit_bytes: int
    used_bytes: int


def parse_subject(kind: str, id_: str) -> Subject:
    """The subject with this kind and id.

    Raises:
        InvalidInput: there are no such subjects.
    """
    try:
        known = HoldKind(kind)
    except ValueError as error:
        raise InvalidInput(f"{kind!r} cannot be held; there are {', '.join(HoldKind)}") from error
    if not (_RUN_ID.match(id_) if known is HoldKind.RUN else id_.isascii() and id_.isdecimal()):
        raise InvalidInput(f"not the id of a {known}: {id_[:80]!r}")
    return Subject(known, id_)


def require_users(path: str) -> None:
    """Raises when a path is one that only the platform writes to.

    Raises:
        PermissionDenied: it is.
    """
    if path.split("/", 1)[0] == ARCHIVED_METRICS:
        raise PermissionDenied(
            f"'{ARCHIVED_METRICS}' has the archived metrics of runs: everybody may read it, and only the platform "
            "writes and removes there."
        )


def owner_of(path: str) -> Owner:
    """Of the layout ``<experiment>/<run>/artifacts/…``; files of logged models belong to the experiment."""
    parts = path.split("/")
    if not (parts[0].isascii() and parts[0].isdecimal()):
        return Owner()
    is_run = len(parts) > 1 and parts[1] != "models"
    return Owner(parts[0], parts[1] if is_run else None)
