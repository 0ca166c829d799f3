"""What a command knows while it is applied: the transaction, who asks, and the model with its policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import registered_model
from mlplat.registry.model import Origin
from mlplat.registry.policy import NO_POLICY, Measured, Policy, policy_from_json

_MODEL = select(registered_model.c.model_id, registered_model.c.policy).where(
    registered_model.c.name == bindparam("name")
)


@dataclass(frozen=True)
class Turn:
    """One command's turn.

    Args:
        model_id: what stays the same when the model is renamed, and is never used again; None: there is no such model.
        measured: the metrics of runs that gates look at, as far as they were read.
        approved: the command is a move that has the approvals that it needs.
    """

    connection: AsyncConnection
    origin: Origin
    model_id: int | None = None
    policy: Policy = NO_POLICY
    measured: Measured = field(default_factory=dict[str, Mapping[str, float]])
    approved: bool = False


class MetricsNeeded(Exception):
    """The command cannot be judged before the last metrics of these runs are read; nothing was changed."""

    def __init__(self, run_ids: frozenset[str]) -> None:
        super().__init__(f"metrics of {len(run_ids)} runs are needed")
        self.run_ids = run_ids


async def open_turn(connection: AsyncConnection, name: str, origin: Origin, measured: Measured) -> Turn:
    """The turn of a command on the model that has the name now."""
    row = (await connection.execute(_MODEL, {"name": name})).first()
    if row is None:
        return Turn(connection, origin, measured=measured)
    policy = NO_POLICY if row.policy is None else policy_from_json(row.policy)
    return Turn(connection, origin, row.model_id, policy, measured)
