"""What was refused: who asked for what, when, and why it could not be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import msgspec
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import registered_model, registry_refusal
from mlplat.errors import PlatformError
from mlplat.registry.model import Command, Origin

#: Of the commands, as JSON; larger ones are noted by their kinds alone.
MAX_COMMANDS_BYTES = 16 * 1024
MAX_MESSAGE_LENGTH = 2_000
MAX_TEXT_LENGTH = 2_000


async def note_refusal(
    connection: AsyncConnection, request_id: str, commands: Sequence[Command], origin: Origin, error: PlatformError
) -> None:
    """Notes a request that changed nothing."""
    name = commands[0].name if commands else ""
    model = select(registered_model.c.model_id).where(registered_model.c.name == name).scalar_subquery()
    told = [{"kind": type(command).__name__, **asdict(command)} for command in commands]
    if len(msgspec.json.encode(told)) > MAX_COMMANDS_BYTES:
        told = [{"kind": command["kind"]} for command in told[:MAX_MESSAGE_LENGTH]]
    await connection.execute(
        insert(registry_refusal).values(
            request_id=request_id, name=_kept(name), model_id=model, commands=told, code=error.code,
            message=_kept(error.message), user_id=_kept(origin.user_id), reason=_kept(origin.reason),
        )
    )  # fmt: skip


def _kept(text: str) -> str:
    return text[:MAX_TEXT_LENGTH]
