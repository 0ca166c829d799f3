"""/api/v1/models/{name}/policy, requests and refusals: moves in the registry that need approvals."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from mlplat.errors import InvalidInput
from mlplat.http.routes.models import MAX_CHANGES, ChangeRequest, IdempotencyKey, Name, VersionNumber, execute
from mlplat.http.services import Services
from mlplat.registry.history import Subject
from mlplat.registry.model import MAX_ALIAS_LENGTH, Decide, RequestMove, SetPolicy, Stage, WithdrawMove
from mlplat.registry.move_store import Move, Refusal
from mlplat.registry.moves import MoveState
from mlplat.registry.policy import Policy, policy_to_json

MAX_REQUESTS = 1_000
MoveNumber = Annotated[int, Field(ge=1, lt=2**63)]
Limit = Annotated[int, Query(ge=1, le=MAX_CHANGES)]
State = Annotated[MoveState | None, Query(description="Only those in this state.")]


class PolicyRequest(ChangeRequest):
    """A new policy, which replaces the one before; `{}` leaves everything free."""

    policy: Policy


class NewMoveRequest(ChangeRequest):
    """Where a version should go: to a stage, or an alias to it."""

    version: VersionNumber
    stage: Stage | None = None
    alias: Annotated[str, Field(min_length=1, max_length=MAX_ALIAS_LENGTH)] | None = None
    archive_others: bool = Field(default=False, description="Versions that are in the stage then go to Archived.")

    def command(self, name: str) -> RequestMove:
        """For the registry.

        Raises:
            InvalidInput: neither or both of stage and alias are given.
        """
        if self.stage is not None and self.alias is None:
            return RequestMove(name, Subject.STAGE, self.stage, self.version, self.archive_others)
        if self.alias is not None and self.stage is None:
            return RequestMove(name, Subject.ALIAS, self.alias, self.version, self.archive_others)
        raise InvalidInput("give stage or alias")


class DecisionAnswer(BaseModel):
    """Somebody's word on a request."""

    by: str
    approve: bool
    reason: str
    at: datetime


class MoveAnswer(BaseModel):
    """A request. `before` is what was there when it was asked for: a stage, or the alias' version, if it had one.

    `needed` are the approvals that its policy asks for, 0 when it is closed; `role` gives them.
    """

    id: int
    model: str
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
    decisions: list[DecisionAnswer]

    @classmethod
    def of(cls, move: Move) -> MoveAnswer:
        """As the API tells it."""
        fields = {name: getattr(move, name) for name in cls.model_fields.keys() - {"id", "model", "decisions"}}
        decisions = [
            DecisionAnswer(by=item.by, approve=item.approve, reason=item.reason, at=item.at) for item in move.decisions
        ]
        return cls(id=move.move_id, model=move.name, decisions=decisions, **fields)


class RefusalAnswer(BaseModel):
    """A request that changed nothing: what was asked for, and why it could not be."""

    refusal_id: int
    at: datetime
    by: str
    reason: str
    code: str
    message: str
    commands: list[dict[str, Any]]
    request_id: str

    @classmethod
    def of(cls, refusal: Refusal) -> RefusalAnswer:
        """As the API tells it."""
        return cls(**{name: getattr(refusal, name) for name in cls.model_fields})


def router(services: Services) -> APIRouter:
    """Policies, requests and refusals of registered models; and the requests of all."""
    api = APIRouter(prefix="/api/v1", tags=["approvals"])

    async def answer(command: Decide | WithdrawMove, request: ChangeRequest, key: str | None) -> MoveAnswer:
        await execute(services, key, [command], request.origin)
        return MoveAnswer.of(await services.moves.get_move(command.name, command.move_id))

    @api.get("/models/{name}/policy", response_model_exclude_defaults=True)
    async def policy(name: Name) -> Policy:
        """Who may move the model's versions where, and what they have to be for it."""
        return await services.moves.get_policy(name)

    @api.put("/models/{name}/policy", response_model_exclude_defaults=True)
    async def set_policy(name: Name, request: PolicyRequest, idempotency_key: IdempotencyKey = None) -> Policy:
        """Replaces the policy."""
        command = SetPolicy(name, policy_to_json(request.policy))
        await execute(services, idempotency_key, [command], request.origin)
        return await services.moves.get_policy(name)

    @api.post("/models/{name}/requests")
    async def request_move(name: Name, request: NewMoveRequest, idempotency_key: IdempotencyKey = None) -> MoveAnswer:
        """Asks for the approvals that a move needs. The last one makes the move."""
        [made] = await execute(services, idempotency_key, [request.command(name)], request.origin)
        return MoveAnswer.of(await services.moves.get_move(name, made["move_id"]))

    @api.get("/models/{name}/requests")
    async def requests(
        name: Name,
        state: State = None,
        limit: Limit = 100,
        before: Annotated[int | None, Query(description="The last `id` of the page before.")] = None,
    ) -> list[MoveAnswer]:
        """Requests of a model, newest first."""
        found = await services.moves.search_moves(name, state, limit, before)
        if not found:
            await services.registry.get_model(name)
        return [MoveAnswer.of(move) for move in found]

    @api.get("/models/{name}/requests/{number}")
    async def request_(name: Name, number: MoveNumber) -> MoveAnswer:
        """One request, with what was decided."""
        return MoveAnswer.of(await services.moves.get_move(name, number))

    @api.post("/models/{name}/requests/{number}/approve")
    async def approve(
        name: Name, number: MoveNumber, request: ChangeRequest, idempotency_key: IdempotencyKey = None
    ) -> MoveAnswer:
        """Approves a request of somebody else."""
        return await answer(Decide(name, number, True), request, idempotency_key)

    @api.post("/models/{name}/requests/{number}/reject")
    async def reject(
        name: Name, number: MoveNumber, request: ChangeRequest, idempotency_key: IdempotencyKey = None
    ) -> MoveAnswer:
        """Rejects a request, with a reason: one word against it ends it."""
        return await answer(Decide(name, number, False), request, idempotency_key)

    @api.post("/models/{name}/requests/{number}/withdraw")
    async def withdraw(
        name: Name, number: MoveNumber, request: ChangeRequest, idempotency_key: IdempotencyKey = None
    ) -> MoveAnswer:
        """Takes one's own request back."""
        return await answer(WithdrawMove(name, number), request, idempotency_key)

    @api.get("/models/{name}/refusals")
    async def refusals(
        name: Name,
        limit: Limit = 100,
        before: Annotated[int | None, Query(description="The last `refusal_id` of the page before.")] = None,
    ) -> list[RefusalAnswer]:
        """Changes that were asked for and refused, newest first; also under a name that no model has."""
        return [RefusalAnswer.of(item) for item in await services.moves.refusals(name, limit, before)]

    @api.get("/approvals")
    async def inbox(
        state: State = MoveState.OPEN,
        limit: Limit = 100,
        before: Annotated[int | None, Query(description="The last `id` of the page before.")] = None,
        decider: Annotated[
            str | None, Query(max_length=200, description="Only open ones that wait for this user's word.")
        ] = None,
    ) -> list[MoveAnswer]:
        """Requests of all models, newest first."""
        found = await services.moves.search_moves(None, state, limit, before, decider)
        return [MoveAnswer.of(move) for move in found]

    return api
