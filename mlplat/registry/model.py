"""Registry entities, the commands that change them, and the rules for names (MLflow's)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.registry.history import Subject
from mlplat.registry.semver import SemanticVersion

MAX_NAME_LENGTH = 250
MAX_ALIAS_LENGTH = 255
#: MLflow keeps prompts as registered models with this tag.
PROMPT_TAG = "mlflow.prompt.is_prompt"
#: Shows MLflow's clients the semantic version of each version; it is no tag that could be set.
SEMANTIC_VERSION_TAG = "mlplat.semantic_version"
_ALIAS = re.compile(r"[A-Za-z0-9_\-]+\Z")
_VERSION_LIKE_ALIAS = re.compile(r"v\d+\Z", re.IGNORECASE)
#: As an alias' expected version: there is no such alias.
ABSENT = 0


class Stage(StrEnum):
    """Where a version stands on its way. Values as MLflow writes them."""

    NONE = "None"
    STAGING = "Staging"
    PRODUCTION = "Production"
    ARCHIVED = "Archived"


#: Stages in which versions are in use.
ACTIVE_STAGES = frozenset({Stage.STAGING, Stage.PRODUCTION})


@dataclass(frozen=True)
class Origin:
    """Who asks for a change, and why. Empty: nobody says."""

    user_id: str = ""
    reason: str = ""


NOBODY = Origin()


@dataclass(frozen=True)
class ModelVersion:
    """One immutable version with its mutable tags and aliases."""

    name: str
    version: int
    description: str
    source: str
    artifact_uri: str
    run_id: str | None
    run_link: str | None
    user_id: str
    created_at: datetime
    updated_at: datetime
    semantic: SemanticVersion
    #: Which number of it grew, empty for the first and for those set by hand, and why.
    bump: str
    bump_reason: str
    stage: Stage = Stage.NONE
    tags: dict[str, str] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    #: The digest of its files' manifest, and their stamp then; None: they are elsewhere, or there were none.
    manifest: str | None = None
    stamp: str | None = None


@dataclass(frozen=True)
class RegisteredModel:
    """A named model with its aliases, and the newest version in each stage, newest first."""

    name: str
    description: str
    created_at: datetime
    updated_at: datetime
    tags: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    latest: list[ModelVersion] = field(default_factory=list)


@dataclass(frozen=True)
class CreateModel:
    """Registers a name."""

    name: str
    description: str = ""
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateModel:
    """Replaces the description."""

    name: str
    description: str


@dataclass(frozen=True)
class RenameModel:
    """Renames a model with everything under it."""

    name: str
    new_name: str


@dataclass(frozen=True)
class DeleteModel:
    """Deletes a model with everything under it."""

    name: str


@dataclass(frozen=True)
class SetModelTag:
    """Sets one tag of a model; ``value`` None removes it."""

    name: str
    key: str
    value: str | None


@dataclass(frozen=True)
class CreateVersion:
    """Adds a version; its number is the next of the model, or a later one that an import asks for.

    Args:
        source_run_id: the run that its source names, if ``run_id`` names none.
        version: the number that is asked for.
        semantic_version: the semantic version, or which number of it grows; by default by comparison.
        signature: what the model takes and gives, as JSON of a ``Signature``.
        manifest, stamp, size_bytes: what its files are, see ``artifacts.manifest.Frozen``.
    """

    name: str
    source: str
    artifact_uri: str
    run_id: str | None = None
    run_link: str | None = None
    description: str = ""
    user_id: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    version: int | None = None
    source_run_id: str | None = None
    semantic_version: str | None = None
    signature: str | None = None
    manifest: str | None = None
    stamp: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class UpdateVersion:
    """Replaces the description."""

    name: str
    version: int
    description: str


@dataclass(frozen=True)
class DeleteVersion:
    """Deletes a version and the aliases that point at it; its number is never used again."""

    name: str
    version: int


@dataclass(frozen=True)
class ReportTampering:
    """Notes that files of a version are not what they were; nothing else changes."""

    name: str
    version: int
    problem: str


@dataclass(frozen=True)
class SetVersionTag:
    """Sets one tag of a version; ``value`` None removes it."""

    name: str
    version: int
    key: str
    value: str | None


@dataclass(frozen=True)
class SetAlias:
    """Points an alias at a version; if ``expected`` is given, only if it points at that one, or is ``ABSENT``."""

    name: str
    alias: str
    version: int
    expected: int | None = None


@dataclass(frozen=True)
class DeleteAlias:
    """Removes an alias; a missing one is fine, unless a version is ``expected``."""

    name: str
    alias: str
    expected: int | None = None


@dataclass(frozen=True)
class RollBackAlias:
    """Points an alias at what it pointed at before its last change."""

    name: str
    alias: str


@dataclass(frozen=True)
class SetStage:
    """Moves a version to a stage; ``archive_others`` moves those that were there to ``Archived``."""

    name: str
    version: int
    stage: Stage
    archive_others: bool = False


@dataclass(frozen=True)
class SetPolicy:
    """Replaces the model's policy, which is JSON of a ``policy.Policy``; None leaves everything free."""

    name: str
    policy: dict[str, Any] | None


@dataclass(frozen=True)
class RequestMove:
    """Asks for the approvals that moving a version to a stage, or an alias to a version, needs.

    Args:
        target: the stage, or the alias.
        archive_others: see ``SetStage``.
    """

    name: str
    subject: Subject
    target: str
    version: int
    archive_others: bool = False


@dataclass(frozen=True)
class Decide:
    """Approves a requested move, or rejects it. The last approval that was missing makes the move."""

    name: str
    move_id: int
    approve: bool


@dataclass(frozen=True)
class WithdrawMove:
    """Takes a request back."""

    name: str
    move_id: int


Command = (
    CreateModel
    | UpdateModel
    | RenameModel
    | DeleteModel
    | SetModelTag
    | CreateVersion
    | UpdateVersion
    | DeleteVersion
    | ReportTampering
    | SetVersionTag
    | SetAlias
    | DeleteAlias
    | RollBackAlias
    | SetStage
    | SetPolicy
    | RequestMove
    | Decide
    | WithdrawMove
)


def check_model_name(name: str) -> None:
    """Checks a registered model's name.

    Raises:
        InvalidInput: empty, too long, or with a character that model URIs need.
    """
    if not name or len(name) > MAX_NAME_LENGTH:
        raise InvalidInput(f"Registered model name cannot be empty or longer than {MAX_NAME_LENGTH} characters.")
    if "/" in name or ":" in name:
        raise InvalidInput(f"Invalid model name: '{name}'. Registered model names may not contain '/' or ':'.")


def check_alias(alias: str) -> None:
    """Checks an alias that is to be set.

    Raises:
        InvalidInput: malformed, or reserved.
    """
    if not alias or len(alias) > MAX_ALIAS_LENGTH or not _ALIAS.match(alias):
        raise InvalidInput(
            f"Invalid alias name: '{alias[:300]}'. Aliases have 1 to {MAX_ALIAS_LENGTH} letters, digits, underscores "
            "or dashes."
        )
    if alias.lower() == "latest":
        raise InvalidInput("'latest' alias name (case insensitive) is reserved.")
    if _VERSION_LIKE_ALIAS.match(alias):
        raise InvalidInput(f"Version alias name '{alias}' is reserved.")


def parse_stage(text: str) -> Stage:
    """A stage in any case.

    Raises:
        InvalidInput: there is no such stage.
    """
    for stage in Stage:
        if stage.lower() == text.lower():
            return stage
    raise InvalidInput(f"Invalid Model Version stage: {text[:50]}. Value must be one of {', '.join(Stage)}.")


def parse_version(text: str) -> int:
    """A version number from the wire.

    Raises:
        InvalidInput: not a counting number.
    """
    if not text.isascii() or not text.isdecimal() or len(text) > 18 or int(text) == 0:
        raise InvalidInput(f"Model version must be a positive integer, got '{text[:50]}'.")
    return int(text)
