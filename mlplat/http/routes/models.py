"""/api/v1/models: what MLflow's registry endpoints do not have."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from mlplat.errors import InvalidInput
from mlplat.http.intact import report
from mlplat.http.mlflow.endpoint import MAX_IDEMPOTENCY_KEY
from mlplat.http.services import Services
from mlplat.registry.frozen import told
from mlplat.registry.history import Subject
from mlplat.registry.model import (
    ABSENT,
    MAX_ALIAS_LENGTH,
    MAX_NAME_LENGTH,
    Command,
    DeleteAlias,
    ModelVersion,
    Origin,
    RollBackAlias,
    SetAlias,
    SetStage,
    Stage,
)
from mlplat.registry.semver import MAX_RANGE_LENGTH, parse_range, parse_semantic_version

MAX_MOVES = 100
MAX_CHANGES = 1_000
Name = Annotated[str, Path(max_length=MAX_NAME_LENGTH)]
AliasName = Annotated[str, Field(min_length=1, max_length=MAX_ALIAS_LENGTH)]
VersionNumber = Annotated[int, Field(ge=1, lt=2**63)]
IdempotencyKey = Annotated[str | None, Header(max_length=MAX_IDEMPOTENCY_KEY)]


class ChangeRequest(BaseModel):
    """Who asks for a change, and why: it stays in the history."""

    model_config = ConfigDict(extra="forbid")

    by: str = Field(default="", max_length=200)
    reason: str = Field(default="", max_length=2_000)

    @property
    def origin(self) -> Origin:
        """For the registry."""
        return Origin(self.by, self.reason)


class Move(BaseModel):
    """Where an alias goes."""

    model_config = ConfigDict(extra="forbid")

    alias: AliasName
    version: VersionNumber | None = Field(description="null: the alias is deleted.")
    expected_version: Annotated[int, Field(ge=ABSENT, lt=2**63)] | None = Field(
        default=None, description="Only if it points at this version now; 0: only if it is not set. Else 409."
    )

    def command(self, name: str) -> Command:
        """For the registry."""
        if self.version is None:
            return DeleteAlias(name, self.alias, self.expected_version)
        return SetAlias(name, self.alias, self.version, self.expected_version)


class MoveRequest(ChangeRequest):
    """Aliases that move together, all or none."""

    moves: list[Move] = Field(min_length=1, max_length=MAX_MOVES)


class StageRequest(ChangeRequest):
    """Where a version goes."""

    stage: Stage
    archive_others: bool = Field(default=False, description="Versions that are there now go to Archived.")


class AliasesAnswer(BaseModel):
    """The aliases of a model, and the versions that they point at."""

    name: str
    aliases: dict[str, int]


class RollbackAnswer(BaseModel):
    """What an alias points at now, and pointed at before."""

    name: str
    alias: str
    version: int
    was: int


class StageAnswer(BaseModel):
    """The stage of a version."""

    name: str
    version: int
    stage: Stage


class VersionAnswer(BaseModel):
    """A version. `bump` is the number of the semantic version that grew for it, for `bump_reason`; `manifest` is the
    digest of what its files are, null if they are elsewhere, or there are none."""

    name: str
    version: int
    semantic_version: str
    bump: str
    bump_reason: str
    stage: Stage
    aliases: list[str]
    tags: dict[str, str]
    description: str
    source: str
    artifact_uri: str
    run_id: str | None
    manifest: str | None
    created_at: datetime
    updated_at: datetime

    @classmethod
    def of(cls, version: ModelVersion) -> VersionAnswer:
        """As the API tells it."""
        known = {name: getattr(version, name) for name in cls.model_fields.keys() - {"semantic_version"}}
        return cls(**known, semantic_version=str(version.semantic))


class FileProblem(BaseModel):
    """A file that is not what it was when its version was registered."""

    path: str
    problem: str


class VerifyAnswer(BaseModel):
    """Whether the files of a version are what they were; `frozen` false: nothing is known of them."""

    name: str
    version: int
    frozen: bool
    intact: bool
    problems: list[FileProblem]


class ChangeAnswer(BaseModel):
    """One change: of the model's name, of an alias (`key`) or of the stage of a version (`key`).

    `before` and `after` are a name, a version or a stage; null: it was not there, or is no more.
    """

    change_id: int
    subject: Subject
    key: str
    before: str | None
    after: str | None
    at: datetime
    by: str
    reason: str
    request_id: str


class MomentAnswer(AliasesAnswer):
    """What a model was at some time. `stages` has the versions that there were."""

    at: datetime
    stages: dict[int, Stage]


async def execute(
    services: Services, key: str | None, commands: Sequence[Command], origin: Origin
) -> list[dict[str, Any]]:
    """One request of the registry's writer; see ``RegistryService.execute``."""
    return await services.registry_writer.execute(key or uuid.uuid4().hex, commands, origin)


def router(services: Services) -> APIRouter:
    """Registered models, by name."""
    api = APIRouter(prefix="/api/v1/models", tags=["models"])

    @api.get("/{name}/aliases")
    async def aliases(name: Name) -> AliasesAnswer:
        """The aliases of a model."""
        return AliasesAnswer(name=name, aliases=(await services.registry.get_model(name)).aliases)

    @api.post("/{name}/aliases")
    async def move(name: Name, request: MoveRequest, idempotency_key: IdempotencyKey = None) -> AliasesAnswer:
        """Moves aliases, all or none. A swap moves two that expect one another's versions."""
        if len({item.alias for item in request.moves}) < len(request.moves):
            raise InvalidInput("moves: an alias can move only once in a request")
        await execute(services, idempotency_key, [item.command(name) for item in request.moves], request.origin)
        return await aliases(name)

    @api.post("/{name}/aliases/{alias}/rollback")
    async def roll_back(
        name: Name, alias: AliasName, request: ChangeRequest, idempotency_key: IdempotencyKey = None
    ) -> RollbackAnswer:
        """Points an alias at what it pointed at before its last change; a second one undoes the first."""
        origin = request.origin if request.reason else Origin(request.by, "rollback")
        [answer] = await execute(services, idempotency_key, [RollBackAlias(name, alias)], origin)
        return RollbackAnswer(name=name, alias=alias, **answer)

    @api.get("/{name}/versions")
    async def versions(
        name: Name,
        range_: Annotated[
            str, Query(alias="range", description="Such as `^1.2`, `~1.2.3`, `1.x` or `>=1.2 <3`.")
        ] = "*",
        limit: Annotated[int, Query(ge=1, le=MAX_CHANGES)] = 100,
        below: Annotated[str | None, Query(description="The last `semantic_version` of the page before.")] = None,
    ) -> list[VersionAnswer]:
        """Versions in a range, the highest semantic version first."""
        wanted = parse_range(range_)
        last = None if below is None else parse_semantic_version(below)
        found = await services.registry.list_versions(name, wanted, limit, last)
        if not found:
            await services.registry.get_model(name)
        return [VersionAnswer.of(version) for version in found]

    @api.get("/{name}/versions/{spec}")
    async def version(name: Name, spec: Annotated[str, Path(max_length=MAX_RANGE_LENGTH)]) -> VersionAnswer:
        """The version that `spec` stands for: a number (`3`), a semantic version (`1.2.0`), the highest in a range
        (`^1.2`), `latest`, the newest in a stage (`Production`), or that of an alias (`@champion`)."""
        return VersionAnswer.of(await services.registry.resolve(name, spec))

    @api.get("/{name}/versions/{spec}/verify")
    async def verify(name: Name, spec: Annotated[str, Path(max_length=MAX_RANGE_LENGTH)]) -> VerifyAnswer:
        """Reads all files of a version, and compares them with what was registered."""
        found = await services.registry.resolve(name, spec)
        problems = await services.frozen.check(found)
        if problems:
            await report(services, found, told(found, problems))
        return VerifyAnswer(
            name=found.name, version=found.version, frozen=found.manifest is not None, intact=not problems,
            problems=[FileProblem(path=one.path, problem=one.what) for one in problems],
        )  # fmt: skip

    @api.post("/{name}/versions/{version}/stage")
    async def set_stage(
        name: Name, version: VersionNumber, request: StageRequest, idempotency_key: IdempotencyKey = None
    ) -> StageAnswer:
        """Moves a version to a stage."""
        command = SetStage(name, version, request.stage, request.archive_others)
        await execute(services, idempotency_key, [command], request.origin)
        return StageAnswer(name=name, version=version, stage=request.stage)

    @api.get("/{name}/history")
    async def history(
        name: Name,
        subject: Subject | None = None,
        key: Annotated[str | None, Query(max_length=MAX_ALIAS_LENGTH, description="An alias, or a version.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_CHANGES)] = 100,
        before: Annotated[int | None, Query(description="The last `change_id` of the page before.")] = None,
    ) -> list[ChangeAnswer]:
        """Changes of a model, newest first; of a deleted one, too."""
        found = await services.registry_history.changes(name, subject, key, limit, before)
        return [
            ChangeAnswer(
                change_id=item.change_id, subject=item.change.subject, key=item.change.key, before=item.change.before,
                after=item.change.after, at=item.at, by=item.user_id, reason=item.reason, request_id=item.request_id,
            )
            for item in found
        ]  # fmt: skip

    @api.get("/{name}/at")
    async def at(
        name: Name, time: Annotated[datetime | None, Query(description="With a time zone; by default now.")] = None
    ) -> MomentAnswer:
        """What the model that had the name then was then: "what was production last Tuesday"."""
        if time is not None and time.tzinfo is None:
            raise InvalidInput("time: has no time zone; write for instance 2026-01-31T12:00:00Z")
        found = await services.registry_history.at(name, time)
        return MomentAnswer(
            name=name, at=found.at, aliases=found.aliases, stages={n: Stage(stage) for n, stage in found.stages.items()}
        )

    return api
