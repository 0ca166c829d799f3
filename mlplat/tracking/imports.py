"""Bringing in experiments from elsewhere: hidden until everything has arrived.

An import is named by its origin. It begins with an experiment that counts as deleted, gives every run
an id (its own, if that is free), and ends by showing the experiment. All calls may be repeated, so an
import that broke off goes on where it was; one that is complete changes nothing any more.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Row, exists, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.engine import is_unique_violation
from mlplat.db.tables import experiment, experiment_tag, run, run_import
from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.keys import check_key
from mlplat.tracking.experiments import restore_runs_of
from mlplat.tracking.import_rows import Assigned, ImportedRun, assigned, check_run, insert_ids, put_rows, taken
from mlplat.tracking.model import check_name, cut_tag

MAX_IDS = 10_000
MAX_RUNS = 1_000
MAX_ORIGIN = 500
#: Larger ids are not kept: they would push the counter of all later experiments up with them.
MAX_KEPT_EXPERIMENT_ID = 2**31
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True)
class NewExperiment:
    """What to create for an import. ``experiment_id``: kept when it is free; None: the next one."""

    origin: str
    name: str
    experiment_id: int | None
    created_at: datetime
    updated_at: datetime
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Import:
    """An import's experiment."""

    experiment_id: int
    name: str
    complete: bool


class ImportStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine, artifact_root: str) -> None:
        """``artifact_root``: URI under which imported experiments keep artifacts."""
        self._engine = engine
        self._artifact_root = artifact_root.rstrip("/")

    async def begin(self, new: NewExperiment) -> Import:
        """Creates the hidden experiment of an import, or finds the one that was begun before.

        Raises:
            AlreadyExists: another experiment has the name, maybe a deleted one.
            InvalidInput: a malformed name, tag or origin; or the imported experiment was deleted since.
        """
        check_name("experiment", new.name)
        if not 1 <= len(new.origin) <= MAX_ORIGIN:
            raise InvalidInput(f"An origin has 1 to {MAX_ORIGIN} characters.")
        for key in new.tags:
            check_key("tag", key)
        try:
            async with self._engine.begin() as connection:
                # Nobody draws an id while one is set by hand.
                await connection.execute(text("LOCK TABLE experiment IN SHARE ROW EXCLUSIVE MODE"))
                query = select(experiment).where(experiment.c.import_origin == new.origin)
                found = (await connection.execute(query)).first()
                if found is not None:
                    return _resumed(found)
                return Import(await self._create(connection, new), new.name, False)
        except IntegrityError as error:
            if not is_unique_violation(error):
                raise
            raise AlreadyExists(
                f"Experiment(name={new.name}) already exists, maybe deleted; import under another name."
            ) from error

    async def assign(self, experiment_id: int, source_ids: Sequence[str]) -> list[Assigned]:
        """The ids of the source's runs here, in their order; the same again for the same runs.

        Raises:
            NotFound, InvalidInput: no import under way there, or malformed, repeated or too many ids.
        """
        if len(source_ids) > MAX_IDS or len(set(source_ids)) != len(source_ids):
            raise InvalidInput(f"At most {MAX_IDS} run ids, each once.")
        for source_id in source_ids:
            if not _RUN_ID.match(source_id):
                raise InvalidInput(f"Invalid run id {source_id[:100]!r}: 1 to 64 letters, digits, '_' and '-'.")
        async with self._engine.begin() as connection:
            await _require_importing(connection, experiment_id)
            known = await assigned(connection, experiment_id, source_ids)
            new = [source_id for source_id in source_ids if source_id not in known]
            if new:
                in_use = await taken(connection, new)
                free = [source_id for source_id in new if source_id not in in_use]
                await insert_ids(connection, experiment_id, {source_id: source_id for source_id in free})
                # Another import may have been faster.
                known |= await assigned(connection, experiment_id, free)
                rest = [source_id for source_id in new if source_id not in known]
                await insert_ids(connection, experiment_id, {source_id: uuid.uuid4().hex for source_id in rest})
                known |= await assigned(connection, experiment_id, rest)
        return [known[source_id] for source_id in source_ids]

    async def put_runs(self, experiment_id: int, runs: Sequence[ImportedRun]) -> list[str]:
        """Creates or updates runs under ids that ``assign`` gave out, and returns their artifact URIs.

        Raises:
            NotFound, InvalidInput: no import under way there, an id of somebody else's, malformed parts.
        """
        if len(runs) > MAX_RUNS:
            raise InvalidInput(f"At most {MAX_RUNS} runs in one call.")
        for each in runs:
            check_run(each)
        async with self._engine.begin() as connection:
            location = await _require_importing(connection, experiment_id)
            run_ids = [each.run_id for each in runs]
            query = select(run_import.c.run_id).where(
                run_import.c.experiment_id == experiment_id, run_import.c.run_id.in_(run_ids)
            )
            foreign = set(run_ids) - set((await connection.execute(query)).scalars())
            if foreign:
                raise InvalidInput(f"The run {min(foreign)} is not part of this import.")
            uris = [each.artifact_uri or f"{location}/{each.run_id}/artifacts" for each in runs]
            await put_rows(connection, experiment_id, runs, uris)
        return uris

    async def complete(self, experiment_id: int, run_ids: Sequence[str]) -> None:
        """Notes that all of these runs has arrived; an import that goes on skips them.

        Raises:
            NotFound, InvalidInput: no import under way there, or a run that was never sent.
        """
        async with self._engine.begin() as connection:
            await _require_importing(connection, experiment_id)
            result = await connection.execute(
                update(run_import)
                .where(
                    run_import.c.experiment_id == experiment_id,
                    run_import.c.run_id.in_(run_ids),
                    exists().where(run.c.run_id == run_import.c.run_id, run.c.experiment_id == experiment_id),
                )
                .values(complete=True)
            )
            if result.rowcount != len(set(run_ids)):
                raise InvalidInput(f"{len(set(run_ids)) - result.rowcount} of these runs were not sent yet.")

    async def finish(self, experiment_id: int) -> None:
        """Shows the experiment and its runs.

        Raises:
            NotFound: no such import.
            InvalidInput: some runs have not arrived.
        """
        async with self._engine.begin() as connection:
            row = await _find(connection, experiment_id)
            if not row.importing:
                return
            await _require_importing(connection, experiment_id)
            query = select(func.count()).where(run_import.c.experiment_id == experiment_id, ~run_import.c.complete)
            missing = (await connection.execute(query)).scalar_one()
            if missing:
                raise InvalidInput(f"{missing} runs of this import have not arrived completely.")
            await connection.execute(
                update(experiment)
                .where(experiment.c.experiment_id == experiment_id)
                .values(importing=False, deleted=False, deleted_at=None)
            )
            mine = update(run).where(run.c.experiment_id == experiment_id)
            await connection.execute(mine.values(importing=False))
            await restore_runs_of(connection, experiment_id)

    async def _create(self, connection: AsyncConnection, new: NewExperiment) -> int:
        values = {
            "name": new.name, "artifact_location": "", "deleted": True, "deleted_at": func.clock_timestamp(),
            "importing": True, "import_origin": new.origin, "created_at": new.created_at, "updated_at": new.updated_at,
        }  # fmt: skip
        if await _is_free(connection, new.experiment_id):
            values["experiment_id"] = new.experiment_id
        created = insert(experiment).values(**values).returning(experiment.c.experiment_id)
        experiment_id = int((await connection.execute(created)).scalar_one())
        if "experiment_id" in values:
            counter = func.pg_get_serial_sequence("experiment", "experiment_id")
            highest = select(func.max(experiment.c.experiment_id)).scalar_subquery()
            await connection.execute(select(func.setval(counter, func.greatest(func.nextval(counter), highest))))
        location = f"{self._artifact_root}/{experiment_id}"
        is_it = experiment.c.experiment_id == experiment_id
        await connection.execute(update(experiment).where(is_it).values(artifact_location=location))
        if new.tags:
            rows = [{"experiment_id": experiment_id, "key": k, "value": cut_tag(v)} for k, v in new.tags.items()]
            await connection.execute(insert(experiment_tag), rows)
        return experiment_id


def _resumed(found: Row[tuple[object, ...]]) -> Import:
    if found.purge_started_at is not None:
        raise InvalidInput(f"The experiment {found.name!r} of this import is being purged.")
    if found.deleted and not found.importing:
        raise InvalidInput(
            f"This was imported before, as experiment {found.name!r}, which is deleted; restore it or purge it."
        )
    return Import(found.experiment_id, found.name, not found.importing)


async def _find(connection: AsyncConnection, experiment_id: int) -> Row[tuple[object, ...]]:
    query = select(experiment).where(experiment.c.experiment_id == experiment_id)
    row = (await connection.execute(query.with_for_update())).first()
    if row is None or row.import_origin is None:
        raise NotFound(f"No import with experiment id={experiment_id} exists")
    return row


async def _require_importing(connection: AsyncConnection, experiment_id: int) -> str:
    """The artifact location of the import's experiment, whose row is locked from here on."""
    row = await _find(connection, experiment_id)
    if row.purge_started_at is not None:
        raise InvalidInput(f"The experiment {experiment_id} is being purged.")
    if not row.importing:
        raise InvalidInput(f"The import of experiment {experiment_id} is complete.")
    # Purges leave alone what was touched lately.
    touched = update(experiment).where(experiment.c.experiment_id == experiment_id)
    await connection.execute(touched.values(deleted_at=func.clock_timestamp()))
    return str(row.artifact_location)


async def _is_free(connection: AsyncConnection, experiment_id: int | None) -> bool:
    if experiment_id is None or not 0 < experiment_id < MAX_KEPT_EXPERIMENT_ID:
        return False
    query = select(exists().where(experiment.c.experiment_id == experiment_id))
    return not (await connection.execute(query)).scalar_one()
