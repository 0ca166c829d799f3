"""Whose the files at a path are, as far as only the database knows, and which legal holds are on them.

Artifacts stay where they were first. Those of a run that was moved lie with its old experiment, and those of an
experiment with a location of its own lie anywhere.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Text, and_, cast, func, literal, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.artifacts.model import PROXY_SCHEME
from mlplat.db.tables import experiment, legal_hold, logged_model, run
from mlplat.storage.model import HoldKind, Owner, Subject

#: What has artifacts: its id, its run, its experiment, and where they are.
_RUNS = (run.c.run_id, run.c.run_id, run.c.experiment_id, run.c.artifact_uri)
_MODELS = (
    logged_model.c.model_id, logged_model.c.source_run_id, logged_model.c.experiment_id,
    logged_model.c.artifact_location,
)  # fmt: skip
_EXPERIMENTS = (
    experiment.c.experiment_id, literal(None, Text), experiment.c.experiment_id, experiment.c.artifact_location
)  # fmt: skip


async def owners_of(connection: AsyncConnection, path: str) -> list[Owner]:
    """The runs and experiments that have the files at a path, as things are now."""
    found = list[Owner]()
    for id_, run_id, experiment_id, uri in (_RUNS, _MODELS):
        query = select(run_id, experiment_id).where(id_.in_(path.split("/")), _is_at_or_below(path, _root(uri)))
        found += [Owner(str(row[1]), row[0]) for row in await connection.execute(query)]
    return found


async def held_below(connection: AsyncConnection, folder: str) -> Subject | None:
    """Something under a legal hold of which files may lie in a folder."""
    for _id, run_id, experiment_id, uri in (_RUNS, _MODELS, _EXPERIMENTS):
        is_held = or_(
            and_(legal_hold.c.kind == HoldKind.RUN, legal_hold.c.id == run_id),
            and_(legal_hold.c.kind == HoldKind.EXPERIMENT, legal_hold.c.id == cast(experiment_id, Text)),
        )
        query = select(legal_hold.c.kind, legal_hold.c.id).where(is_held, func.starts_with(_root(uri), f"{folder}/"))
        row = (await connection.execute(query.limit(1))).one_or_none()
        if row is not None:
            return Subject(HoldKind(row.kind), row.id)
    return None


def _root(uri: ColumnElement[str]) -> ColumnElement[str]:
    """The path in the artifact store of a URI that the platform serves."""
    return func.rtrim(func.regexp_replace(uri, f"^{PROXY_SCHEME}:/*", ""), "/")


def _is_at_or_below(path: str, root: ColumnElement[str]) -> ColumnElement[bool]:
    return func.starts_with(f"{path}/", root + "/")
