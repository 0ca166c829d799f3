"""What a purge may remove, and what it must leave: rules without I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from mlplat.errors import InvalidInput

_PART = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
#: Postgres' intervals end earlier than Python's; nobody keeps deleted runs for longer.
MAX_AGE = timedelta(days=36_500)


@dataclass(frozen=True)
class Scope:
    """What to look at: everything deleted for at least ``older_than``, narrowed by what is not None."""

    older_than: timedelta = timedelta(0)
    run_ids: tuple[str, ...] | None = None
    experiment_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DeletedRun:
    """A run that may be purged."""

    run_id: str
    experiment_id: int
    artifact_uri: str


@dataclass(frozen=True)
class Kept:
    """Something that is deleted and stays. ``kind`` is ``run``, ``experiment`` or ``artifacts``."""

    kind: str
    id: str
    reason: str


@dataclass
class PurgeReport:
    """What was removed, or in a dry run would be. Bytes in Postgres and the metric store are estimates."""

    runs: int = 0
    experiments: int = 0
    artifact_files: int = 0
    artifact_bytes: int = 0
    metric_bytes: int = 0
    postgres_bytes: int = 0
    kept: list[Kept] = field(default_factory=list)
    #: Asked for by id, but there is no such run (any more).
    missing: list[str] = field(default_factory=list)
    #: Where the next call goes on; None: this was everything.
    next: str | None = None


def parse_age(text: str) -> timedelta:
    """The time span in ``90s``, ``45m``, ``12h``, ``30d``, ``2w`` or several of them (``1d12h``).

    Raises:
        InvalidInput: anything else, or more than a hundred years.
    """
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InvalidInput(f"not a time span: {text[:100]!r}. Write 90s, 45m, 12h, 30d, 2w or 1d12h.")
    try:
        age = sum((timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts), timedelta(0))
    except OverflowError:
        age = timedelta.max
    if age > MAX_AGE:
        raise InvalidInput(f"{text} is more than a hundred years")
    return age


def run_folder(path: str, run_id: str) -> str:
    """The folder to remove with a run whose artifacts lie at ``path``: also the one named after it, if there is."""
    return path.removesuffix("/artifacts") if path.endswith(f"/{run_id}/artifacts") else path


class Holders:
    """Which model versions need which folders."""

    def __init__(self, versions: Iterable[tuple[str, str]]) -> None:
        """``versions``: name for people, and artifact URI."""
        self._by_folder: dict[str, str] = {}
        for version, uri in versions:
            for folder in _folders(uri):
                self._by_folder.setdefault(folder, version)

    def of(self, uri: str) -> str | None:
        """A model version whose files lie at or below ``uri``, None when there is none."""
        return self._by_folder.get(uri.rstrip("/"))


def _folders(uri: str) -> Iterator[str]:
    folder = uri.rstrip("/")
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def split(runs: Sequence[DeletedRun], holders: Holders) -> tuple[list[DeletedRun], list[Kept]]:
    """The runs to remove, and those that stay because a model version needs their artifacts."""
    taken: list[DeletedRun] = []
    kept: list[Kept] = []
    for run in runs:
        version = holders.of(run.artifact_uri)
        if version is None:
            taken.append(run)
        else:
            kept.append(Kept("run", run.run_id, f"{version} uses its artifacts"))
    return taken, kept
