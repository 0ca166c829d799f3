"""Runs, params and tags in Postgres.

Contract: params are written once (the same value again is fine). A run's name and its
``mlflow.runName`` tag are one fact in two places and move together. Deleted runs stay readable by id
and refuse writes. One call is one transaction: all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Table,
    Text,
    cast,
    column,
    delete,
    func,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.engine import SEARCH_SETTINGS
from mlplat.db.tables import run, run_param, run_tag
from mlplat.errors import InvalidInput, NotFound, Unavailable
from mlplat.keys import check_key
from mlplat.metrics.curves import RunOrigin
from mlplat.tracking.experiments import require_active_experiment
from mlplat.tracking.filters import is_short
from mlplat.tracking.inputs import NO_LINKS, RunLinks
from mlplat.tracking.model import (
    ATTEMPT_TAG,
    MODEL_HISTORY_TAG,
    REAPED_TAG,
    RUN_NAME_TAG,
    Run,
    RunStatus,
    RunUpdate,
    append_model,
    cut_tag,
    random_run_name,
    to_ms,
)
from mlplat.tracking.run_links import HAS_LINKS, load_links


@dataclass(frozen=True)
class RunRef:
    """What a write needs to know of its run."""

    run_id: str
    experiment_id: int


class RunStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def create(
        self,
        run_id: str,
        experiment_id: int,
        name: str | None,
        user_id: str,
        started_at: datetime,
        tags: Mapping[str, str],
        *,
        beating: bool = False,
    ) -> Run:
        """A new running run; creating it again under the same id gives the run that is there.

        A ``beating`` run counts as dead when its heartbeats stop, see ``HeartbeatStore``.

        Raises:
            NotFound: no such experiment.
            InvalidInput: it is deleted, a tag is malformed, or name and name tag differ.
            Unavailable: the experiment was restored at this moment.
        """
        for key in tags:
            check_key("tag", key)
        tagged = tags.get(RUN_NAME_TAG)
        if name and tagged and name != tagged:
            raise InvalidInput(
                f"Both 'run_name' argument and 'mlflow.runName' tag are specified, but with different values "
                f"(run_name='{name}', mlflow.runName='{tagged}')."
            )
        name = name or tagged or random_run_name()
        tags = dict(tags) | {RUN_NAME_TAG: name}
        values = {
            "run_id": run_id, "experiment_id": experiment_id, "name": name, "status": RunStatus.RUNNING.value,
            "user_id": user_id, "started_at": started_at, "beating": beating,
            "keys": list(tags), "values": [cut_tag(value) for value in tags.values()],
        }  # fmt: skip
        async with self._engine.begin() as connection:
            row = (await connection.execute(_CREATE, values)).first()
            if row is None:
                await require_active_experiment(connection, experiment_id)  # says what is wrong with it
            if row is None or row.run_id is None:
                known = await load_runs(connection, [run_id])
                if not known:
                    raise Unavailable(f"experiment {experiment_id} was being restored; retry")
                return known[0]
        return Run(run_id, experiment_id, name, RunStatus.RUNNING, user_id, row.artifact_uri, False, started_at, None,
                   {}, tags)  # fmt: skip

    async def get(self, run_id: str) -> Run:
        """The run, deleted or not."""
        async with self._engine.connect() as connection:
            found = await load_runs(connection, [run_id])
        if not found:
            raise NotFound(f"Run with id={run_id} not found")
        return found[0]

    async def get_many(self, run_ids: Sequence[str]) -> list[Run]:
        """The runs, deleted or not, in the order of ``run_ids``.

        Raises:
            NotFound: there is no run with one of the ids; the message names the first.
        """
        async with self._engine.connect() as connection:
            found = await load_runs(connection, run_ids)
        _require_all(run_ids, {run.run_id for run in found})
        return found

    async def origins(self, run_ids: Sequence[str]) -> list[RunOrigin]:
        """What reading metrics needs to know of the runs, in the order of ``run_ids``; one statement.

        Raises:
            NotFound: there is no run with one of the ids; the message names the first.
        """
        query = select(run.c.run_id, run.c.started_at).where(run.c.run_id.in_(run_ids))
        async with self._engine.connect() as connection:
            rows = {row.run_id: row for row in await connection.execute(query)}
        _require_all(run_ids, rows.keys())
        return [RunOrigin(run_id, to_ms(rows[run_id].started_at)) for run_id in run_ids]

    async def update(
        self,
        run_id: str,
        status: RunStatus | None,
        ended_at: datetime | None,
        name: str | None,
        *,
        resumed_at: datetime | None = None,
    ) -> Run:
        """Changes what is not None. A run that runs again has no end.

        With ``resumed_at``, a run that has ended since then stays as it is: the news came late.
        """
        values: dict[str, object] = {}
        if status is not None:
            values["status"] = status
        if status is RunStatus.RUNNING:
            values["ended_at"] = None
        if ended_at is not None:
            values["ended_at"] = ended_at
        if name:
            values["name"] = name
        async with self._engine.begin() as connection:
            await require_active(connection, run_id)
            if values:
                change = update(run).where(run.c.run_id == run_id).values(**values)
                if resumed_at is not None:
                    change = change.where(run.c.ended_at.is_(None) | (run.c.ended_at < resumed_at))
                await connection.execute(change)
            if status is not None:
                await connection.execute(delete(run_tag).where(run_tag.c.run_id == run_id, run_tag.c.key == REAPED_TAG))
            if name:
                await _put_tags(connection, run_id, {RUN_NAME_TAG: name})
            return (await load_runs(connection, [run_id]))[0]

    async def set_deleted(self, run_id: str, deleted: bool) -> None:
        """Deletes or restores a run; repeating it is fine.

        Raises:
            NotFound: no such run.
            InvalidInput: it is being purged.
        """
        query = select(run.c.deleted, run.c.purge_started_at).where(run.c.run_id == run_id).with_for_update()
        values = {"deleted": deleted, "deleted_at": func.clock_timestamp() if deleted else None,
                  "deleted_with_experiment": False}  # fmt: skip
        async with self._engine.begin() as connection:
            row = (await connection.execute(query)).first()
            if row is None:
                raise NotFound(f"Run with id={run_id} not found")
            if row.purge_started_at is not None and not deleted:
                raise InvalidInput(f"The run {run_id} is being purged and cannot be restored.")
            if row.deleted != deleted:
                await connection.execute(update(run).where(run.c.run_id == run_id).values(**values))

    async def log(self, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]) -> RunRef:
        """Writes params and tags in one transaction; see ``write_update``."""
        async with self._engine.begin() as connection:
            return await write_update(connection, RunUpdate(run_id, dict(params), dict(tags)))

    async def record_model(self, run_id: str, entry: Mapping[str, object]) -> None:
        """Appends an entry, which is JSON, to the run's tag that lists its models; the newest ones are kept.

        Raises:
            NotFound: no such run.
            InvalidInput: the run is deleted, or the tag was overwritten with something else than a JSON list.
        """
        where = run_tag.c.run_id == run_id, run_tag.c.key == MODEL_HISTORY_TAG
        async with self._engine.begin() as connection:
            await require_active(connection, run_id)
            current = (await connection.execute(select(run_tag.c.value).where(*where))).scalar()
            value = append_model(current, entry)
            statement = upsert(run_tag).values(run_id=run_id, key=MODEL_HISTORY_TAG, value=value)
            await connection.execute(
                statement.on_conflict_do_update(index_elements=["run_id", "key"], set_={"value": value})
            )

    async def delete_tag(self, run_id: str, key: str) -> None:
        """Removes one tag.

        Raises:
            NotFound: no such run or tag.
        """
        async with self._engine.begin() as connection:
            await require_active(connection, run_id)
            statement = delete(run_tag).where(run_tag.c.run_id == run_id, run_tag.c.key == key)
            if not (await connection.execute(statement)).rowcount:
                raise NotFound(f"No tag with name: {key} in run with id {run_id}")

    async def select(self, query: Select[Any]) -> Sequence[Row[Any]]:
        """The rows of a search's query, planned for its very values."""
        async with self._engine.connect() as connection:
            await connection.execute(SEARCH_SETTINGS)
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
        return rows

    async def load(self, run_ids: Sequence[str]) -> list[Run]:
        """The runs in the order of ``run_ids``; unknown ids are left out."""
        async with self._engine.connect() as connection:
            return await load_runs(connection, run_ids)

    async def kill_of_attempt(self, attempt: str) -> int:
        """Marks the runs that a dead attempt left RUNNING as KILLED and returns how many there were."""
        started_by = select(run_tag.c.run_id).where(
            run_tag.c.key == ATTEMPT_TAG, run_tag.c.value == attempt, is_short(run_tag.c.value)
        )
        statement = (
            update(run)
            .where(run.c.run_id.in_(started_by), run.c.status == RunStatus.RUNNING)
            .values(status=RunStatus.KILLED, ended_at=func.clock_timestamp())
        )
        async with self._engine.begin() as connection:
            return (await connection.execute(statement)).rowcount


# A run is created in one round trip: the experiment is pinned, the run and its tags are written.
_CREATE = text(
    """
    WITH parent AS MATERIALIZED (
        SELECT rtrim(artifact_location, '/') || '/' || CAST(:run_id AS text) || '/artifacts' AS artifact_uri
        FROM experiment WHERE experiment_id = :experiment_id AND NOT deleted FOR SHARE
    ), made AS (
        INSERT INTO run (run_id, experiment_id, name, status, user_id, artifact_uri, started_at, heartbeat_at)
        SELECT CAST(:run_id AS text), CAST(:experiment_id AS bigint), CAST(:name AS text), CAST(:status AS text),
               CAST(:user_id AS text), artifact_uri, CAST(:started_at AS timestamptz),
               CASE WHEN :beating THEN clock_timestamp() END
        FROM parent
        ON CONFLICT DO NOTHING RETURNING run_id
    ), tagged AS (
        INSERT INTO run_tag (run_id, key, value)
        SELECT made.run_id, tag.key, tag.value
        FROM made, unnest(CAST(:keys AS text[]), CAST(:values AS text[])) AS tag (key, value)
    )
    SELECT parent.artifact_uri, made.run_id FROM parent LEFT JOIN made ON true
    """
)


async def write_update(connection: AsyncConnection, new: RunUpdate) -> RunRef:
    """Writes params and tags inside of a transaction.

    Raises:
        InvalidInput: a param has another value already, or the run is deleted.
        NotFound: no such run.
    """
    ref = await require_active(connection, new.run_id)
    await _put_params(connection, new.run_id, new.params)
    await _put_tags(connection, new.run_id, new.tags)
    if RUN_NAME_TAG in new.tags:
        name = cut_tag(new.tags[RUN_NAME_TAG])
        await connection.execute(update(run).where(run.c.run_id == new.run_id).values(name=name))
    return ref


async def load_runs(connection: AsyncConnection, run_ids: Sequence[str]) -> list[Run]:
    """The runs with params, tags and links, in the order of ``run_ids``; unknown ids are left out."""
    if not run_ids:
        return []
    wanted = func.unnest(literal(list(run_ids), ARRAY(Text))).table_valued(
        column("run_id", Text), with_ordinality="position", name="wanted"
    ).render_derived()  # fmt: skip
    columns = [column for column in run.c if column.key != "run_id"]
    entries = _entries(run_param).label("params"), _entries(run_tag).label("tags")
    query: Select[Any] = (
        select(run.c.run_id, *columns, *entries, HAS_LINKS)
        .join_from(wanted, run, run.c.run_id == wanted.c.run_id)
        .order_by(wanted.c.position)
    )
    rows = (await connection.execute(query)).all()
    links = await load_links(connection, [row.run_id for row in rows if row.has_links])
    return [_run(row, links.get(row.run_id, NO_LINKS)) for row in rows]


def _entries(pairs: Table) -> ColumnElement[Any]:
    """A run's params or tags as one JSON object: a row for each would cost more than the rest of the search."""
    built = func.json_object_agg(pairs.c.key, aggregate_order_by(pairs.c.value, pairs.c.key))
    return select(cast(built, Text)).where(pairs.c.run_id == run.c.run_id).correlate(run).scalar_subquery()


def _require_all(run_ids: Sequence[str], found: Collection[str]) -> None:
    for run_id in run_ids:
        if run_id not in found:
            raise NotFound(f"Run with id={run_id} not found")


async def require_active(connection: AsyncConnection, run_id: str) -> RunRef:
    """The run, if it may be written to; it is locked until the transaction ends.

    Raises:
        NotFound: no such run.
        InvalidInput: it is deleted.
    """
    query = select(run.c.experiment_id, run.c.deleted).where(run.c.run_id == run_id)
    # Writers of one run take turns, the run's row first: in any other order they could wait for one another.
    row = (await connection.execute(query.with_for_update())).first()
    if row is None:
        raise NotFound(f"Run with id={run_id} not found")
    if row.deleted:
        raise InvalidInput(f"The run {run_id} must be in the 'active' state. Current state is deleted.")
    return RunRef(run_id, row.experiment_id)


async def _put_params(connection: AsyncConnection, run_id: str, params: Mapping[str, str]) -> None:
    if not params:
        return
    rows = [{"run_id": run_id, "key": key, "value": value} for key, value in params.items()]
    await connection.execute(upsert(run_param).values(rows).on_conflict_do_nothing())
    query = select(run_param).where(run_param.c.run_id == run_id, run_param.c.key.in_(params))
    for row in (await connection.execute(query)).all():
        if row.value != params[row.key]:
            raise InvalidInput(
                f"Changing param values is not allowed. Param with key='{row.key}' was already logged with "
                f"value='{row.value}' for run ID='{run_id}'. Attempted logging new value '{params[row.key]}'."
            )


async def _put_tags(connection: AsyncConnection, run_id: str, tags: Mapping[str, str]) -> None:
    if not tags:
        return
    rows = [{"run_id": run_id, "key": key, "value": cut_tag(value)} for key, value in tags.items()]
    statement = upsert(run_tag).values(rows)
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["run_id", "key"], set_={"value": statement.excluded.value})
    )


def _run(row: Row[Any], links: RunLinks) -> Run:
    params, tags = (msgspec.json.decode(text or "{}", type=dict[str, str]) for text in (row.params, row.tags))
    return Run(
        row.run_id, row.experiment_id, row.name, RunStatus(row.status), row.user_id, row.artifact_uri, row.deleted,
        row.started_at, row.ended_at, params, tags, links,
    )  # fmt: skip
