"""Keeps commands to the model's policy, whichever door they come through."""

from __future__ import annotations

import shlex
from urllib.parse import quote

from sqlalchemy import select

from mlplat.db.tables import model_alias, model_version
from mlplat.errors import PermissionDenied
from mlplat.registry.history import Subject
from mlplat.registry.model import (
    Command,
    DeleteAlias,
    DeleteModel,
    DeleteVersion,
    RenameModel,
    RollBackAlias,
    SetAlias,
    SetPolicy,
    SetStage,
    Stage,
)
from mlplat.registry.policy import Candidate, Rule, runs_to_measure, unmet
from mlplat.registry.rows import is_version, version_missing
from mlplat.registry.turn import MetricsNeeded, Turn


async def check_policy(turn: Turn, command: Command) -> None:
    """Refuses a command that the policy of its model does not allow.

    Raises:
        PermissionDenied: the message says what is missing and what to do.
        NotFound: there is no such version.
        MetricsNeeded: gates have to be judged by metrics that ``turn`` does not have yet.
    """
    if turn.policy.is_free:
        return
    match command:
        case SetPolicy() | RenameModel() | DeleteModel():
            _require_manager(turn)
        case SetStage():
            await _check_stage(turn, command)
        case SetAlias(name, alias, version):
            if await current_target(turn, name, alias) != version:
                await _check_move(turn, name, Subject.ALIAS, alias, version)
        case DeleteAlias(name, alias) | RollBackAlias(name, alias):
            _require_keeper(turn, turn.policy.rule(Subject.ALIAS, alias), f"alias {alias} of {name}")
        case DeleteVersion(name, version):
            await _check_deletion(turn, name, version)


async def current_target(turn: Turn, name: str, alias: str) -> int | None:
    """The version that an alias points at."""
    query = select(model_alias.c.version).where(model_alias.c.name == name, model_alias.c.alias == alias)
    found: int | None = (await turn.connection.execute(query)).scalar()
    return found


async def current_stage(turn: Turn, name: str, version: int) -> Stage:
    """The stage that a version is in.

    Raises:
        NotFound: there is no such version.
    """
    found = (await turn.connection.execute(select(model_version.c.stage).where(*is_version(name, version)))).scalar()
    if found is None:
        raise version_missing(name, version)
    return Stage(found)


async def _check_stage(turn: Turn, command: SetStage) -> None:
    name, version, stage = command.name, command.version, command.stage
    before = await current_stage(turn, name, version)
    if before != stage:
        rule = turn.policy.rule(Subject.STAGE, stage)
        if rule.from_stages is not None and before not in rule.from_stages:
            allowed = " or ".join(rule.from_stages) or "no stage"
            raise PermissionDenied(
                f"version {version} of {name} is in stage {before}, and by its policy only versions from {allowed} "
                f"move to {stage}"
            )
        if not turn.approved:
            _require_keeper(turn, turn.policy.rule(Subject.STAGE, before), f"stage {before} of {name}")
        await _check_move(turn, name, Subject.STAGE, stage, version)
    if command.archive_others:
        there = select(model_version.c.version).where(model_version.c.name == name, model_version.c.stage == stage)
        others = await turn.connection.execute(there.where(model_version.c.version != version))
        for other in others.scalars().all():
            await _check_stage(turn, SetStage(name, other, Stage.ARCHIVED))


async def _check_move(turn: Turn, name: str, subject: Subject, target: str, version: int) -> None:
    rule = turn.policy.rule(subject, target)
    candidate = await _candidate(turn, name, version)
    if not turn.approved:
        if rule.approvals:
            command = f"mlplat models request {shlex.quote(name)} {version} --{subject} {target}"
            raise PermissionDenied(
                f"{subject} {target} of {name} needs {rule.approvals} approval(s) by {rule.role}: ask for them with "
                f"`{command}` or POST /api/v1/models/{quote(name, safe='')}/requests"
            )
        _require_keeper(turn, rule, f"{subject} {target} of {name}")
    compared = {}
    for alias in sorted({alias for gate in rule.gates if (alias := gate.compared_alias) is not None}):
        other = await current_target(turn, name, alias)
        if other is not None:
            compared[alias] = await _candidate(turn, name, other)
    missing = runs_to_measure(rule, candidate, compared) - turn.measured.keys()
    if missing:
        raise MetricsNeeded(frozenset(missing))
    problems = unmet(rule, candidate, compared, turn.measured)
    if problems:
        raise PermissionDenied(
            f"version {version} of {name} does not pass what {subject} {target} asks for: {'; '.join(problems)}"
        )


async def _candidate(turn: Turn, name: str, version: int) -> Candidate:
    columns = select(model_version.c.run_id, model_version.c.description, model_version.c.facts)
    row = (await turn.connection.execute(columns.where(*is_version(name, version)))).first()
    if row is None:
        raise version_missing(name, version)
    data = row.facts.get("data")
    run_id = row.run_id or row.facts.get("run_id")
    return Candidate(version, run_id, None if data is None else tuple(data), row.description)


async def _check_deletion(turn: Turn, name: str, version: int) -> None:
    stage = await current_stage(turn, name, version)
    held = [(Subject.STAGE, stage.value)]
    pointing = select(model_alias.c.alias).where(model_alias.c.name == name, model_alias.c.version == version)
    held += [(Subject.ALIAS, alias) for alias in (await turn.connection.execute(pointing)).scalars()]
    for subject, target in held:
        if turn.policy.rule(subject, target).role is not None:
            raise PermissionDenied(
                f"version {version} of {name} cannot be deleted while it has the protected {subject} {target}"
            )


def _require_manager(turn: Turn) -> None:
    role = turn.policy.managed_by
    if role is not None and not turn.policy.has_role(turn.origin.user_id, role):
        raise PermissionDenied(f"{_user(turn)} is not of the role {role}, which manages this model")


def _require_keeper(turn: Turn, rule: Rule, what: str) -> None:
    if rule.role is not None and not turn.policy.has_role(turn.origin.user_id, rule.role):
        raise PermissionDenied(f"{what} is protected: {_user(turn)} is not of the role {rule.role}")


def _user(turn: Turn) -> str:
    return turn.origin.user_id or "who does not say their name"
