"""Reads of policies, of moves that need approvals, and of refusals, straight from the Postgres primary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, case, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import move_decision, move_request, registered_model, registry_refusal
from mlplat.errors import NotFound
from mlplat.registry.history import Subject
from mlplat.registry.moves import MoveState
from mlplat.registry.policy import NO_POLICY, Policy, policy_from_json
from mlplat.registry.rows import model_missing


@dataclass(frozen=True)
class Decision:
    """Somebody's word on a request."""

    by: str
    approve: bool
    reason: str
    at: datetime


@dataclass(frozen=True)
class Move:
    """A request; ``name`` is the model's own of now.

    Args:
        before: the version's stage, or the version that the alias pointed at, when it was asked for; empty: none.
        needed: approvals, by the policy as it is now; 0 when it is closed.
        role: who gives them.
    """

    move_id: int
    name: str
    version: int
    subject: Subject
    target: str
    before: str
    archive_others: bool
    state: MoveState
    by: str
    reason: str
    created_at: datetime
    expires_at: datetime
    closed_at: datetime | None
    needed: int
    role: str | None
    decisions: Sequence[Decision]


@dataclass(frozen=True)
class Refusal:
    """A request that changed nothing."""

    refusal_id: int
    at: datetime
    by: str
    reason: str
    code: str
    message: str
    commands: Sequence[dict[str, Any]]
    request_id: str


class MoveStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def get_policy(self, name: str) -> Policy:
        """The policy of a model; the empty one if nobody set any.

        Raises:
            NotFound: there is no such model.
        """
        query = select(registered_model.c.policy).where(registered_model.c.name == name)
        async with self._engine.connect() as connection:
            row = (await connection.execute(query)).first()
        if row is None:
            raise model_missing(name)
        return NO_POLICY if row.policy is None else policy_from_json(row.policy)

    async def get_move(self, name: str, move_id: int) -> Move:
        """A request of a model.

        Raises:
            NotFound: the model has none with that number.
        """
        query = _MOVES.where(registered_model.c.name == name, move_request.c.move_id == move_id)
        async with self._engine.connect() as connection:
            found = await _load(connection, query)
        if not found:
            raise NotFound(f"Registered Model (name={name}) has no request {move_id}")
        return found[0]

    async def search_moves(
        self, name: str | None, state: MoveState | None, limit: int, before: int | None = None,
        decider: str | None = None,
    ) -> list[Move]:  # fmt: skip
        """Requests of a model, or of all that there are, newest first.

        Args:
            before: only those with a lower number.
            decider: only open ones that wait for this user's word.
        """
        query = _MOVES.order_by(move_request.c.move_id.desc()).limit(limit)
        if name is not None:
            query = query.where(registered_model.c.name == name)
        if state is not None:
            query = query.where(_state_now() == state.value)
        if before is not None:
            query = query.where(move_request.c.move_id < before)
        if decider is not None:
            query = query.where(_state_now() == MoveState.OPEN.value, *_waits_for(decider))
        async with self._engine.connect() as connection:
            return await _load(connection, query)

    async def refusals(self, name: str, limit: int, before: int | None = None) -> list[Refusal]:
        """What was refused under the name, or of the model that has it now, newest first."""
        model = select(registered_model.c.model_id).where(registered_model.c.name == name).scalar_subquery()
        query = select(registry_refusal).where(
            or_(registry_refusal.c.model_id == model, registry_refusal.c.name == name)
        )
        if before is not None:
            query = query.where(registry_refusal.c.refusal_id < before)
        async with self._engine.connect() as connection:
            rows = await connection.execute(query.order_by(registry_refusal.c.refusal_id.desc()).limit(limit))
            return [
                Refusal(
                    row.refusal_id, row.created_at, row.user_id, row.reason, row.code, row.message, row.commands,
                    row.request_id,
                )
                for row in rows
            ]  # fmt: skip


def _state_now() -> ColumnElement[str]:
    expired = and_(move_request.c.state == MoveState.OPEN, move_request.c.expires_at <= func.clock_timestamp())
    return case((expired, MoveState.EXPIRED.value), else_=move_request.c.state)


_MOVES = select(move_request, _state_now().label("state_now"), registered_model.c.name, registered_model.c.policy).join(
    registered_model, registered_model.c.model_id == move_request.c.model_id
)


def _waits_for(user: str) -> tuple[ColumnElement[bool], ...]:
    """By the policy as it is now: the user has the role, did not ask for the move, and has not decided yet."""
    policy = registered_model.c.policy
    rules = case((move_request.c.subject == Subject.STAGE, policy["stages"]), else_=policy["aliases"])
    role = rules.op("->")(move_request.c.target).op("->>")("role")
    decided = select(move_decision.c.move_id).where(move_decision.c.user_id == user)
    return (
        policy["roles"].op("->")(role).op("?", is_comparison=True)(user),
        func.lower(move_request.c.user_id) != user.lower(),
        move_request.c.move_id.not_in(decided),
    )


async def _load(connection: AsyncConnection, query: Select[Any]) -> list[Move]:
    rows = (await connection.execute(query)).all()
    decided = select(move_decision).where(move_decision.c.move_id.in_([row.move_id for row in rows]))
    decisions: dict[int, list[Decision]] = {}
    for row in await connection.execute(decided.order_by(move_decision.c.created_at)):
        told = Decision(row.user_id, row.approve, row.reason, row.created_at)
        decisions.setdefault(row.move_id, []).append(told)
    return [_move(row, decisions.get(row.move_id, [])) for row in rows]


def _move(row: Row[Any], decisions: Sequence[Decision]) -> Move:
    subject, state = Subject(row.subject), MoveState(row.state_now)
    policy = NO_POLICY if row.policy is None else policy_from_json(row.policy)
    rule = policy.rule(subject, row.target)
    return Move(
        row.move_id, row.name, row.version, subject, row.target, row.before, row.archive_others, state, row.user_id,
        row.reason, row.created_at, row.expires_at, row.closed_at,
        rule.approvals if state is MoveState.OPEN else 0, rule.role, decisions,
    )  # fmt: skip
