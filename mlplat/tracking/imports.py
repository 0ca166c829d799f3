"""Bringing in experiments from elsewhere: hidden until everything has arrived.

An import is named by its origin. It begins with an experiment that counts as deleted, gives every run
an id (its own, if that is free), and ends by showing the experiment. All calls may be repeated, so an
import that broke off goes on where it was; one that is complete changes nothing any more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Row, exists, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.engine import is_unique_violation
from mlplat.db.tables import experiment, experiment_tag, logged_model, model_import, run
from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.keys import check_key
from mlplat.tracking.experiments import restore_runs_of
from mlplat.tracking.import_ids import MODELS, RUNS, Assigned, Kind, assign, assigned, complete, count_missing
from mlplat.tracking.model import check_name, cut_tag

MAX_IDS = 10_000
MAX_ORIGIN = 500
#: Larger ids are not kept: they would push the counter of all later experiments up with them.
MAX_KEPT_EXPERIMENT_ID = 2**31
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


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

    async def assign(self, experiment_id: int, kind: Kind, source_ids: Sequence[str]) -> list[Assigned]:
        """The ids of the source's runs or models here, in their order; the same again for the same ones.

        Raises:
            NotFound, InvalidInput: no import under way there, or malformed, repeated or too many ids.
        """
        check_ids(source_ids)
        async with self._engine.begin() as connection:
            await require_importing(connection, experiment_id)
            return await assign(connection, kind, experiment_id, source_ids)

    async def find(self, origin: str, kind: Kind, source_ids: Sequence[str]) -> list[Assigned]:
        """The ids that runs or models of a source were given; those that it was not asked for are left out.

        Raises:
            NotFound: nothing was imported from there.
            InvalidInput: malformed, repeated or too many ids.
        """
        check_ids(source_ids)
        async with self._engine.connect() as connection:
            query = select(experiment.c.experiment_id).where(experiment.c.import_origin == origin)
            experiment_id = (await connection.execute(query)).scalar()
            if experiment_id is None:
                raise NotFound(f"Nothing was imported from {origin[:MAX_ORIGIN]!r}")
            found = await assigned(connection, kind, experiment_id, source_ids)
        return [found[source_id] for source_id in source_ids if source_id in found]

    async def complete(self, experiment_id: int, kind: Kind, ids: Sequence[str]) -> None:
        """Notes that all of these runs or models has arrived; an import that goes on skips them.

        Raises:
            NotFound, InvalidInput: no import under way there, or one that was never sent.
        """
        async with self._engine.begin() as connection:
            await require_importing(connection, experiment_id)
            missing = await complete(connection, kind, experiment_id, ids)
            if missing:
                raise InvalidInput(f"{missing} of these {kind.noun}s were not sent yet.")

    async def finish(self, experiment_id: int) -> None:
        """Shows the experiment with its runs and models.

        Raises:
            NotFound: no such import.
            InvalidInput: some of them have not arrived.
        """
        async with self._engine.begin() as connection:
            row = await _find(connection, experiment_id)
            if not row.importing:
                return
            await require_importing(connection, experiment_id)
            for kind in (RUNS, MODELS):
                missing = await count_missing(connection, kind, experiment_id)
                if missing:
                    raise InvalidInput(f"{missing} {kind.noun}s of this import have not arrived completely.")
            await connection.execute(
                update(experiment)
                .where(experiment.c.experiment_id == experiment_id)
                .values(importing=False, deleted=False, deleted_at=None)
            )
            mine = update(run).where(run.c.experiment_id == experiment_id)
            await connection.execute(mine.values(importing=False))
            await restore_runs_of(connection, experiment_id)
            shown = select(model_import.c.model_id).where(
                model_import.c.experiment_id == experiment_id, ~model_import.c.deleted
            )
            models = update(logged_model).where(logged_model.c.model_id.in_(shown))
            await connection.execute(models.values(deleted=False))

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


def check_ids(source_ids: Sequence[str]) -> None:
    """Checks ids that come from outside.

    Raises:
        InvalidInput: malformed, repeated or too many.
    """
    if len(source_ids) > MAX_IDS or len(set(source_ids)) != len(source_ids):
        raise InvalidInput(f"At most {MAX_IDS} ids, each once.")
    for source_id in source_ids:
        if not _ID.match(source_id):
            raise InvalidInput(f"Invalid id {source_id[:100]!r}: 1 to 64 letters, digits, '_' and '-'.")


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


async def require_importing(connection: AsyncConnection, experiment_id: int) -> str:
    """The artifact location of the import's experiment, whose row is locked from here on.

    Raises:
        NotFound, InvalidInput: no import is under way there.
    """
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
