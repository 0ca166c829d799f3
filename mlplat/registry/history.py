"""What the registry remembers of names, aliases and stages: who changed what, when and why. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

#: The key of a model's only subject.
NAME = "name"


class Subject(StrEnum):
    """What a change is about: a model's name, an alias, or the stage of a version."""

    MODEL = "model"
    ALIAS = "alias"
    STAGE = "stage"


@dataclass(frozen=True)
class Change:
    """One change of one subject, told apart by ``key``: the alias, or the version's number.

    ``before`` and ``after`` are a name, a version's number or a stage; None: it was not there, or is no more.
    """

    subject: Subject
    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Recorded:
    """A change in the log, and whose it was."""

    change_id: int
    change: Change
    at: datetime
    user_id: str
    reason: str
    request_id: str


@dataclass(frozen=True)
class Moment:
    """What a model was at some time: its aliases, and the stages of the versions that it had."""

    name: str
    at: datetime
    aliases: dict[str, int]
    stages: dict[int, str]
