"""Moves that need approvals: asked for, decided, taken back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Row, func, insert, select, update

from mlplat.db.tables import move_decision, move_request
from mlplat.errors import AlreadyExists, Conflict, InvalidInput, NotFound, Overloaded, PermissionDenied
from mlplat.registry.guard import check_policy, current_stage, current_target
from mlplat.registry.history import Subject
from mlplat.registry.model import (
    Decide,
    Origin,
    RequestMove,
    SetAlias,
    SetStage,
    Stage,
    WithdrawMove,
    check_alias,
    parse_stage,
)
from mlplat.registry.rows import model_missing
from mlplat.registry.turn import Turn

#: Of one model.
MAX_OPEN = 1_000


class MoveState(StrEnum):
    """Of a request. EXPIRED is one that was open for too long; CANCELLED: the model or the version was deleted."""

    OPEN = "OPEN"
    APPROVED = "APPROVED"
    REJECTED = "REJECTED"
    WITHDRAWN = "WITHDRAWN"
    EXPIRED = "EXPIRED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class Approved:
    """The move that has its approvals, and whose it is."""

    command: SetAlias | SetStage
    origin: Origin


async def request_move(turn: Turn, command: RequestMove) -> dict[str, Any]:
    """See ``RequestMove``; the answer has ``move_id``.

    Raises:
        InvalidInput: the move needs no approvals, or changes nothing.
        PermissionDenied: nobody says who asks, or the version does not pass what the rule asks for.
        AlreadyExists: the same is asked for already.
        Overloaded: too many requests are open.
    """
    model_id, requester = _model_id(turn, command.name), turn.origin.user_id
    if command.archive_others and command.subject is not Subject.STAGE:
        raise InvalidInput("archive_others goes with a stage")
    target = _target(command)
    before = await _now(turn, command.name, command.subject, target, command.version)
    if before == (str(command.version) if command.subject is Subject.ALIAS else target) and not command.archive_others:
        raise InvalidInput(f"version {command.version} of {command.name} has {command.subject} {target} already")
    rule = turn.policy.rule(command.subject, target)
    what = f"{command.subject} {target} of {command.name}"
    if not rule.approvals or rule.role is None:
        raise InvalidInput(f"{what} needs no approvals: move it directly")
    if not requester:
        raise PermissionDenied("say who you are: a request has somebody who asks")
    others = {member for member in turn.policy.roles[rule.role] if not _same(member, requester)}
    if len(others) < rule.approvals:
        raise PermissionDenied(f"{what} needs {rule.approvals} approvals, and {rule.role} has {len(others)} others")
    move = _move(command.name, command.subject, target, command.version, before, command.archive_others)
    await check_policy(replace(turn, approved=True), move)
    await _require_room(turn, model_id, command, target)
    added = insert(move_request).values(
        model_id=model_id, version=command.version, subject=command.subject, target=target, before=before,
        archive_others=command.archive_others, user_id=requester, reason=turn.origin.reason,
        expires_at=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, rule.expires_h * 3_600),
    )  # fmt: skip
    return {"move_id": (await turn.connection.execute(added.returning(move_request.c.move_id))).scalar_one()}


async def decide(turn: Turn, command: Decide) -> tuple[dict[str, Any], Approved | None]:
    """See ``Decide``; the answer has ``state``, the approvals that are ``given`` and those ``needed``.

    Raises:
        NotFound: the model has no such request.
        Conflict: it is closed, expired or decided by the same person, or what it asks for has changed since.
        PermissionDenied: who asked for it, and who is not of the role, cannot decide; or the version does not pass
            what the rule asks for any more.
        InvalidInput: it is rejected without a reason.
    """
    row = await _open_request(turn, command.name, command.move_id)
    user, rule = turn.origin.user_id, turn.policy.rule(Subject(row.subject), row.target)
    if not rule.approvals or rule.role is None:
        raise Conflict(f"{row.subject} {row.target} needs no approvals any more: move it directly")
    if _same(user, row.user_id):
        raise PermissionDenied(f"request {row.move_id} is {row.user_id}'s own: others have to decide about it")
    if not turn.policy.has_role(user, rule.role):
        raise PermissionDenied(f"{user or 'who does not say their name'} is not of the role {rule.role}")
    if not command.approve and not turn.origin.reason.strip():
        raise InvalidInput("reason: say why it is rejected")
    made = select(move_decision.c.user_id).where(move_decision.c.move_id == row.move_id)
    approvers = list((await turn.connection.execute(made.order_by(move_decision.c.created_at))).scalars())
    if user in approvers:
        raise Conflict(f"{user} has approved request {row.move_id} already")
    added = insert(move_decision).values(
        move_id=row.move_id, user_id=user, approve=command.approve, reason=turn.origin.reason
    )
    await turn.connection.execute(added)
    given = [name for name in [*approvers, user] if turn.policy.has_role(name, rule.role)]
    answer = {"state": MoveState.OPEN.value, "given": len(given) if command.approve else 0, "needed": rule.approvals}
    if not command.approve:
        await _close(turn, row.move_id, MoveState.REJECTED)
        return {**answer, "state": MoveState.REJECTED.value}, None
    if len(given) < rule.approvals:
        return answer, None
    approved = await _approved(turn, command.name, row, given)
    await _close(turn, row.move_id, MoveState.APPROVED)
    return {**answer, "state": MoveState.APPROVED.value}, approved


async def withdraw(turn: Turn, command: WithdrawMove) -> None:
    """See ``WithdrawMove``.

    Raises:
        NotFound: the model has no such request.
        Conflict: it is closed or expired.
        PermissionDenied: it is somebody else's.
    """
    row = await _open_request(turn, command.name, command.move_id)
    if not _same(turn.origin.user_id, row.user_id):
        raise PermissionDenied(f"request {row.move_id} is {row.user_id}'s: who asked for it can withdraw it")
    await _close(turn, row.move_id, MoveState.WITHDRAWN)


async def cancel_moves(turn: Turn, version: int | None = None) -> None:
    """Closes the open requests of a version, or of the whole model, that is being deleted; expired ones stay such."""
    opened = update(move_request).where(
        move_request.c.model_id == turn.model_id,
        move_request.c.state == MoveState.OPEN,
        move_request.c.expires_at > func.clock_timestamp(),
    )
    if version is not None:
        opened = opened.where(move_request.c.version == version)
    await turn.connection.execute(opened.values(state=MoveState.CANCELLED, closed_at=func.clock_timestamp()))


def _target(command: RequestMove) -> str:
    """The stage or alias as it is written."""
    match command.subject:
        case Subject.ALIAS:
            check_alias(command.target)
            return command.target
        case Subject.STAGE:
            return parse_stage(command.target)
        case _:
            raise InvalidInput("subject: expected alias or stage")


async def _now(turn: Turn, name: str, subject: Subject, target: str, version: int) -> str:
    """The stage that the version is in, or the version that the alias points at; ``""`` if that is not set."""
    if subject is Subject.STAGE:
        return await current_stage(turn, name, version)
    current = await current_target(turn, name, target)
    return "" if current is None else str(current)


def _move(
    name: str, subject: Subject, target: str, version: int, before: str, archive_others: bool
) -> SetAlias | SetStage:
    if subject is Subject.ALIAS:
        return SetAlias(name, target, version, int(before or 0))
    return SetStage(name, version, Stage(target), archive_others)


async def _approved(turn: Turn, name: str, row: Row[Any], approvers: list[str]) -> Approved:
    """The move as it was asked for, if everything that it was judged by is still so."""
    subject = Subject(row.subject)
    now = await _now(turn, name, subject, row.target, row.version)
    if now != row.before:
        raise Conflict(
            f"{row.subject} {row.target}: was {row.before or 'not set'} when it was asked for, and is "
            f"{now or 'not set'} now: withdraw request {row.move_id} and ask again"
        )
    move = _move(name, subject, row.target, row.version, row.before, row.archive_others)
    await check_policy(replace(turn, approved=True), move)
    told = f"request {row.move_id}, approved by {', '.join(approvers)}"
    return Approved(move, Origin(row.user_id, f"{row.reason} ({told})" if row.reason else told))


async def _open_request(turn: Turn, name: str, move_id: int) -> Row[Any]:
    query = select(move_request, (move_request.c.expires_at <= func.clock_timestamp()).label("expired"))
    found = query.where(move_request.c.move_id == move_id, move_request.c.model_id == _model_id(turn, name))
    row: Row[Any] | None = (await turn.connection.execute(found)).first()
    if row is None:
        raise NotFound(f"Registered Model (name={name}) has no request {move_id}")
    if row.state != MoveState.OPEN:
        raise Conflict(f"request {move_id} is {row.state.lower()} already")
    if row.expired:
        expired: datetime = row.expires_at
        raise Conflict(f"request {move_id} expired at {expired.isoformat(timespec='seconds')}: ask again")
    return row


async def _require_room(turn: Turn, model_id: int, command: RequestMove, target: str) -> None:
    opened = select(move_request).where(
        move_request.c.model_id == model_id,
        move_request.c.state == MoveState.OPEN,
        move_request.c.expires_at > func.clock_timestamp(),
    )
    same = opened.where(
        move_request.c.subject == command.subject,
        move_request.c.target == target,
        move_request.c.version == command.version,
    )
    twin = (await turn.connection.execute(same)).first()
    if twin is not None:
        raise AlreadyExists(f"request {twin.move_id} of {twin.user_id} asks for the same")
    count = (await turn.connection.execute(select(func.count()).select_from(opened.subquery()))).scalar_one()
    if count >= MAX_OPEN:
        raise Overloaded(f"{count} requests of {command.name} are open: decide or withdraw some")


async def _close(turn: Turn, move_id: int, state: MoveState) -> None:
    closed = update(move_request).where(move_request.c.move_id == move_id)
    await turn.connection.execute(closed.values(state=state, closed_at=func.clock_timestamp()))


def _model_id(turn: Turn, name: str) -> int:
    if turn.model_id is None:
        raise model_missing(name)
    return turn.model_id


def _same(one: str, other: str) -> bool:
    """Whether two user names are those of one person; nobody approves their own request by another spelling."""
    return one.strip().casefold() == other.strip().casefold()
