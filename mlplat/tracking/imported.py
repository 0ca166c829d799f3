"""What an import brings, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from mlplat.tracking.logged_model import LoggedModelStatus
from mlplat.tracking.model import RunStatus


@dataclass(frozen=True)
class ImportedRun:
    """A run under its id here. ``artifact_uri``: only for artifacts that the platform does not serve."""

    run_id: str
    name: str
    status: RunStatus
    user_id: str
    started_at: datetime
    ended_at: datetime | None
    deleted: bool
    artifact_uri: str | None
    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class ImportedModel:
    """A logged model under its id here. ``artifact_uri``: only for artifacts that the platform does not serve."""

    model_id: str
    name: str
    status: LoggedModelStatus
    model_type: str | None
    source_run_id: str | None
    created_at: datetime
    updated_at: datetime
    deleted: bool
    artifact_uri: str | None
    params: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class InputLink:
    """A dataset that a run read, with the tags of that use."""

    run_id: str
    name: str
    digest: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelLink:
    """A model that a run read or made; ``direction`` is ``input`` or ``output``."""

    run_id: str
    direction: str
    model_id: str
    step: int
