"""The executor's writes: transitions of many runs, group-committed, each fenced by its run's epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from mlplat.db.engine import CONNECTION_ERRORS, HeldConnection, why_away
from mlplat.db.group_commit import GroupCommit
from mlplat.db.snapshots import TRANSACTION_ID
from mlplat.errors import Fenced, Unavailable
from mlplat.pipelines.machine import Changes
from mlplat.pipelines.model import ChildRequest

#: How long a commit is retried while Postgres is away. Attempts go on running meanwhile.
COMMIT_PATIENCE_S = 120
COMMIT_TIMEOUT_S = 15
_EMPTY = msgspec.Raw(b"[]")


@dataclass(frozen=True)
class CachedOutput:
    """An output that equal attempts may take."""

    key: str
    step: str
    item: int
    output: dict[str, object]


class _Row(msgspec.Struct):
    """A transition as the statement takes it: its rows are JSON already, as they were when it was made."""

    run_id: str
    epoch: int
    seq: int
    run: msgspec.Raw
    step_runs: msgspec.Raw
    attempts: msgspec.Raw
    children: msgspec.Raw = _EMPTY
    cache: msgspec.Raw = _EMPTY


@dataclass
class Transition:
    """What changes together in one run. Rows are written whole, so writing them again is harmless."""

    row: _Row
    #: Why it was not written, if it was not: set by the writer.
    problem: Exception | None = field(default=None)

    @classmethod
    def of(
        cls,
        run_id: str,
        epoch: int,
        changes: Changes,
        children: Sequence[ChildRequest] = (),
        cache: Sequence[CachedOutput] = (),
    ) -> Transition:
        """The changes as they are now; the rows may go on changing."""
        return cls(
            _Row(
                run_id, epoch, changes.seq, _json(changes.run), _json(changes.step_runs), _json(changes.attempts),
                _json([_child(child, run_id) for child in children]) if children else _EMPTY,
                _json(cache) if cache else _EMPTY,
            )
        )  # fmt: skip


class TransitionWriter:
    """One writer connection of one executor. Children of a run start out with the same executor."""

    def __init__(self, engine: AsyncEngine, executor: str) -> None:
        self._connection = HeldConnection(engine, COMMIT_TIMEOUT_S)
        self._executor = executor
        self._group: GroupCommit[Transition] = GroupCommit(self._commit, max_group=200, max_pending=100_000)

    async def write(self, transition: Transition) -> None:
        """Returns when the transition is durable.

        Raises:
            Fenced: the run has another owner by now, or is over; nothing was written.
            Unavailable: Postgres stayed away for longer than ``COMMIT_PATIENCE_S``.
        """
        await self._group.submit(transition)
        if transition.problem is not None:
            raise transition.problem

    async def close(self) -> None:
        """Commits what is queued."""
        await self._group.close()
        await self._connection.close()

    async def _commit(self, group: Sequence[Transition]) -> None:
        """Commits the group; if it is refused, commits its items one by one, so that each answers for itself."""
        try:
            await self._commit_together(group)
        except Unavailable:
            raise
        except Exception as error:  # data that Postgres does not take, for instance
            if len(group) == 1:
                group[0].problem = error
                return
            for item in group:
                await self._commit([item])

    async def _commit_together(self, group: Sequence[Transition]) -> None:
        retries = AsyncRetrying(
            retry=retry_if_exception_type(CONNECTION_ERRORS),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            stop=stop_after_delay(COMMIT_PATIENCE_S),
            reraise=True,
        )
        # A repeat after a lost answer writes the same rows again, except where the first one has ended the run.
        seen: set[tuple[str, int]] = set()
        try:
            async for attempt_ in retries:
                with attempt_:
                    seen |= await self._execute(group)
        except CONNECTION_ERRORS as error:
            raise Unavailable(why_away(error)) from error
        for item in group:
            is_owned = (item.row.run_id, item.row.epoch) in seen
            item.problem = None if is_owned else Fenced(f"run {item.row.run_id}: epoch {item.row.epoch} is over")

    async def _execute(self, group: Sequence[Transition]) -> set[tuple[str, int]]:
        values = {"items": msgspec.json.encode([item.row for item in group]).decode(), "executor": self._executor}
        return {(row.run_id, row.epoch) for row in await self._connection.execute(_WRITE, values)}


def _json(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _child(child: ChildRequest, parent: str) -> dict[str, object]:
    return {
        "run_id": child.child_id, "digest": child.spec.digest, "name": child.spec.name, "spec": child.spec.to_json(),
        "params": child.params, "submitted_by": child.submitted_by, "resumed_from": child.resumed_from,
        "source": f"step:{parent}/{child.step}/{child.item}/{child.attempt}",
    }  # fmt: skip


_STEP_COLUMNS = (
    "state text, items int, attempt smallint, failures smallint, output json, error text, reused_from text, "
    "seq bigint, "
    "retry_at timestamptz, queued_at timestamptz, started_at timestamptz, finished_at timestamptz"
)
_ATTEMPT_COLUMNS = (
    "state text, error text, node text, progress json, child_id text, seq bigint, "
    "queued_at timestamptz, started_at timestamptz, finished_at timestamptz"
)
_RUN_COLUMNS = "state text, error text, stopping text, output json, started_at timestamptz, finished_at timestamptz"


def _names(columns: str) -> list[str]:
    return [column.split()[0] for column in columns.split(", ")]


def _upsert(table: str, key: str, source: str, columns: str) -> str:
    """Rows of the transitions that are owned, inserted or written over."""
    keys, names = ", ".join(_names(key)), ", ".join(_names(columns))
    updates = ", ".join(f"{name} = excluded.{name}" for name in _names(columns))
    return f"""
        INSERT INTO {table} (run_id, {keys}, {names})
        SELECT owned.run_id, rec.* FROM owned JOIN item USING (run_id, epoch)
        CROSS JOIN LATERAL json_to_recordset(item.{source}) AS rec({key}, {columns})
        ON CONFLICT (run_id, {keys}) DO UPDATE SET {updates}"""  # noqa: S608 - from the constants above


#: The UPDATE of the run is the fence: it waits for a take-over that is under way, and then finds another epoch.
_WRITE = f"""
    WITH item AS MATERIALIZED (
        SELECT * FROM json_to_recordset(%(items)s::json) AS t(
            run_id text, epoch bigint, seq bigint, run json, step_runs json, attempts json, children json, cache json)
    ), owned AS (
        UPDATE pipeline_run AS r SET
            seq = item.seq, state = coalesce(new.state, r.state),
            error = CASE WHEN new.state IS NULL THEN r.error ELSE new.error END,
            stopping = coalesce(new.stopping, r.stopping), output = coalesce(new.output, r.output),
            started_at = coalesce(new.started_at, r.started_at),
            finished_at = coalesce(new.finished_at, r.finished_at),
            ended_txid = CASE WHEN new.finished_at IS NULL THEN r.ended_txid ELSE {TRANSACTION_ID} END
        FROM item LEFT JOIN LATERAL json_to_record(item.run) AS new({_RUN_COLUMNS}) ON true
        WHERE r.run_id = item.run_id AND r.epoch = item.epoch AND r.state IN ('PENDING', 'QUEUED', 'RUNNING')
        RETURNING r.run_id, r.epoch
    ), steps AS ({_upsert("step_run", "step text, item int", "step_runs", _STEP_COLUMNS)}
    ), tries AS ({_upsert("attempt", "step text, item int, attempt smallint", "attempts", _ATTEMPT_COLUMNS)}
    ), child AS MATERIALIZED (
        SELECT child.* FROM owned JOIN item USING (run_id, epoch)
        CROSS JOIN LATERAL json_to_recordset(item.children) AS child(
            run_id text, digest text, name text, spec json, params jsonb, submitted_by text, resumed_from text,
            source text)
    ), definitions AS (
        INSERT INTO pipeline (digest, name, spec) SELECT DISTINCT ON (digest) digest, name, spec FROM child
        ON CONFLICT DO NOTHING
    ), children AS (
        INSERT INTO pipeline_run
            (run_id, digest, name, params, state, submitted_by, resumed_from, source, executor, epoch,
             idempotency_key)
        SELECT run_id, digest, name, params, 'QUEUED', submitted_by, resumed_from, source, %(executor)s, 1, source
        FROM child
        ON CONFLICT DO NOTHING
    ), cached AS (
        INSERT INTO step_cache (key, output, run_id, step, item)
        SELECT DISTINCT ON (rec.key) rec.key, rec.output, owned.run_id, rec.step, rec.item
        FROM owned JOIN item USING (run_id, epoch)
        CROSS JOIN LATERAL json_to_recordset(item.cache) AS rec(key text, step text, item int, output json)
        ON CONFLICT (key) DO UPDATE SET
            output = excluded.output, run_id = excluded.run_id, step = excluded.step, item = excluded.item,
            created_at = excluded.created_at
    )
    SELECT run_id, epoch FROM owned
"""  # noqa: S608 - built from the constants above
