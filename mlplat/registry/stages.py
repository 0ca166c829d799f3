"""Stages of versions."""

from __future__ import annotations

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import model_version
from mlplat.errors import InvalidInput
from mlplat.registry.history import Change, Subject
from mlplat.registry.model import ACTIVE_STAGES, SetStage, Stage
from mlplat.registry.rows import change_model, is_version, version_missing


async def set_stage(connection: AsyncConnection, command: SetStage) -> list[Change]:
    """See ``SetStage``.

    Raises:
        InvalidInput: others can only be archived from a stage in which versions are in use (MLflow's rule).
    """
    name, version, stage = command.name, command.version, command.stage
    if command.archive_others and stage not in ACTIVE_STAGES:
        raise InvalidInput(
            f"Model version transition cannot archive existing model versions because '{stage}' is not an Active "
            f"stage. Valid stages are {', '.join(sorted(ACTIVE_STAGES))}."
        )
    before = (await connection.execute(select(model_version.c.stage).where(*is_version(name, version)))).scalar()
    if before is None:
        raise version_missing(name, version)
    now = func.clock_timestamp()
    moved = update(model_version).where(*is_version(name, version)).values(stage=stage, updated_at=now)
    await connection.execute(moved)
    await change_model(connection, name)
    changes = [] if before == stage else [Change(Subject.STAGE, str(version), before, stage)]
    if command.archive_others:
        changes += await _archive_others(connection, command)
    return changes


async def _archive_others(connection: AsyncConnection, command: SetStage) -> list[Change]:
    others = update(model_version).where(
        model_version.c.name == command.name,
        model_version.c.stage == command.stage,
        model_version.c.version != command.version,
    )
    archived = others.values(stage=Stage.ARCHIVED, updated_at=func.clock_timestamp()).returning(model_version.c.version)
    versions = sorted((await connection.execute(archived)).scalars())
    return [Change(Subject.STAGE, str(version), command.stage, Stage.ARCHIVED) for version in versions]
