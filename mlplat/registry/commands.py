"""What each registry command does to the tables, inside the coordinator's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlplat.registry.aliases import change_alias
from mlplat.registry.guard import check_policy
from mlplat.registry.history import Change, Subject
from mlplat.registry.model import (
    Command,
    CreateVersion,
    Decide,
    DeleteAlias,
    DeleteModel,
    DeleteVersion,
    ReportTampering,
    RequestMove,
    RollBackAlias,
    SetAlias,
    SetStage,
    SetVersionTag,
    Stage,
    UpdateVersion,
    WithdrawMove,
)
from mlplat.registry.moves import Approved, cancel_moves, decide, request_move, withdraw
from mlplat.registry.registered_models import apply_to_model
from mlplat.registry.rows import require_version
from mlplat.registry.stages import set_stage
from mlplat.registry.turn import Turn
from mlplat.registry.versions import create_version, delete_version, set_version_tag, update_version


@dataclass(frozen=True)
class Applied:
    """What a command did: the answer for its caller, and what the history remembers of it.

    ``then`` is the move that a command has approved, which is to be made in the same transaction.
    """

    changes: Sequence[Change] = ()
    answer: dict[str, Any] | None = None
    then: Approved | None = None


async def apply(turn: Turn, command: Command) -> Applied:
    """Applies a command.

    Its answer is ``{"version": n, "semantic_version": "x.y.z"}`` for a new version, ``{"version": n, "was": m}`` for an
    alias that was rolled back, for requests and decisions that of ``moves``, else none.

    Raises:
        NotFound, AlreadyExists, InvalidInput, Conflict: the command does not fit the registry's state.
        PermissionDenied: the model's policy does not allow it.
        MetricsNeeded: see ``guard.check_policy``.
    """
    await check_policy(turn, command)
    match command:
        case CreateVersion() | UpdateVersion() | DeleteVersion() | SetVersionTag() | ReportTampering():
            return await _apply_to_version(turn, command)
        case RequestMove() | Decide() | WithdrawMove():
            return await _apply_to_request(turn, command)
        case SetAlias() | DeleteAlias() | RollBackAlias():
            return Applied(*await change_alias(turn.connection, command))
        case SetStage():
            return Applied(await set_stage(turn.connection, command))
        case _:
            if isinstance(command, DeleteModel):
                await cancel_moves(turn)
            return Applied(await apply_to_model(turn.connection, command))


async def _apply_to_request(turn: Turn, command: RequestMove | Decide | WithdrawMove) -> Applied:
    match command:
        case RequestMove():
            return Applied((), await request_move(turn, command))
        case Decide():
            return Applied((), *await decide(turn, command))
        case WithdrawMove():
            await withdraw(turn, command)
            return Applied()


async def _apply_to_version(
    turn: Turn, command: CreateVersion | UpdateVersion | DeleteVersion | SetVersionTag | ReportTampering
) -> Applied:
    match command:
        case CreateVersion():
            answer = await create_version(turn.connection, command)
            return Applied([Change(Subject.STAGE, str(answer["version"]), None, Stage.NONE)], answer)
        case UpdateVersion(name, version, description):
            await update_version(turn.connection, name, version, description)
        case DeleteVersion(name, version):
            await cancel_moves(turn, version)
            return Applied(await delete_version(turn.connection, name, version))
        case SetVersionTag():
            await set_version_tag(turn.connection, command)
        case ReportTampering(name, version):
            await require_version(turn.connection, name, version)
    return Applied()
